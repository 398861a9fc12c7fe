"""A system that is up: what measurements need of it, and servers of somebody else that take part as they are."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp

from sgl_flowprefill.bench.loadgen.calibrate import (
    REFERENCE_TTFT_S,
    CalibrationError,
    isolated_ttft_s,
    measure_isolated_ttft,
)
from sgl_flowprefill.bench.loadgen.client import Client, CompletionsApi, get_json
from sgl_flowprefill.bench.loadgen.decode_rate import measure_decode, measure_steps
from sgl_flowprefill.bench.loadgen.replay import Enough, OnProgress, ReplayRun, replay
from sgl_flowprefill.bench.simulator.measured import Engine
from sgl_flowprefill.bench.systems.system import EndpointSystem, System
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.profiling.steps import Step

Say = Callable[[str], None]

REST_FACTOR: Final = 2.0
"""An endpoint is at rest when an isolated request takes at most this many times what it took at first, or ..."""
REST_SLACK_S: Final = 0.05
"""... this much longer: more than a network or a busy client adds to a short time."""
REST_TIMEOUT_S: Final = 300.0
REST_POLL_S: Final = 0.5
FIRST_PROMPT: Final = list(range(1000, 1016))
"""Sent to find out what an endpoint takes."""
REFUSALS: Final = ("http 400", "http 422")


class Endpoint(Protocol):
    """A system that is up, as probes need it: ``serving.Served``, ``ForeignEndpoint``, or a model of one in tests."""

    def solo_ttft_s(self, prompts: PromptBuilder, say: Say | None = None) -> dict[int, float]:
        """Median TTFT (s) of isolated requests by prompt tokens."""

    def decode_tokens_per_s(self, prompts: PromptBuilder) -> float:
        """What decoding carries."""

    def decode_steps(self, prompts: PromptBuilder) -> Sequence[Step]:
        """Times of decode steps beside which nothing else runs, as clients see them."""

    def engine(self, prompts: PromptBuilder) -> Engine | None:
        """What the simulator needs to know; None for what cannot be simulated."""

    def replay(
        self,
        trace: Trace,
        prompts: PromptBuilder,
        on_progress: OnProgress | None = None,
        enough: Enough | None = None,
        slower: float = 0.0,
    ) -> ReplayRun:
        """Replay ``trace``, on servers that become slower by the share ``slower`` in the middle of the arrivals."""

    def come_to_rest(self) -> None:
        """End what is under way, so that the next run starts as the first one did."""

    def blocking_s(self, run: ReplayRun) -> list[float] | None:
        """Blocking time of each preemption of ``run``; None without preemption."""


class Reached(Endpoint, Protocol):
    """A system that is up, as commands have it."""

    @property
    def system(self) -> System: ...

    @property
    def client(self) -> Client: ...

    @property
    def event_log(self) -> Path | None:
        """FlowPrefill's event log; None without FlowPrefill."""

    def settings(self) -> Mapping[str, Any]:
        """What the servers say of the settings that matter to a comparison."""

    def suspend(self) -> None:
        """Stop the servers for now, if they are ours."""

    def resume(self) -> None:
        """Let them go on."""

    def beside(self) -> AbstractContextManager[None]:
        """A context in which this process leaves the prefill's CPUs alone."""


class EndpointError(ClusterError):
    """A foreign endpoint cannot be measured; the message has its URL and the remedy."""


@dataclass
class ForeignEndpoint:
    """Servers of somebody else behind an OpenAI-compatible API, measured by the same client.

    Their caches cannot be emptied. So after each ``come_to_rest`` prompts have other tokens, with the same lengths and
    the same shared prefixes: what an endpoint has cached is what the run itself has sent, as for servers of ours.
    """

    system: EndpointSystem
    client: Client
    about: Mapping[str, Any] = field(default_factory=dict)
    event_log: None = None
    _salt: int = field(default_factory=lambda: random.getrandbits(62))
    _at_rest: tuple[PromptBuilder, float] | None = None
    """Prompts and TTFT of the shortest isolated requests."""

    def solo_ttft_s(self, prompts: PromptBuilder, say: Say | None = None) -> dict[int, float]:
        with self._remedy():
            found_s = measure_isolated_ttft(self.client, self._unseen(prompts), say)
        self._at_rest = prompts, found_s[min(found_s)]
        return found_s

    def decode_tokens_per_s(self, prompts: PromptBuilder) -> float:
        try:
            return measure_decode(self.client, self._unseen(prompts))
        except CalibrationError as error:
            raise EndpointError(f"the answers of {self.client.url} could not be timed: {error}") from error

    def decode_steps(self, prompts: PromptBuilder) -> Sequence[Step]:
        with self._remedy():
            return measure_steps(self.client, self._unseen(prompts))

    def engine(self, prompts: PromptBuilder) -> None:
        return None

    def replay(
        self,
        trace: Trace,
        prompts: PromptBuilder,
        on_progress: OnProgress | None = None,
        enough: Enough | None = None,
        slower: float = 0.0,
    ) -> ReplayRun:
        if slower:
            raise EndpointError(
                f"{self.client.url} cannot be slowed down, as somebody else serves it: leave out --slower"
            )
        return replay(trace, self.client, self._unseen(prompts), on_progress, enough)

    def come_to_rest(self) -> None:
        """Wait until an isolated request is as fast as it was at first. Raises EndpointError when that takes too long.

        Streams that were broken off end with their connections.
        """
        self._salt = random.getrandbits(62)
        if self._at_rest is None:
            return
        prompts, first_s = self._at_rest
        tokens = min(REFERENCE_TTFT_S)
        give_up_s = time.monotonic() + REST_TIMEOUT_S
        while True:
            with self._remedy():
                now_s = isolated_ttft_s(self.client, self._unseen(prompts), tokens)
            if now_s <= max(REST_FACTOR * first_s, first_s + REST_SLACK_S):
                return
            if time.monotonic() > give_up_s:
                raise EndpointError(
                    f"{self.client.url} does not come to rest: {REST_TIMEOUT_S:.0f} s after a run a request of "
                    f"{tokens} tokens takes {now_s:.2f} s to its first token, at first it took {first_s:.2f} s: let "
                    "nobody else use the endpoint, and see whether it ends requests whose connection is closed"
                )
            time.sleep(REST_POLL_S)

    def blocking_s(self, run: ReplayRun) -> None:
        return None

    def settings(self) -> Mapping[str, Any]:
        return self.about

    def suspend(self) -> None:
        pass

    def resume(self) -> None:
        pass

    @contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def _unseen(self, prompts: PromptBuilder) -> PromptBuilder:
        return dataclasses.replace(prompts, seed=prompts.seed ^ self._salt)

    @contextmanager
    def _remedy(self) -> Iterator[None]:
        try:
            yield
        except CalibrationError as error:
            raise EndpointError(
                f"{error}; see the log of the server that --endpoint {self.system.name} names, and start it with room "
                f"for prompts of {max(REFERENCE_TTFT_S):,} tokens and their answers"
            ) from error


def connect(system: EndpointSystem, say: Say) -> ForeignEndpoint:
    """Find out what the endpoint serves and which prompts it takes. Raises EndpointError.

    vLLM, TensorRT-LLM and SGLang take token ids and end an answer at its length; other servers may take text only, or
    only what OpenAI documents.
    """
    card = _model_card(system)
    model = str(card["id"])
    about: dict[str, Any] = {"url": system.url, "model": model}
    about |= {name: card[name] for name in ("owned_by", "max_model_len") if name in card}
    _check_room(about, "isolated requests have", max(REFERENCE_TTFT_S) + 2)
    refused = {}
    for text in (False, True):
        for documented in (False, True):
            client = Client(system.url, CompletionsApi(model, text=text, documented=documented, told_slo=False))
            kind = f"{'text' if text else 'token ids'}, {'documented fields only' if documented else 'ignore_eos'}"
            error = asyncio.run(_first_error(client))
            if error is None:
                say(f"{system.url} serves {model} and takes {kind}")
                if text:
                    say("lengths of prompts are close to what the others get: a word for each token")
                if documented:
                    say("answers may end before their length")
                return ForeignEndpoint(system, client, about | {"requests": kind})
            if not error.startswith(REFUSALS):
                raise EndpointError(f"a request to {client.url}{client.api.path} failed: {error}; see the server's log")
            refused[kind] = error
    answers = "; ".join(f"{kind}: {error}" for kind, error in refused.items())
    raise EndpointError(
        f"{system.url}/v1/completions takes none of the requests that can be sent ({answers}): give --endpoint the URL "
        "of a server with OpenAI's completions API"
    )


def check_room(about: Mapping[str, Any], trace: Trace) -> None:
    """Raises EndpointError if an endpoint, by what is known ``about`` it, has too short a context for a request of
    ``trace``, which it would refuse.
    """
    longest_tokens = max((one.prompt_tokens + one.output_tokens for one in trace.requests), default=0)
    _check_room(about, f"requests of {trace.name} have", longest_tokens)


def _check_room(about: Mapping[str, Any], what: str, longest_tokens: int) -> None:
    limit_tokens = about.get("max_model_len")
    if isinstance(limit_tokens, int) and limit_tokens < longest_tokens:
        raise EndpointError(
            f"{about['url']} serves at most {limit_tokens:,} tokens of {about['model']}, and {what} up to "
            f"{longest_tokens:,}: start it with a longer context (vLLM: --max-model-len)"
        )


def _model_card(system: EndpointSystem) -> Mapping[str, Any]:
    url = f"{system.url}/v1/models"
    remedy = f"start the server, or correct --endpoint {system.name}={system.url}"
    try:
        models = asyncio.run(get_json(url)).get("data")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise EndpointError(f"{url} gives no list of models ({type(error).__name__}: {error}): {remedy}") from error
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise EndpointError(f"{url} lists no model: {remedy}")
    card: Mapping[str, Any] = models[0]
    return card


async def _first_error(client: Client) -> str | None:
    async with client.session() as session:
        return (await client.stream(session, client.api.body(FIRST_PROMPT, 1, None))).error
