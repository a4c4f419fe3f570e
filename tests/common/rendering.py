"""vLLM's renderer of chat requests without a server: prompts that it makes, and answers that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from agentlightning.instrumentation.vllm import _context, continuation
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture.conversion import CapturedRequest, FinishedChoice
from tests.common.tiny_model import tiny_model

__all__ = ["answered", "online_renderer", "prompt_of"]


def online_renderer(template: str, *, length: int = 1 << 16, **options: Any) -> Any:
    """Return the renderer of a server of the tiny model, with this chat template."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import renderer_from_config

    config = ModelConfig(
        str(tiny_model()), max_model_len=length, hf_overrides={"max_position_embeddings": length}, **options
    )
    return OnlineRenderer(
        config,
        renderer_from_config(VllmConfig(model_config=config)),
        request_logger=None,
        chat_template=template,
        chat_template_content_format="auto",
    )


async def prompt_of(
    renderer: Any, messages: Sequence[Any], rollout: str | None, **caller: Any
) -> tuple[list[int], RequestContext]:
    """Return the ids of a chat request's prompt, and the context that the request was rendered in.

    Args:
        caller: what else the request says of who called.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    context = RequestContext(rollout_id=rollout, **caller)
    context.endpoint = continuation.ROUTES[0]
    request = ChatCompletionRequest.model_validate({"model": "tiny", "messages": [*messages], "max_tokens": 1})
    _, [prompt] = await _context.run_in(
        context, lambda: renderer.preprocess_chat(request, request.messages, renderer.chat_template, "auto", None)
    )
    return prompt["prompt_token_ids"], context


def answered(
    prompt: list[int],
    context: RequestContext,
    said: Sequence[int],
    text: str,
    *stops: int,
    finish_reason: str = "stop",
    stop_string: str | None = None,
    includes_stop_string: bool = False,
) -> None:
    """Let the engine have answered a prompt with these ids, which its client has as this text.

    Args:
        stops: the ids that end an answer.
        stop_string: the one that has ended it.
    """
    detokenizer = SimpleNamespace(output_token_ids=[*said], output_text=text)
    params = SimpleNamespace(all_stop_token_ids={*stops}, include_stop_str_in_output=includes_stop_string)
    captured = CapturedRequest("chatcmpl-1", 0.0, prompt, params, context)
    captured.finished.append(FinishedChoice(SimpleNamespace(detokenizer=detokenizer), finish_reason, stop_string))
    continuation.note_finished(captured)
