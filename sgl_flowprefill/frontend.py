"""SGLang frontend programs whose requests say when they need their first token.

    endpoint = SLORuntimeEndpoint("http://127.0.0.1:30000")
    with ttft_slo(0.3, tbt=0.05):
        state = program.run(question="…", backend=endpoint)

An objective holds for what is started inside its ``with``: ``run``, ``run_batch``, and in a program the branches of a
``fork``. SGLang executes a program in threads of its own, some of which know nothing of the context in which the
program was started. So the objective is bound when ``run`` or ``run_batch`` asks the backend for its ``endpoint``,
which they do in the caller's thread. For each program of a batch it is asked again, wherever the answers are read,
which changes nothing. A branch has a copy of the context of the thread that forked, and what was chosen there comes
first.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Self

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.ir import SglSamplingParams

from sgl_flowprefill.slo import SLO_KEY, TBT_KEY, objective_s

PREFIX_TTFT_SLO_S: Final = 60.0
"""Objective of requests without output, which have a prefix computed that requests with output will begin with."""
NO_IMAGES: Final = SimpleNamespace(images_=[])
"""In place of a program's state, where there is none."""


@dataclasses.dataclass(frozen=True)
class _Objective:
    """Seconds; None: the server's default."""

    ttft_s: float | None = None
    tbt_s: float | None = None

    def __post_init__(self) -> None:
        for key, value in self._values().items():
            objective_s(key, {key: value})

    def custom_params(self) -> dict[str, float] | None:
        """What a request with this objective carries."""
        return {key: value for key, value in self._values().items() if value is not None} or None

    def _values(self) -> dict[str, float | None]:
        return {SLO_KEY: self.ttft_s, TBT_KEY: self.tbt_s}


_chosen: ContextVar[_Objective | None] = ContextVar("objective of SGLang programs", default=None)


@contextmanager
def ttft_slo(ttft: float | None, tbt: float | None = None) -> Iterator[None]:
    """Give the programs that are started inside, and the branches that a program forks inside, an objective.

    Each of their requests wants its first token within ``ttft`` seconds, and each token after that within ``tbt``
    seconds of the one before, which only a unified server reads. None leaves either to the server's default. Threads
    and asyncio tasks have one each, so programs that run side by side do not see the objective of another. Raises
    SloError for an objective that is no positive number.
    """
    token = _chosen.set(_Objective(ttft, tbt))
    try:
        yield
    finally:
        _chosen.reset(token)


@dataclasses.dataclass
class _SamplingParams(SglSamplingParams):
    """A program's sampling parameters, and what SGLang's frontend has no field for."""

    custom_params: dict[str, Any] | None = None

    def to_srt_kwargs(self) -> dict[str, Any]:
        return {**super().to_srt_kwargs(), "custom_params": self.custom_params}


class _OfChoices(ChoicesSamplingMethod):
    """A way to choose that sees only the tokens of the choices. Scored tokens begin before them: with a token for which
    SGLang's servers have no log probability, at which two of SGLang's three ways stumble, and the prompt's last.
    """

    def __init__(self, method: ChoicesSamplingMethod, prompt: str) -> None:
        self._method = method
        self._prompt = prompt

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return bool(self._method.requires_unconditional_logprobs)

    def __call__(self, **scored: Any) -> ChoicesDecision:
        starts = [self._start(entries) for entries in scored["input_token_logprobs"]]
        for name in ("input_token_logprobs", "unconditional_token_logprobs"):
            if scored.get(name):
                scored[name] = [entries[start:] for entries, start in zip(scored[name], starts, strict=True)]
        return self._method(**scored)

    def _start(self, entries: Sequence[Any]) -> int:
        """Place of a choice's first token among ``entries`` (log probability, id, text); it may end the prompt too."""
        unscored = int(entries[0][0] is None)
        return unscored + (len(entries) > unscored + 1 and self._prompt.endswith(entries[unscored][-1]))


def _spoil_unscored(entries: Sequence[Any], prompt: str) -> None:
    """Change the text of a token without a log probability, which stands before the prompt's last, into no ending of
    the prompt: SGLang's ``select`` would take it for the last one, and count with its log probability.
    """
    if entries and entries[0][0] is None:
        entries[0][-1] = f"{prompt} and more"


class SLORuntimeEndpoint(RuntimeEndpoint):
    """``sgl.RuntimeEndpoint`` whose requests carry the objective of the ``with ttft_slo(…)`` that they are made in.

    For a unified server, or the gateway, which takes one prompt a request: ``sgl.select`` sends one for each of its
    choices, side by side.
    """

    def __init__(
        self,
        base_url: str,
        *args: Any,
        ttft_slo: float | None = None,
        tbt_slo: float | None = None,
        prefix_ttft_slo: float = PREFIX_TTFT_SLO_S,
        **kwargs: Any,
    ) -> None:
        """``ttft_slo`` and ``tbt_slo`` are the objectives in seconds of programs outside of any ``with ttft_slo(…)``;
        without them, the server's defaults hold. ``prefix_ttft_slo`` is that of the requests without output with which
        SGLang has a prefix cached before a fork or a batch, unless the program's own is laxer. The rest is as for
        ``sgl.RuntimeEndpoint``. Raises SloError for an objective that is no positive number.
        """
        self._bound = _Objective(ttft_slo, tbt_slo)
        self._is_of_run = False
        """Whether ``run`` or ``run_batch`` has asked for it."""
        self._around: _Objective | None = None
        """What was chosen around them, and counts for nothing but by what they have bound."""
        self._prefix = _Objective(prefix_ttft_slo)
        super().__init__(base_url, *args, **kwargs)

    @property
    def endpoint(self) -> Self:
        """This endpoint with the objective of the caller's context, for the threads that do not have that context.

        Called by SGLang when ``run`` or ``run_batch`` begins.
        """
        other = copy.copy(self)
        if not self._is_of_run:
            other._bound = self._objective
        other._is_of_run, other._around = True, _chosen.get()
        return other

    def generate(self, s: Any, sampling_params: SglSamplingParams) -> tuple[str, dict[str, Any]]:
        text, meta_info = super().generate(s, self._with_objective(sampling_params))
        return text, meta_info

    def generate_stream(self, s: Any, sampling_params: SglSamplingParams) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from super().generate_stream(s, self._with_objective(sampling_params))

    def select(
        self, s: Any, choices: list[str], temperature: float, choices_method: ChoicesSamplingMethod
    ) -> ChoicesDecision:
        return super().select(s, choices, temperature, _OfChoices(choices_method, s.text_))

    def cache_prefix(self, prefix_str: str) -> None:
        self._cache(NO_IMAGES, prefix_str)

    def commit_lazy_operations(self, s: Any) -> None:
        self._cache(s, s.text_)

    def fill_image(self, s: Any) -> None:
        self._cache(s, s.text_)

    def _cache(self, s: Any, text: str) -> None:
        """Have a prefix computed. Nobody reads a first token of it."""
        laxer = max(self._prefix, self._objective, key=lambda objective: objective.ttft_s or 0.0)
        params = {"max_new_tokens": 0, "custom_params": _Objective(laxer.ttft_s).custom_params()}
        super()._generate_http_request(s, {"text": text, "sampling_params": params})

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """What ``select`` sends: one body, or one with a list of prompts, for which the answers are a list.

        All of it is what the program waits for, the prompt without its choices too.
        """
        data["sampling_params"]["custom_params"] = self._objective.custom_params()
        is_scored = "logprob_start_len" in data
        if data.get("return_logprob"):
            data.setdefault("logprob_start_len", 0)  # ``select`` wants all of a prompt's, and servers send none
        request = partial(super()._generate_http_request, s)
        name = "text" if "text" in data else "input_ids"
        prompts = data[name]
        if not (isinstance(prompts, list) and isinstance(prompts[0], str | list)):
            return request(data)
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(request, [{**data, name: prompt} for prompt in prompts]))
        if is_scored:
            for answer in answers:
                _spoil_unscored(answer["meta_info"]["input_token_logprobs"], s.text_)
        return answers

    def _with_objective(self, sampling_params: SglSamplingParams) -> _SamplingParams:
        return _SamplingParams(**vars(sampling_params), custom_params=self._objective.custom_params())

    @property
    def _objective(self) -> _Objective:
        chosen = _chosen.get()
        return self._bound if chosen is None or chosen is self._around else chosen
