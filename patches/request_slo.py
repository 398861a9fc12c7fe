"""Every request gets its objective in the process that receives it, wherever it comes in, and a wrong one is a 400.

Targets: ``TokenizerManager.generate_request`` and ``_create_tokenized_object``, where requests of all HTTP endpoints,
of gRPC and of ``sglang.Engine`` pass. The first sees the HTTP request with its headers, the second each prompt with its
tokens; there the objective is resolved and written into ``custom_params``, which travel to the scheduler. SGLang itself
ignores the ``custom_params`` at the top of a ``/generate``, Responses, Anthropic- or Ollama-style body.

A wrong objective raises a ValueError there, which is a 400 of /v1/completions and /v1/chat/completions, streams too.
The endpoints that would make it an error event under status 200, or a 500, are targets as well, and look for it before.

The time of receipt, from which deadlines count, is the server's: those endpoints note it, as SGLang's handler of
OpenAI's does. SGLang would take that of a /generate body; on other endpoints it would count from after the prompt is
made, and for a request without one begin to count anew for each of ``n`` samples, once their prompt has been prefilled.
What is generated for an HTTP request after something else was answered (a further turn behind a tool, the next piece
of a long recording) counts from when it begins.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.deadline import NO_PRIORITY, resolver
from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.patches.endpoints import (
    GENERATE,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    RESPONSES,
    TRANSCRIPTIONS,
)
from sgl_flowprefill.slo import SloError, body_error, with_objective
from sgl_flowprefill.slo.asked import body_ask, header_asks
from sgl_flowprefill.slo.body import CUSTOM_PARAMS, all_custom_params
from sgl_flowprefill.slo.policy import PolicyError, SloPolicy
from sgl_flowprefill.slo.policy_file import PolicyFile
from sgl_flowprefill.slo.resolve import Ask, Request, Resolver

CHECKED_FIRST: Final = (GENERATE, RESPONSES, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE, TRANSCRIPTIONS)
"""The endpoints that begin a stream before they look at its request, or that know no 400."""
REQUEST: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
PROMPT: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
RECEIPT: Final = "flowprefill_receipt"
"""Attribute of an HTTP request's ``state``."""


@dataclass
class Receipt:
    """From when what is generated for an HTTP request counts."""

    received_s: float | None = None
    """When the HTTP request was received; None where SGLang notes that itself."""
    is_answered: bool = False
    """Whether something of an answer was there, so that what is generated next counts from when it begins."""


@dataclass(frozen=True)
class FromHttp:
    """What the HTTP request of a prompt says beside the prompt's own parameters, and by which policy it is read."""

    resolver: Resolver
    header_asks: tuple[Ask, ...] = ()
    custom_params: Any = None
    priority: int | None = None
    service_tier: str | None = None
    model: str = ""
    api_key: str = ""
    """A digest of it."""


_FROM_HTTP: Final[ContextVar[FromHttp]] = ContextVar("flowprefill_from_http")


def apply(config: FlowPrefillConfig) -> None:
    """Register the hooks. Raises SeamError when a target has changed, and ConfigError for a policy file with a mistake,
    which is looked after from now on.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("request_slo")
    objectives = Objectives(resolver(config))
    if config.slo_policy is not None:
        try:
            file = PolicyFile(config.slo_policy, objectives.use, config.priority_ttft_slo is not None)
        except PolicyError as error:
            raise ConfigError(f"--flowprefill-slo-policy: {error}") from None
        file.watch()
    for target in CHECKED_FIRST:
        HookRegistry.register(target, objectives.check_first, HookType.AROUND)
    HookRegistry.register(REQUEST, objectives.read_request, HookType.AROUND)
    HookRegistry.register(PROMPT, objectives.resolve, HookType.AFTER)


@dataclass
class Objectives:
    """The hooks that know the server's policy."""

    resolver: Resolver
    clock: Callable[[], float] = time.perf_counter
    """SGLang's clock for when a request was received."""

    def use(self, policy: SloPolicy) -> None:
        """Requests from now on go by ``policy``; those that have come go on by the one before."""
        self.resolver = replace(self.resolver, policy=policy)

    async def check_first(self, original: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """The hook of endpoints that are checked first: the request is received now, whatever its body says, and a
        wrong objective is the API's own 400.
        """
        from fastapi import HTTPException

        request = kwargs.get("raw_request", args[-1])
        receipt = _receipt(request)
        receipt.received_s = self.clock()
        try:
            body, from_http = await self._read(request)
            error = body_error(body)
            if error is None:
                from_http.resolver.check([*map(body_ask, all_custom_params(body)), *from_http.header_asks])
        except SloError as wrong:
            error = str(wrong)
        if error is not None:
            raise HTTPException(status_code=400, detail=error)
        return await original(*args, **kwargs)

    async def read_request(
        self, original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any = None
    ) -> AsyncIterator[Any]:
        """The hook of every request: what its HTTP request says, and when it was received, goes to each of its prompts
        and samples.
        """
        receipt = _receipt(request)
        if receipt.is_answered:
            obj.received_time = self.clock()
        elif receipt.received_s is not None:
            obj.received_time = receipt.received_s
        else:  # SGLang's gRPC gives its own requests the time of the wall clock, which is to come
            now_s = self.clock()
            obj.received_time = now_s if obj.received_time is None else min(obj.received_time, now_s)
        _, from_http = await self._read(request)
        if obj.priority not in NO_PRIORITY:
            from_http = replace(from_http, priority=obj.priority)
        obj.sampling_params = with_objective(obj.sampling_params, from_http.custom_params)
        _FROM_HTTP.set(from_http)
        async with aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                receipt.is_answered = True
                yield answer

    def resolve(self, tokenized: Any, manager: Any, obj: Any, *_args: Any) -> None:
        """The hook of every prompt: its objective becomes part of what is sent to the scheduler. Raises SloError."""
        params, from_http = tokenized.sampling_params, _FROM_HTTP.get()
        resolver = from_http.resolver
        if manager.server_args.disaggregation_mode == "decode":
            resolver = replace(resolver, counts=False)
        asks = (body_ask(params.custom_params), *from_http.header_asks)
        resolver.check(asks)
        objective = resolver.resolve(
            Request(
                asks,
                from_http.priority,
                from_http.service_tier,
                from_http.model or manager.served_model_name,
                len(tokenized.input_ids or getattr(tokenized, "input_embeds", None) or ()),
                from_http.api_key,
                default_priority=None if obj.priority in NO_PRIORITY else obj.priority,
            ),
            self.clock(),
        )
        params.custom_params = {**(params.custom_params or {}), **objective.to_custom_params()}

    async def _read(self, request: Any) -> tuple[Any, FromHttp]:
        """Body and meaning of an HTTP request; of none, or of one of gRPC, which has no body of its own, what there is.
        Raises SloError.
        """
        resolver = self.resolver
        body: Any = None
        if hasattr(request, "json"):
            try:
                body = await request.json()  # parsed before, and kept
            except (ValueError, RuntimeError):  # a form, which is read by now
                body = None
        headers = getattr(request, "headers", None) or {}
        fields = body if isinstance(body, Mapping) else {}
        priority, tier, model = fields.get("priority"), fields.get("service_tier"), fields.get("model")
        return body, FromHttp(
            resolver,
            tuple(header_asks(headers, resolver.policy)),
            fields.get(CUSTOM_PARAMS),
            priority if isinstance(priority, int) and not isinstance(priority, bool) else None,
            tier if isinstance(tier, str) else None,
            model if isinstance(model, str) else "",
            blake2b(_api_key(headers).encode(), digest_size=16).hexdigest(),
        )


def _receipt(request: Any) -> Receipt:
    """That of an HTTP request; of what has no ``state``, a new one."""
    state = getattr(request, "state", None)
    if state is None:
        return Receipt()
    receipt: Receipt | None = getattr(state, RECEIPT, None)
    if receipt is None:
        receipt = Receipt()
        setattr(state, RECEIPT, receipt)
    return receipt


def _api_key(headers: Mapping[str, str]) -> str:
    """The key that ``headers`` have, however they spell its scheme."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return token.strip() or scheme or headers.get("x-api-key", "").strip()
