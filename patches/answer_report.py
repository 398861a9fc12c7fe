"""Answers say what happened to their requests, at the HTTP server: the scheduler's report of each (``answers.py``)
reaches the client.

Targets: ``TokenizerManager.update_request_meta_info``, where what the scheduler sends beside tokens (SGLang's
``customized_info``) goes into ``meta_info``; ``build_endpoint_weight_version_metadata``, which makes the ``metadata``
of answers of /v1/completions and /v1/chat/completions; ``_generate_completion_stream`` and ``_generate_chat_stream`` of
their handlers, which make the events of streams; ``ResponsesResponse.from_request``, which makes answers and last
events of /v1/responses, and ``_generate_with_builtin_tools``, which gets the request object of such an answer;
``TokenizerManager.convert_to_span_attrs``, which says with ``--enable-trace`` what the span of a whole request has.
Without them ``meta_info`` would have a list of reports, which streams with ``--incremental-streaming-output`` cut off,
the OpenAI endpoints would have none, and neither would spans.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from sgl_flowprefill.answers import REPORT_KEY
from sgl_flowprefill.patches.base import expect

META_INFO: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info"
SPAN: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager.convert_to_span_attrs"
METADATA: Final = (
    "sglang.srt.entrypoints.openai.serving_completions.build_endpoint_weight_version_metadata",
    "sglang.srt.entrypoints.openai.serving_chat.build_endpoint_weight_version_metadata",
)
STREAMS: Final = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._generate_completion_stream",
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream",
)
RESPONSE: Final = "sglang.srt.entrypoints.openai.protocol.ResponsesResponse.from_request"
RESPONSES: Final = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._generate_with_builtin_tools"
REPORT: Final = "flowprefill_report"
"""Attribute of SGLang's request object: what the last event of its answer says."""
IN_LAST_EVENT: Final = '"finish_reason":"'
"""What only the last event of a choice has: within text, quotes are escaped."""
EVENT: Final = "data: {"

_of_response: ContextVar[Any] = ContextVar("flowprefill_of_response", default=None)
"""The request object of the answer of /v1/responses that is being made; of several, behind tools, the first one."""


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("answer_report")
    HookRegistry.register(META_INFO, add_report, HookType.AROUND)
    HookRegistry.register(SPAN, add_to_span, HookType.AFTER)
    for target in METADATA:
        HookRegistry.register(target, _add_metadata, HookType.AFTER)
    for target in STREAMS:
        HookRegistry.register(target, report_in_stream, HookType.AROUND)
    HookRegistry.register(RESPONSES, note_request, HookType.BEFORE)
    HookRegistry.register(RESPONSE, add_to_response, HookType.AFTER)


def add_report(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: Mapping[str, Any],
    index: int,
    finish_reason: Mapping[str, Any] | None,
) -> None:
    """The hook where ``meta_info`` is made: a report is one object, and the last event's alone."""
    reports = customized_info.get(REPORT_KEY)
    if reports is None:
        original(manager, meta_info, state, customized_info, index, finish_reason)
        return
    others = {key: values for key, values in customized_info.items() if key != REPORT_KEY}
    if others:
        original(manager, meta_info, state, others, index, finish_reason)
    if reports[index]:
        meta_info[REPORT_KEY] = reports[index][0]
        setattr(state.obj, REPORT, reports[index][0])


def add_to_span(attributes: dict[str, Any], manager: Any, state: Any, *answer: Any) -> dict[str, Any]:
    """The attributes of a request's span, with its report; what is not known is left out."""
    told = getattr(state.obj, REPORT, {})
    return attributes | {f"{REPORT_KEY}.{name}": value for name, value in told.items() if value is not None}


def _add_metadata(metadata: dict[str, Any], meta_info: Mapping[str, Any]) -> dict[str, Any]:
    told = meta_info.get(REPORT_KEY)
    return metadata if told is None else metadata | {REPORT_KEY: told}


async def report_in_stream(
    original: Callable[..., AsyncGenerator[str, None]], handler: Any, adapted_request: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[str, None]:
    async for event in original(handler, adapted_request, *args, **kwargs):
        told = _told(adapted_request)
        yield event if told is None else with_metadata(event, told)


def _told(request: Any) -> Mapping[str, Any] | None:
    """What was told of a request object; where it has a list of one prompt, that is told of the prompt."""
    if not getattr(request, "is_single", True) and request.batch_size == 1:
        request = request[0]
    told: Mapping[str, Any] | None = getattr(request, REPORT, None)
    return told


def note_request(handler: Any, request_id: str, prompt: Any, adapted_request: Any, *args: Any, **kwargs: Any) -> None:
    """The hook where an answer of /v1/responses begins."""
    _of_response.set(adapted_request)


def add_to_response(response: Any, *args: Any, **kwargs: Any) -> Any:
    """The hook where an answer of /v1/responses is made: a report that is there is a text, as all ``metadata`` are."""
    told = _told(_of_response.get())
    if told is not None:
        response.metadata = {**(response.metadata or {}), REPORT_KEY: json.dumps(told)}
    return response


def with_metadata(event: str, told: Mapping[str, Any]) -> str:
    """The ``event`` of a stream, with what is ``told`` of its request if it is the last one with a choice."""
    if IN_LAST_EVENT not in event or not event.startswith(EVENT):
        return event
    return f'{EVENT}"metadata":{json.dumps({REPORT_KEY: told})},{event.removeprefix(EVENT)}'
