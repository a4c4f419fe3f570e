"""A user's scheduler: `--scheduler-cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler

from tests.plugins.describe import write


class Scheduler(VllmScheduler):
    """vLLM's own, which shows the requests that come, what each step has sampled, and which requests end early."""

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        write("scheduler: before add_request", request)
        answer = super().add_request(request, *args, **kwargs)
        write("scheduler: after add_request", request)
        return answer

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        answer: Any = super().update_from_output(*args, **kwargs)
        for batch in answer.values() if isinstance(answer, dict) else [answer]:
            for output in batch.outputs:
                write("scheduler: update_from_output", output)
        return answer

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        write("scheduler: finish_requests", request_ids, args, kwargs)
        return super().finish_requests(request_ids, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        write("scheduler: _free_request", request)
        return super()._free_request(request, *args, **kwargs)
