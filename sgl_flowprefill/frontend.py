"""SGLang frontend programs on a FlowPrefill cluster: an endpoint whose requests carry a TTFT objective."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.ir import SglSamplingParams

from sgl_flowprefill.slo import SLO_KEY, TBT_KEY, objective_s

NO_IMAGES = SimpleNamespace(images_=[])
"""In place of a program's state, where there is none."""


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


class Endpoint(RuntimeEndpoint):
    """``sgl.RuntimeEndpoint`` for a unified server or the gateway, which takes one prompt a request: ``sgl.select``
    sends its choices side by side.
    """

    def __init__(
        self,
        base_url: str,
        *args: Any,
        ttft_slo: float | None = None,
        tbt_slo: float | None = None,
        **kwargs: Any,
    ) -> None:
        """``ttft_slo`` is the objective in seconds of every request for its first token, ``tbt_slo`` for each token
        after the one before, which only a unified server reads; without one the server's default holds. The rest is as
        for ``sgl.RuntimeEndpoint``. Raises SloError for an objective that is no positive number.
        """
        self._ttft_slo = _checked(SLO_KEY, ttft_slo)
        self._tbt_slo = _checked(TBT_KEY, tbt_slo)
        super().__init__(base_url, *args, **kwargs)

    def with_ttft_slo(self, ttft_slo: float | None) -> Self:
        """The same endpoint with another objective, as the ``backend`` of one ``run`` or ``run_batch``."""
        other = copy.copy(self)
        other._ttft_slo = _checked(SLO_KEY, ttft_slo)
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
        self._generate_http_request(NO_IMAGES, _prefill_only(prefix_str))

    def commit_lazy_operations(self, s: Any) -> None:
        self._generate_http_request(s, _prefill_only(s.text_))

    def fill_image(self, s: Any) -> None:
        self._generate_http_request(s, _prefill_only(s.text_))

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """What ``select`` sends: one body, or one with a list of prompts, for which the answers are a list."""
        data["sampling_params"]["custom_params"] = self._custom_params
        if data.get("return_logprob"):
            data.setdefault("logprob_start_len", 0)  # ``select`` wants all of a prompt's, and servers send none
        request = partial(super()._generate_http_request, s)
        name = "text" if "text" in data else "input_ids"
        prompts = data[name]
        if not (isinstance(prompts, list) and isinstance(prompts[0], str | list)):
            return request(data)
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(request, [{**data, name: prompt} for prompt in prompts]))

    def _with_objective(self, sampling_params: SglSamplingParams) -> _SamplingParams:
        return _SamplingParams(**vars(sampling_params), custom_params=self._custom_params)

    @property
    def _custom_params(self) -> dict[str, Any] | None:
        objectives = {SLO_KEY: self._ttft_slo, TBT_KEY: self._tbt_slo}
        return {key: value for key, value in objectives.items() if value is not None} or None


def _prefill_only(text: str) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 0}}


def _checked(key: str, slo: float | None) -> float | None:
    return None if slo is None else objective_s(key, {key: slo}, default_s=slo)
