"""A user's KV connector: `--kv-transfer-config`."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from tests.plugins.describe import write


class Metadata(KVConnectorMetadata):
    """Empty metadata: the worker needs none."""


class Connector(KVConnectorBase_V1):
    """Transfer nothing, and write down each request that the scheduler shows."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        write("connector: get_num_new_matched_tokens", request)
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        write("connector: update_state_after_alloc", request)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        for new in scheduler_output.scheduled_new_reqs:
            write("connector: build_connector_meta", new)
        return Metadata()

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        write("connector: request_finished", request)
        return False, None
