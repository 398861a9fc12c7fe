"""A request that is shed gets status 429 and Retry-After, at the HTTP server.

Targets: ``TokenizerManager._handle_abort_finish_reason``, which raises what a refusal by the scheduler is for the
client; ``serve_generate_request`` of the HTTP server; ``handle_request`` and ``create_error_response`` of the OpenAI
handlers. Without them the status would have no Retry-After, and streams of the OpenAI endpoints would be a 200 with an
error event. A stream of ``/generate`` stays what SGLang makes of a refusal: status 200 and one event that says it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

ABORT: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason"
GENERATE: Final = "sglang.srt.entrypoints.http_server.serve_generate_request"
HANDLE: Final = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request"
ERROR: Final = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response"
RETRY_AFTER: Final = "retry_after_s"
"""Key of a shed request's reason: whole seconds."""

_retry_after_s: ContextVar[int | None] = ContextVar("flowprefill_retry_after_s", default=None)
_answers_with_status: ContextVar[bool] = ContextVar("flowprefill_answers_with_status", default=False)
"""Whether an exception before the first event of a stream becomes the status of its answer."""


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("overload")
    HookRegistry.register(ABORT, refuse, HookType.AROUND)
    HookRegistry.register(GENERATE, answer_generate, HookType.AROUND)
    HookRegistry.register(HANDLE, handle_openai, HookType.AROUND)
    HookRegistry.register(ERROR, add_retry_after, HookType.AROUND)


async def refuse(
    original: Callable[..., Awaitable[Any]], manager: Any, out: Mapping[str, Any], state: Any, is_stream: bool
) -> Any:
    """The hook where a refusal becomes an exception: with Retry-After, and for streams that have not begun too."""
    from fastapi import HTTPException

    retry_after_s = out["meta_info"]["finish_reason"].get(RETRY_AFTER)
    if retry_after_s is None:
        return await original(manager, out, state, is_stream)
    _retry_after_s.set(retry_after_s)
    try:
        return await original(manager, out, state, is_stream and not _answers_with_status.get())
    except HTTPException as error:
        raise HTTPException(error.status_code, error.detail, _header(retry_after_s)) from None


async def answer_generate(original: Callable[..., Awaitable[Any]], obj: Any, request: Any) -> Any:
    """The hook of ``/generate``: SGLang's handler of exceptions leaves their headers out."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse

    try:
        return await original(obj, request)
    except HTTPException as error:
        if error.status_code != HTTPStatus.TOO_MANY_REQUESTS or not error.headers:
            raise
        told = {"message": error.detail, "type": "overloaded", "code": error.status_code}
        return JSONResponse({"error": told}, error.status_code, error.headers)


async def handle_openai(original: Callable[..., Awaitable[Any]], handler: Any, *args: Any, **kwargs: Any) -> Any:
    """The hook of the OpenAI endpoints: they wait for the first event of a stream before they answer."""
    _retry_after_s.set(None)
    _answers_with_status.set(True)
    return await original(handler, *args, **kwargs)


def add_retry_after(original: Callable[..., Any], handler: Any, *args: Any, **kwargs: Any) -> Any:
    """The hook where the OpenAI endpoints make an error: a 429 by the scheduler says when to come back."""
    response = original(handler, *args, **kwargs)
    retry_after_s = _retry_after_s.get()
    if response.status_code == HTTPStatus.TOO_MANY_REQUESTS and retry_after_s is not None:
        response.headers.update(_header(retry_after_s))
    return response


def _header(retry_after_s: int) -> dict[str, str]:
    return {"Retry-After": str(retry_after_s)}
