"""The TTFT objective of a request: where clients put it, what is valid, and the sentence they read when it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

SLO_KEY: Final = "ttft_slo"


class SloError(ValueError):
    """The client's TTFT objective is not valid; the message is meant for the client."""


def ttft_slo_s(custom_params: Any, default_s: float) -> float:
    """TTFT objective in seconds of a request with SGLang's ``custom_params``; ``default_s`` where it names none.

    Raises SloError for a value that is no positive finite number.
    """
    if not isinstance(custom_params, Mapping) or custom_params.get(SLO_KEY) is None:
        return default_s
    value = custom_params[SLO_KEY]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise SloError(
            f'custom_params["{SLO_KEY}"] must be a positive, finite number of seconds, got {value!r}; '
            f'for example {{"custom_params": {{"{SLO_KEY}": 0.5}}}}.'
        )
    return float(value)


def body_error(body: Any) -> str | None:
    """What is wrong with the objective in a parsed ``/generate`` or OpenAI request body, or None.

    ``/generate`` carries ``custom_params`` inside ``sampling_params``, which is one mapping or one for each prompt;
    the OpenAI endpoints carry it at the top.
    """
    if not isinstance(body, Mapping):
        return None
    sampling = body.get("sampling_params")
    holders = [body, *(sampling if isinstance(sampling, list) else [sampling])]
    try:
        for holder in holders:
            if isinstance(holder, Mapping):
                ttft_slo_s(holder.get("custom_params"), default_s=1.0)
    except SloError as error:
        return str(error)
    return None
