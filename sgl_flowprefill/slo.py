"""The objectives of a request: where clients put them, what is valid, and the sentence they read when one is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

SLO_KEY: Final = "ttft_slo"
"""Seconds within which the client wants the first token."""
TBT_KEY: Final = "tbt_slo"
"""Seconds within which it wants each token after the one before."""
EXAMPLES: Final = {SLO_KEY: 0.5, TBT_KEY: 0.1}
LONGEST_SLO_S: Final = 1e9
"""Thirty years; a number beyond is a mistake, and an integer of more than 64 bits cannot travel to the scheduler."""
ECHOED_CHARACTERS: Final = 60
"""How much of an invalid value its refusal repeats."""


class SloError(ValueError):
    """The client's objective is not valid; the message is meant for the client."""


def ttft_slo_s(custom_params: Any, default_s: float) -> float:
    """TTFT objective in seconds of a request with SGLang's ``custom_params``; ``default_s`` where it names none.

    Raises SloError for a value that is no positive number, or one above LONGEST_SLO_S.
    """
    return objective_s(SLO_KEY, custom_params, default_s)


def objective_s(key: str, custom_params: Any, default_s: float) -> float:
    """As ``ttft_slo_s``, for the objective that clients put under ``key``."""
    if not isinstance(custom_params, Mapping) or custom_params.get(key) is None:
        return default_s
    value = custom_params[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LONGEST_SLO_S:
        raise SloError(
            f'custom_params["{key}"] must be a positive, finite number of seconds (at most {LONGEST_SLO_S:,.0f}), '
            f'got {_shortened(value)}; for example {{"custom_params": {{"{key}": {EXAMPLES[key]}}}}}.'
        )
    return float(value)


def with_objective(sampling_params: Any, custom_params: Any) -> Any:
    """``sampling_params`` of a ``/generate`` body with the objectives of the ``custom_params`` at its top.

    There may be one mapping, one for each prompt, or None. Raises SloError for an invalid objective, and for one at
    the top where ``sampling_params`` name another.
    """
    if isinstance(sampling_params, list):
        return [with_objective(one, custom_params) for one in sampling_params]
    if sampling_params is not None and not isinstance(sampling_params, Mapping):
        return sampling_params
    for key in EXAMPLES:
        sampling_params = _with_one(key, sampling_params, custom_params)
    return sampling_params


def _with_one(key: str, sampling_params: Mapping[str, Any] | None, custom_params: Any) -> Mapping[str, Any] | None:
    top_s = objective_s(key, custom_params, default_s=0.0)
    inner = (sampling_params or {}).get("custom_params")
    inner_s = objective_s(key, inner, default_s=top_s)
    if not top_s:
        return sampling_params
    if inner_s != top_s:
        raise SloError(
            f'custom_params["{key}"] is {top_s:g} at the top of the request, but {inner_s:g} in its '
            "sampling_params; name it once."
        )
    if inner is not None and not isinstance(inner, Mapping):
        raise SloError(
            f'custom_params["{key}"] at the top of the request cannot be added to its sampling_params, whose '
            f"custom_params are {_shortened(inner)}; make them an object, or name the objective there."
        )
    return {**(sampling_params or {}), "custom_params": {**(inner or {}), key: top_s}}


def body_error(body: Any) -> str | None:
    """What is wrong with the objective in a parsed request body, or None.

    ``/generate`` carries ``custom_params`` inside ``sampling_params`` or at the top; the OpenAI endpoints carry it at
    the top, and ``/vertex_generate`` has the ``sampling_params`` of all its instances in ``parameters``.
    """
    if not isinstance(body, Mapping):
        return None
    parameters = body.get("parameters")
    try:
        with_objective(body.get("sampling_params"), body.get("custom_params"))
        if isinstance(parameters, Mapping):
            with_objective(parameters.get("sampling_params"), None)
    except SloError as error:
        return str(error)
    return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= ECHOED_CHARACTERS else text[: ECHOED_CHARACTERS - 1] + "…"
