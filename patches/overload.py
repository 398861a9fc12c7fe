"""A request that is shed gets status 429 and Retry-After, at the HTTP server.

Targets: ``TokenizerManager._handle_abort_finish_reason``, which makes of a refusal by the scheduler what the client
gets; the endpoints that answer requests; ``create_error_response`` of the OpenAI handlers. Without them the status
would have no Retry-After, on /v1/responses it would be 400, and streams would be a 200 with an error event.

The answer to a stream begins with its first event, which is there with the first token: until then it may be refused.
/v1/responses sends two events before, which are held back that long; not where tools are given, with which SGLang may
hold back the third one until the end.

Nobody else hears of a client that leaves before there is an answer, so it is looked for here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final

from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.patches.endpoints import GENERATE, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE, OPENAI, RESPONSES

ABORT: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason"
RAISING: Final = (GENERATE, OPENAI, OLLAMA_CHAT, OLLAMA_GENERATE)
"""Endpoints that let the exception of a refusal out of a stream that has not begun."""
TELLING: Final = (RESPONSES, MESSAGES)
"""Those that make an event of any exception, and an error of their log."""
ERRORS: Final = (
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.create_error_response",
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_error_response",
)
RETRY_AFTER: Final = "retry_after_s"
"""Key of a shed request's reason: whole seconds."""
BEFORE_THE_ANSWER: Final = ("event: response.created\n", "event: response.in_progress\n")
"""How events of /v1/responses begin that say nothing of the answer."""
POLL_S: Final = 0.25
"""How often it is looked whether the client of a stream that has not begun is still there."""


@dataclass
class Answering:
    """An HTTP request that is being answered. SGLang makes tasks for the prompts of a list, which share it."""

    raises: bool = False
    """Whether a refusal is an exception for streams, too: as long as nothing of the answer was sent."""
    message: str = ""
    retry_after_s: int | None = None
    """Of its prompt that was refused first; None as long as none was."""


_answering: ContextVar[Answering | None] = ContextVar("flowprefill_answering", default=None)


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("overload")
    HookRegistry.register(ABORT, refuse, HookType.AROUND)
    for target in RAISING:
        HookRegistry.register(target, partial(answer, raises=True), HookType.AROUND)
    for target in TELLING:
        HookRegistry.register(target, answer, HookType.AROUND)
    for target in ERRORS:
        HookRegistry.register(target, tell_refusal, HookType.AROUND)


async def refuse(
    original: Callable[..., Awaitable[Any]], manager: Any, out: Mapping[str, Any], state: Any, is_stream: bool
) -> Any:
    """The hook where a refusal becomes an exception, or an event of a stream."""
    reason, answering = out["meta_info"]["finish_reason"], _answering.get()
    if answering is not None and RETRY_AFTER in reason:
        if answering.retry_after_s is None:
            answering.message, answering.retry_after_s = reason["message"], reason[RETRY_AFTER]
        is_stream = is_stream and not answering.raises
    return await original(manager, out, state, is_stream)


async def answer(original: Callable[..., Awaitable[Any]], *args: Any, raises: bool = False) -> Any:
    """The hook of an endpoint: a request of which a prompt was refused before anything of the answer was sent gets an
    error that says when to come back.
    """
    from fastapi import HTTPException
    from fastapi.responses import Response

    answering = Answering(raises)
    _answering.set(answering)
    try:
        response = await _begun(await original(*args), answering, *args)
    except HTTPException:  # of /generate; SGLang's handler of exceptions would leave headers out
        if answering.retry_after_s is None:
            raise
        response = _refusal(answering, args[0])
    finally:
        answering.raises = False
    if (
        answering.retry_after_s is not None
        and isinstance(response, Response)
        and response.status_code == HTTPStatus.TOO_MANY_REQUESTS
    ):
        response.headers["Retry-After"] = str(answering.retry_after_s)
    return response


async def _begun(response: Any, answering: Answering, *args: Any) -> Any:
    """The answer of an endpoint that was called with ``args``: of a stream as soon as it begins, or the error in its
    place.
    """
    from fastapi.responses import StreamingResponse

    if isinstance(response, StreamingResponse):
        events: Any = response.body_iterator
    elif isinstance(response, AsyncGenerator) and not args[1].tools:
        events = response
    else:
        return response
    first = []
    while (event := await _next_event(events, args[-1])) is not None:
        first.append(event)
        if not (isinstance(event, str) and event.startswith(BEFORE_THE_ANSWER)):
            break
    if answering.retry_after_s is not None:
        await events.aclose()
        refusal = _refusal(answering, args[0])
        refusal.background = getattr(response, "background", None)  # SGLang's, which aborts its other prompts
        return refusal
    if events is response:
        return _together(first, events)
    response.body_iterator = _together(first, events)
    return response


async def _next_event(events: Any, request: Any) -> Any:
    """The next of a stream's ``events``. None where there is none, or where the client of ``request`` has left: SGLang
    aborts what is generated for it, as its generator is cancelled.
    """
    coming = asyncio.ensure_future(anext(events))
    try:
        while not (await asyncio.wait({coming}, timeout=POLL_S))[0]:
            if request is not None and await request.is_disconnected():
                return None
        return coming.result()
    except StopAsyncIteration:
        return None
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait({coming})


async def _together(first: list[Any], events: Any) -> AsyncGenerator[Any, None]:
    async with aclosing(events):
        for event in first:
            yield event
        async for event in events:
            yield event


def _refusal(answering: Answering, handler: Any) -> Any:
    """The error, in the form of the API where ``handler`` is one of OpenAI's."""
    from fastapi.responses import JSONResponse

    if hasattr(handler, "create_error_response"):
        return handler.create_error_response(answering.message)  # ``tell_refusal`` knows the rest
    status = int(HTTPStatus.TOO_MANY_REQUESTS)
    told = {"message": answering.message, "type": "overloaded", "code": status}
    return JSONResponse({"type": "error", "error": told}, status)


def tell_refusal(original: Callable[..., Any], handler: Any, message: str, *args: Any, **kwargs: Any) -> Any:
    """The hook where the OpenAI endpoints make an error: after a refusal, whatever came of it there, it is that."""
    answering = _answering.get()
    if answering is None or answering.retry_after_s is None:
        return original(handler, message, *args, **kwargs)
    status = HTTPStatus.TOO_MANY_REQUESTS
    return original(handler, answering.message, str(int(status)), int(status))
