"""One streamed request over HTTP: what its body looks like for each API, and when its tokens came.

The client shares a small machine with the servers that it measures, so bodies are serialised before a run and an event
of the stream is parsed only as far as its token count.
"""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import aiohttp
import orjson

JSON_HEADERS: Final = {"Content-Type": "application/json"}
ERROR_CHARS: Final = 300
READ_BUFFER_BYTES: Final = 1 << 20


@dataclass
class Outcome:
    """What came of one request; times are ``time.monotonic()`` seconds."""

    sent_s: float
    end_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    tbt_s: list[float] = field(default_factory=list)
    """Time between tokens, for each token after the first; tokens that came in one event share its time evenly."""
    tokens: int = 0
    prompt_tokens: int | None = None
    """Prompt tokens as the server counted them, if it said so."""
    cached_tokens: int | None = None
    retractions: int | None = None
    """How often the answer lost its KV cache to others, if the server said so."""
    error: str | None = None
    out_of_files: bool = False
    """Whether it failed because this process had as many files open as it may."""

    def saw_tokens(self, now_s: float, total_tokens: int) -> None:
        """Note that ``total_tokens`` of output had come at ``now_s``."""
        new_tokens = total_tokens - self.tokens
        if new_tokens <= 0:
            return
        if self.last_token_s is None:
            self.first_token_s = now_s
            self.tbt_s.extend([0.0] * (new_tokens - 1))
        else:
            self.tbt_s.extend([(now_s - self.last_token_s) / new_tokens] * new_tokens)
        self.last_token_s = now_s
        self.tokens = total_tokens


class Api(Protocol):
    """A kind of endpoint: its path, its request body and how an event of its stream is read."""

    @property
    def path(self) -> str:
        """Where requests are posted."""

    def body(
        self, prompt: list[int], output_tokens: int, ttft_slo_s: float | None, tbt_slo_s: float | None = None
    ) -> bytes:
        """The serialised request body; without objectives where they are None."""

    def read(self, event: dict[str, Any], now_s: float, outcome: Outcome) -> None:
        """Take an event of the stream that came at ``now_s`` into ``outcome``."""


@dataclass(frozen=True)
class GenerateApi:
    """SGLang's own /generate with token ids."""

    path: str = "/generate"
    with_priority: bool = False
    """Whether requests carry a priority, for SGLang's priority scheduling: the tighter the TTFT SLO, the higher."""

    def body(
        self, prompt: list[int], output_tokens: int, ttft_slo_s: float | None, tbt_slo_s: float | None = None
    ) -> bytes:
        sampling: dict[str, Any] = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        if ttft_slo_s is not None:
            sampling["custom_params"] = _objectives(ttft_slo_s, tbt_slo_s)
            if self.with_priority:
                body["priority"] = -round(ttft_slo_s * 1e3)
        return orjson.dumps(body)

    def read(self, event: dict[str, Any], now_s: float, outcome: Outcome) -> None:
        meta = event.get("meta_info", {})
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            outcome.error = f"aborted: {finish.get('message', '')}"[:ERROR_CHARS]
            return
        outcome.prompt_tokens = meta.get("prompt_tokens", outcome.prompt_tokens)
        outcome.cached_tokens = meta.get("cached_tokens", outcome.cached_tokens)
        outcome.retractions = meta.get("num_retractions", outcome.retractions)
        outcome.saw_tokens(now_s, meta.get("completion_tokens", outcome.tokens + 1))


@dataclass(frozen=True)
class CompletionsApi:
    """OpenAI's /v1/completions with token ids as the prompt, which SGLang, vLLM and TensorRT-LLM take."""

    model: str
    path: str = "/v1/completions"
    text: bool = False
    """Whether the prompt is words, for servers that take no token ids: its length in tokens is then only close."""
    documented: bool = False
    """Whether bodies have only what OpenAI documents, for servers that refuse other fields."""
    told_slo: bool = True
    """Whether bodies have the SLOs, a field that FlowPrefill alone reads; TensorRT-LLM refuses unknown ones."""

    def body(
        self, prompt: list[int], output_tokens: int, ttft_slo_s: float | None, tbt_slo_s: float | None = None
    ) -> bytes:
        options = _openai_options(ttft_slo_s if self.told_slo else None, tbt_slo_s, documented=self.documented)
        content = _words(prompt) if self.text else prompt
        return orjson.dumps({"model": self.model, "prompt": content, "max_tokens": output_tokens} | options)

    def read(self, event: dict[str, Any], now_s: float, outcome: Outcome) -> None:
        _read_openai(event, now_s, outcome)


@dataclass(frozen=True)
class ChatApi:
    """OpenAI's /v1/chat/completions; the prompt is words, so its length in tokens is only close to what was asked."""

    model: str
    path: str = "/v1/chat/completions"

    def body(
        self, prompt: list[int], output_tokens: int, ttft_slo_s: float | None, tbt_slo_s: float | None = None
    ) -> bytes:
        messages = [{"role": "user", "content": _words(prompt)}]
        options = _openai_options(ttft_slo_s, tbt_slo_s)
        return orjson.dumps({"model": self.model, "messages": messages, "max_tokens": output_tokens} | options)

    def read(self, event: dict[str, Any], now_s: float, outcome: Outcome) -> None:
        _read_openai(event, now_s, outcome)


TEXTS: Final = ("content", "reasoning_content", "reasoning")
"""Fields of a chat's text; reasoning has a field of its own where the server has a parser for it, in vLLM the last."""
WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Common English words, a single token in nearly every vocabulary."""


@dataclass(frozen=True)
class Client:
    """Streams requests to one endpoint. Use within one event loop; ``session`` makes its connections."""

    url: str
    api: Api
    timeout_s: float = 600.0

    def session(self) -> aiohttp.ClientSession:
        """A session without limits on connections or on the total time of a request."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=self.timeout_s),
            read_bufsize=READ_BUFFER_BYTES,
        )

    async def stream(self, session: aiohttp.ClientSession, body: bytes, outcome: Outcome | None = None) -> Outcome:
        """Send ``body`` and read its stream to the end. Never raises for what a server or network can do.

        A given ``outcome``, made when the request is sent, is filled in as the stream goes.
        """
        outcome = outcome or Outcome(sent_s=time.monotonic())
        try:
            async with session.post(self.url.rstrip("/") + self.api.path, data=body, headers=JSON_HEADERS) as response:
                if response.status != 200:
                    text = (await response.text())[:ERROR_CHARS]
                    outcome.error = f"http {response.status}: {text}"
                else:
                    await self._read_stream(response, outcome)
        except TimeoutError:
            outcome.error = f"timeout: nothing came for {self.timeout_s:g} s"
        except (aiohttp.ClientError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"[:ERROR_CHARS]
            outcome.out_of_files = isinstance(error, OSError) and error.errno == errno.EMFILE
        outcome.end_s = time.monotonic()
        return outcome

    async def _read_stream(self, response: aiohttp.ClientResponse, outcome: Outcome) -> None:
        finished = False
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            now_s = time.monotonic()
            data = line[5:].strip()
            if data == b"[DONE]":
                finished = True
                continue
            event = orjson.loads(data)
            if "error" in event:
                outcome.error = f"error in the stream: {event['error']}"[:ERROR_CHARS]
                return
            self.api.read(event, now_s, outcome)
            if outcome.error:
                return
        if not outcome.tokens:
            outcome.error = "the stream ended without a token"
        elif not finished:
            outcome.error = f"the stream broke off after {outcome.tokens} tokens"


APIS: Final[dict[str, Callable[[str], Api]]] = {
    "generate": lambda model: GenerateApi(),
    "completions": CompletionsApi,
    "chat": ChatApi,
}
"""Kinds of endpoint by name; each takes the model's name as the server knows it."""


async def get_json(url: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """GET a JSON object. Raises aiohttp.ClientError or TimeoutError."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
        session.get(url, raise_for_status=True) as response,
    ):
        answer = orjson.loads(await response.read())
        return answer if isinstance(answer, dict) else {}


def served_model(url: str) -> str:
    """The name under which the endpoint serves its model, or "default" if it does not say."""
    try:
        models = asyncio.run(get_json(url.rstrip("/") + "/v1/models"))
        return str(models["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError):
        return "default"


def _words(prompt: list[int]) -> str:
    return " ".join(WORDS[token % len(WORDS)] for token in prompt)


def _objectives(ttft_slo_s: float, tbt_slo_s: float | None) -> dict[str, float]:
    """What a request says of its objectives, which FlowPrefill reads; an infinite TBT objective is none."""
    return {"ttft_slo": ttft_slo_s} | ({} if tbt_slo_s is None or math.isinf(tbt_slo_s) else {"tbt_slo": tbt_slo_s})


def _openai_options(
    ttft_slo_s: float | None, tbt_slo_s: float | None = None, *, documented: bool = False
) -> dict[str, Any]:
    usage = {"include_usage": True} | ({} if documented else {"continuous_usage_stats": True})
    options: dict[str, Any] = {"temperature": 0, "stream": True, "stream_options": usage}
    if not documented:
        options["ignore_eos"] = True
    if ttft_slo_s is not None:
        options["custom_params"] = _objectives(ttft_slo_s, tbt_slo_s)
    return options


def _read_openai(event: dict[str, Any], now_s: float, outcome: Outcome) -> None:
    """Take an event into ``outcome``. Its usage counts tokens whose text is still to come, too; without usage an event
    with text is a token.
    """
    usage = event.get("usage") or {}
    outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", outcome.cached_tokens)
    choice = next(iter(event.get("choices") or []), None)
    tokens = usage.get("completion_tokens")
    if tokens is None:
        tokens = outcome.tokens + (1 if choice and _has_text(choice) else 0)
    if choice or outcome.tokens or tokens == 1:  # the last usage comes alone: it does not say when a first of many came
        outcome.saw_tokens(now_s, tokens)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or any(delta.get(name) for name in TEXTS))
