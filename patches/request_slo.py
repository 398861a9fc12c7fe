"""Every request gets its objective in the process that receives it, wherever it comes in, and a wrong one is a 400.

Targets: ``TokenizerManager.generate_request`` and ``_create_tokenized_object``, where requests of all HTTP endpoints,
of gRPC and of ``sglang.Engine`` pass. The first sees the HTTP request with its headers, the second each prompt with its
tokens; there the objective is resolved and written into ``custom_params``, which travel to the scheduler. SGLang itself
ignores the ``custom_params`` at the top of a ``/generate``, Responses or Anthropic-style body.

A wrong objective raises a ValueError there, which is a 400 of /v1/completions and /v1/chat/completions, streams too.
Where an endpoint would make it an error event under status 200 it is looked for before: ``serve_generate_request`` for
/generate and /vertex_generate, ``create_responses`` and ``handle_messages`` for /v1/responses and /v1/messages.

The time of receipt, from which deadlines count, is the server's. SGLang would take that of a /generate body, and for a
request without one it would begin to count anew for each of ``n`` samples, once their prompt has been prefilled.
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
from sgl_flowprefill.slo import SloError, body_error, with_objective
from sgl_flowprefill.slo.asked import body_ask, header_asks
from sgl_flowprefill.slo.body import CUSTOM_PARAMS, all_custom_params
from sgl_flowprefill.slo.policy import PolicyError, SloPolicy
from sgl_flowprefill.slo.policy_file import PolicyFile
from sgl_flowprefill.slo.resolve import Ask, Request, Resolver

GENERATE: Final = "sglang.srt.entrypoints.http_server.serve_generate_request"
STREAMING: Final = (
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
    "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages",
)
"""The other endpoints that begin a stream before they look at its request. All end with the HTTP request as an
argument."""
REQUEST: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
PROMPT: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"


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
    HookRegistry.register(GENERATE, objectives.receive, HookType.AROUND)
    for target in STREAMING:
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

    async def receive(self, original: Callable[..., Awaitable[Any]], obj: Any, request: Any) -> Any:
        """The hook of /generate and /vertex_generate: the request is received now, whatever its body says."""
        obj.received_time = self.clock()
        return await self.check_first(original, obj, request)

    async def check_first(self, original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """The hook of endpoints that stream: a wrong objective is the API's own 400."""
        from fastapi import HTTPException

        try:
            body, from_http = await self._read(args[-1])
            error = body_error(body)
            if error is None:
                from_http.resolver.check([*map(body_ask, all_custom_params(body)), *from_http.header_asks])
        except SloError as wrong:
            error = str(wrong)
        if error is not None:
            raise HTTPException(status_code=400, detail=error)
        return await original(*args)

    async def read_request(
        self, original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any = None
    ) -> AsyncIterator[Any]:
        """The hook of every request: what its HTTP request says, and when it was received, goes to each of its prompts
        and samples.
        """
        if obj.received_time is None:
            obj.received_time = self.clock()
        _, from_http = await self._read(request)
        obj.sampling_params = with_objective(obj.sampling_params, from_http.custom_params)
        _FROM_HTTP.set(from_http)
        async with aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                yield answer

    def resolve(self, tokenized: Any, manager: Any, obj: Any, *_args: Any) -> None:
        """The hook of every prompt: its objective becomes part of what is sent to the scheduler. Raises SloError."""
        params, from_http = tokenized.sampling_params, _FROM_HTTP.get()
        resolver = from_http.resolver
        asks = (body_ask(params.custom_params), *from_http.header_asks)
        resolver.check(asks)
        priority = from_http.priority if obj.priority in NO_PRIORITY else obj.priority
        objective = resolver.resolve(
            Request(
                asks,
                priority,
                from_http.service_tier,
                from_http.model or manager.served_model_name,
                len(tokenized.input_ids or ()),
                from_http.api_key,
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
        key = headers.get("authorization") or headers.get("x-api-key") or ""
        return body, FromHttp(
            resolver,
            tuple(header_asks(headers, resolver.policy)),
            fields.get(CUSTOM_PARAMS),
            priority if isinstance(priority, int) and not isinstance(priority, bool) else None,
            tier if isinstance(tier, str) else None,
            model if isinstance(model, str) else "",
            blake2b(key.encode(), digest_size=16).hexdigest(),
        )
