"""TTFT objectives at the HTTP server: an invalid one is a 400, and the scheduler learns when a request was received.

Targets (SGLang 0.5.23): ``api_contract.generate_contract_error`` for /generate; ``_validate_request`` of the OpenAI
handlers for /v1/completions and /v1/chat/completions; ``APIServerReqTimeStats.__getstate__``, which decides what of a
request's times travels to the scheduler. Without them an invalid objective of a streaming request would be an error
event under status 200, and a deadline would count from when the scheduler got round to reading the request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_flowprefill.patches.base import expect_parameters, expect_source
from sgl_flowprefill.slo import body_error

GENERATE = "sglang.srt.entrypoints.api_contract.generate_contract_error"
OPENAI = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request",
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._validate_request",
)
TIMES = "sglang.srt.observability.req_time_stats.APIServerReqTimeStats.__getstate__"


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect_parameters("request_slo", GENERATE, ("body",))
    for target in OPENAI:
        expect_parameters("request_slo", target, ("self", "request"))
    expect_source("request_slo", TIMES, "created_time", "api_server_dispatch_time")

    HookRegistry.register(GENERATE, _check_generate, HookType.AROUND)
    for target in OPENAI:
        HookRegistry.register(target, _check_openai, HookType.AROUND)
    HookRegistry.register(TIMES, _add_times, HookType.AFTER)


def _check_generate(original: Callable[[Any], str | None], body: Any) -> str | None:
    return original(body) or body_error(body)


def _check_openai(original: Callable[[Any, Any], str | None], handler: Any, request: Any) -> str | None:
    return original(handler, request) or body_error({"custom_params": request.custom_params})


def _add_times(state: dict[str, Any], stats: Any) -> dict[str, Any]:
    return state | {
        "created_time": stats.created_time,
        "api_server_dispatch_time": stats.api_server_dispatch_time,
    }
