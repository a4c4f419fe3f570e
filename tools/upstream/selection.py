"""Selection of vLLM's tests: those to run, and those that may end differently with this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["DIFFERENT", "LEFT_OUT", "groups"]

GROUPS: Mapping[str, Sequence[str]] = {
    "chat": (
        "entrypoints/anthropic/test_messages.py",
        "entrypoints/openai/chat_completion/test_batched_chat_completions.py",
        "entrypoints/openai/chat_completion/test_chat.py",
        "entrypoints/openai/chat_completion/test_completion_with_function_calling.py",
        "entrypoints/openai/chat_completion/test_include_reasoning.py",
        "entrypoints/openai/chat_completion/test_logprob_token_ids.py",
        "entrypoints/openai/test_return_token_ids.py",
        "entrypoints/openai/test_return_tokens_as_ids.py",
    ),
    "completions and Responses": (
        "entrypoints/openai/completion/test_completion.py",
        "entrypoints/openai/responses/test_basic.py",
        "entrypoints/openai/responses/test_function_call.py",
        "entrypoints/openai/responses/test_simple.py",
        "entrypoints/openai/responses/test_stateful.py",
        "entrypoints/openai/responses/test_structured_output.py",
    ),
    "other servers": (
        "entrypoints/launchers/test_run_batch.py",
        "entrypoints/scale_out/token_in_token_out/test_serving_tokens.py",
        "entrypoints/serve/instrumentator/test_basic.py",
        "entrypoints/serve/instrumentator/test_metrics.py",
        "entrypoints/serve/middleware/test_optional_middleware.py",
        "v1/logits_processors/test_custom_online.py",
    ),
    "engines": (
        "detokenizer/test_disable_detokenization.py",
        "detokenizer/test_stop_reason.py",
        "detokenizer/test_stop_strings.py",
        "entrypoints/llm/test_chat.py",
        "entrypoints/llm/test_generate.py",
        "entrypoints/llm/test_prompt_validation.py",
        "v1/engine/test_async_llm.py",
        "v1/engine/test_engine_core.py",
        "v1/engine/test_engine_core_client.py",
        "v1/engine/test_llm_engine.py",
        "v1/logits_processors/test_custom_offline.py",
        "v1/metrics/test_engine_logger_apis.py",
        "v1/sample/test_sampling_params_e2e.py",
        "v1/streaming_input/test_async_llm_streaming.py",
    ),
    "units": (
        "detokenizer/test_check_stop_strings.py",
        "detokenizer/test_min_tokens.py",
        "entrypoints/anthropic/test_anthropic_messages_conversion.py",
        "entrypoints/anthropic/test_protocol_exports.py",
        "entrypoints/cli",
        "entrypoints/generate/generative_scoring/test_generative_scoring.py",
        "entrypoints/launchers/render",
        "entrypoints/launchers/test_balanced_accepts.py",
        "entrypoints/launchers/test_cli_args.py",
        "entrypoints/launchers/test_grpc_health.py",
        "entrypoints/launchers/test_launch_cli.py",
        "entrypoints/openai/chat_completion/test_chat_error.py",
        "entrypoints/openai/chat_completion/test_non_object_body_validation.py",
        "entrypoints/openai/chat_completion/test_serving_chat.py",
        "entrypoints/openai/chat_completion/test_thinking_token_budget_validation.py",
        "entrypoints/openai/completion/test_completion_error.py",
        "entrypoints/openai/completion/test_completion_text_offset.py",
        "entrypoints/openai/completion/test_lora_resolvers.py",
        "entrypoints/openai/parser",
        "entrypoints/openai/responses/test_errors.py",
        "entrypoints/openai/responses/test_function_call_parsing.py",
        "entrypoints/openai/responses/test_harmony_utils.py",
        "entrypoints/openai/responses/test_parsable_context_unit.py",
        "entrypoints/openai/responses/test_protocol.py",
        "entrypoints/openai/responses/test_response_input_to_harmony.py",
        "entrypoints/openai/responses/test_responses_utils.py",
        "entrypoints/openai/responses/test_sampling_params.py",
        "entrypoints/openai/responses/test_serving_responses.py",
        "entrypoints/openai/responses/test_streaming_events.py",
        "entrypoints/openai/test_penalty_default_resolution.py",
        "entrypoints/openai/test_render_parity.py",
        "entrypoints/openai/test_render_token_offsets.py",
        "entrypoints/openai/test_session_id.py",
        "entrypoints/openai/test_stop_token_ids.py",
        "entrypoints/openai/test_tool_calls_serialization.py",
        "entrypoints/openai/test_tool_choice_content_none.py",
        "entrypoints/rl/return_routed_experts/test_route_request_bodies.py",
        "entrypoints/scale_out/derender/test_generate_logprobs_conversion.py",
        "entrypoints/scale_out/test_factories.py",
        "entrypoints/scale_out/token_in_token_out/test_generate_stream.py",
        "entrypoints/scale_out/token_in_token_out/test_mm_serde.py",
        "entrypoints/scale_out/token_in_token_out/test_protocol.py",
        "entrypoints/scale_out/token_in_token_out/test_tokens_logprobs.py",
        "entrypoints/serve/exception_handling",
        "entrypoints/serve/lora/test_serving_models.py",
        "entrypoints/serve/middleware/test_authentication_middleware.py",
        "entrypoints/serve/middleware/test_cors_middleware.py",
        "entrypoints/serve/test_profile_api_router.py",
        "entrypoints/serve/tokenize/test_serving_tokenization.py",
        "entrypoints/serve/utils",
        "entrypoints/speech_to_text/test_speech_to_text_cancellation.py",
        "entrypoints/unit_tests/test_chat_billing_header.py",
        "entrypoints/unit_tests/test_context.py",
        "entrypoints/unit_tests/test_non_object_body_validation.py",
        "entrypoints/unit_tests/test_offline_utils.py",
        "parser/test_include_reasoning.py",
        "samplers/test_non_finite_params.py",
        "tool_use/test_chat_completion_request_validations.py",
        "tool_use/test_responses_request_validations.py",
        "tool_use/test_tool_choice_required.py",
        "v1/engine/test_abort_final_step.py",
        "v1/engine/test_admission_control.py",
        "v1/engine/test_engine_args.py",
        "v1/engine/test_fast_incdec_prefix_err.py",
        "v1/engine/test_input_processor_trace_replay.py",
        "v1/engine/test_iteration_logging.py",
        "v1/engine/test_kv_transfer_rejection.py",
        "v1/engine/test_llm_engine_finalizer_is_weak.py",
        "v1/engine/test_logprobs_processor.py",
        "v1/engine/test_output_processor.py",
        "v1/engine/test_parallel_sampling.py",
        "v1/engine/test_preprocess_error_handling.py",
        "v1/engine/test_wake_up_contract.py",
        "v1/logits_processors/test_loader.py",
        "v1/metrics/test_histogram_buckets.py",
        "v1/metrics/test_stats.py",
        "v1/sample/test_trace_replay_params.py",
        "v1/streaming_input/test_scheduler_streaming.py",
    ),
}
"""Files and folders below `tests`, as 0.32 has them. Each group runs in one process.

The first three start servers, engines run in the process of the tests or beside it, units have a stand-in for one.
It leaves out what is for a GPU, for models that are no language models, for a network or for data sets, and what takes
long and touches nothing that is patched: parsers alone, kernels, the accuracy of answers.
"""

LEFT_OUT = ("gptoss", "gpt_oss", "harmony", "transcription", "translation", "test_score")
"""Parts of the names of tests that are not run: for models that the tiny one cannot stand for."""

DIFFERENT: Mapping[str, str] = {
    "entrypoints/openai/test_return_token_ids.py::test_basic_completion_with_emoji[None]": (
        "it asserts that an answer has no ids where the request does not ask for them"
    ),
}
"""Tests that may end otherwise with us, by the ends of their names with parameters, and why that is right."""


def groups(tests: Path, pattern: str = "") -> dict[str, list[str]]:
    """The files of each group that the release has, and whose names contain the pattern."""
    found = {
        name: [file for path in paths for file in _files(tests, f"tests/{path}") if pattern in file]
        for name, paths in GROUPS.items()
    }
    return {name: files for name, files in found.items() if files}


def _files(tests: Path, path: str) -> list[str]:
    if (tests / path).is_dir():
        return sorted(str(file.relative_to(tests)) for file in (tests / path).rglob("test_*.py"))
    return [path] if (tests / path).exists() else []
