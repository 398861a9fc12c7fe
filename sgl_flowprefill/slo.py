"""The TTFT objective of a request: where clients put it, what is valid, and the sentence they read when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

SLO_KEY: Final = "ttft_slo"
LONGEST_SLO_S: Final = 1e9
"""Thirty years; a number beyond is a mistake, and an integer of more than 64 bits cannot travel to the scheduler."""
ECHOED_CHARACTERS: Final = 60
"""How much of an invalid value its refusal repeats."""


class SloError(ValueError):
    """The client's TTFT objective is not valid; the message is meant for the client."""


def ttft_slo_s(custom_params: Any, default_s: float) -> float:
    """TTFT objective in seconds of a request with SGLang's ``custom_params``; ``default_s`` where it names none.

    Raises SloError for a value that is no positive number, or one above LONGEST_SLO_S.
    """
    if not isinstance(custom_params, Mapping) or custom_params.get(SLO_KEY) is None:
        return default_s
    value = custom_params[SLO_KEY]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LONGEST_SLO_S:
        raise SloError(
            f'custom_params["{SLO_KEY}"] must be a positive, finite number of seconds (at most {LONGEST_SLO_S:,.0f}), '
            f'got {_shortened(value)}; for example {{"custom_params": {{"{SLO_KEY}": 0.5}}}}.'
        )
    return float(value)


def with_objective(sampling_params: Any, custom_params: Any) -> Any:
    """``sampling_params`` of a ``/generate`` body with the objective of the ``custom_params`` at its top.

    There may be one mapping, one for each prompt, or None. Raises SloError for an invalid objective, and for one at
    the top where ``sampling_params`` name another.
    """
    if isinstance(sampling_params, list):
        return [with_objective(one, custom_params) for one in sampling_params]
    if sampling_params is not None and not isinstance(sampling_params, Mapping):
        return sampling_params
    top_s = ttft_slo_s(custom_params, default_s=0.0)
    inner = (sampling_params or {}).get("custom_params")
    inner_s = ttft_slo_s(inner, default_s=top_s)
    if not top_s:
        return sampling_params
    if inner_s != top_s:
        raise SloError(
            f'custom_params["{SLO_KEY}"] is {top_s:g} at the top of the request, but {inner_s:g} in its '
            "sampling_params; name it once."
        )
    if inner is not None and not isinstance(inner, Mapping):
        raise SloError(
            f'custom_params["{SLO_KEY}"] at the top of the request cannot be added to its sampling_params, whose '
            f"custom_params are {_shortened(inner)}; make them an object, or name the objective there."
        )
    return {**(sampling_params or {}), "custom_params": {**(inner or {}), SLO_KEY: top_s}}


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
