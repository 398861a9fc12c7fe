"""A request that is shed gets status 429 and Retry-After, at the HTTP server.

Targets: ``TokenizerManager._handle_abort_finish_reason``, which raises what a refusal by the scheduler is for the
client; the endpoints that answer requests; ``create_error_response`` of the OpenAI handlers. Without them the status
would have no Retry-After, on /v1/responses it would be 400, and streams of /v1/completions and /v1/chat/completions
would be a 200 with an error event. Other streams stay what SGLang makes of a refusal: status 200 and an event that says
it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

ABORT: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason"
GENERATE: Final = "sglang.srt.entrypoints.http_server.serve_generate_request"
OPENAI: Final = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request"
RESPONSES: Final = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses"
MESSAGES: Final = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages"
ERRORS: Final = (
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response",
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_error_response",
)
RETRY_AFTER: Final = "retry_after_s"
"""Key of a shed request's reason: whole seconds."""


@dataclass
class Answering:
    """An HTTP request that is being answered. SGLang makes tasks for the prompts of a list, which share it."""

    waits_for_first_event: bool = False
    """Whether an exception before the first event of its stream becomes the status of its answer."""
    message: str = ""
    retry_after_s: int | None = None
    """Of its prompt that was refused first; None as long as none was."""


_answering: ContextVar[Answering | None] = ContextVar("flowprefill_answering", default=None)


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("overload")
    HookRegistry.register(ABORT, refuse, HookType.AROUND)
    for target in (GENERATE, RESPONSES, MESSAGES):
        HookRegistry.register(target, answer, HookType.AROUND)
    HookRegistry.register(OPENAI, answer_openai, HookType.AROUND)
    for target in ERRORS:
        HookRegistry.register(target, tell_refusal, HookType.AROUND)


async def refuse(
    original: Callable[..., Awaitable[Any]], manager: Any, out: Mapping[str, Any], state: Any, is_stream: bool
) -> Any:
    """The hook where a refusal becomes an exception: for streams that have not begun too, where that is waited for."""
    reason, answering = out["meta_info"]["finish_reason"], _answering.get()
    if answering is not None and RETRY_AFTER in reason:
        if answering.retry_after_s is None:
            answering.message, answering.retry_after_s = reason["message"], reason[RETRY_AFTER]
        is_stream = is_stream and not answering.waits_for_first_event
    return await original(manager, out, state, is_stream)


async def answer(original: Callable[..., Awaitable[Any]], *args: Any, waits_for_first_event: bool = False) -> Any:
    """The hook of an endpoint: an answer that is an error because a prompt was refused says when to come back."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse, Response

    answering = Answering(waits_for_first_event)
    _answering.set(answering)
    try:
        response = await original(*args)
    except HTTPException as error:  # of /generate; SGLang's handler of exceptions would leave headers out
        if answering.retry_after_s is None:
            raise
        told = {"message": error.detail, "type": "overloaded", "code": error.status_code}
        response = JSONResponse({"error": told}, error.status_code)
    finally:
        answering.waits_for_first_event = False
    if (
        answering.retry_after_s is not None
        and isinstance(response, Response)
        and response.status_code == HTTPStatus.TOO_MANY_REQUESTS
    ):
        response.headers["Retry-After"] = str(answering.retry_after_s)
    return response


async def answer_openai(original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """The hook of the endpoints that wait for the first event of a stream before they answer."""
    return await answer(original, *args, waits_for_first_event=True)


def tell_refusal(original: Callable[..., Any], handler: Any, message: str, *args: Any, **kwargs: Any) -> Any:
    """The hook where the OpenAI endpoints make an error: after a refusal, whatever came of it there, it is that."""
    answering = _answering.get()
    if answering is None or answering.retry_after_s is None:
        return original(handler, message, *args, **kwargs)
    status = HTTPStatus.TOO_MANY_REQUESTS
    return original(handler, answering.message, str(int(status)), int(status))
