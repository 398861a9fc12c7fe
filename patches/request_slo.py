"""Objectives at the HTTP server: an invalid one is a 400, and one beside the sampling parameters counts.

Targets: ``api_contract.generate_contract_error`` for /generate and /vertex_generate;
``_validate_request`` of the OpenAI handlers for /v1/completions and /v1/chat/completions; ``serve_generate_request`` of
the HTTP server. Without them an invalid objective of a streaming request would be an error event under status 200, and
the ``custom_params`` at the top of a /generate body, where the OpenAI endpoints have them and where
``sglang.bench_serving --extra-request-body`` puts them, would be ignored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.slo import body_error, with_objective

GENERATE = "sglang.srt.entrypoints.api_contract.generate_contract_error"
SERVE = "sglang.srt.entrypoints.http_server.serve_generate_request"
OPENAI = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request",
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._validate_request",
)


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("request_slo")
    HookRegistry.register(GENERATE, _check_generate, HookType.AROUND)
    HookRegistry.register(SERVE, _add_objective, HookType.AROUND)
    for target in OPENAI:
        HookRegistry.register(target, _check_openai, HookType.AROUND)


def _check_generate(original: Callable[[Any], str | None], body: Any) -> str | None:
    return original(body) or body_error(body)


async def _add_objective(original: Callable[[Any, Any], Awaitable[Any]], obj: Any, request: Any) -> Any:
    body = await request.json()  # parsed before, and checked by the hook above
    if isinstance(body, Mapping):
        obj.sampling_params = with_objective(obj.sampling_params, body.get("custom_params"))
    return await original(obj, request)


def _check_openai(original: Callable[[Any, Any], str | None], handler: Any, request: Any) -> str | None:
    return original(handler, request) or body_error({"custom_params": request.custom_params})
