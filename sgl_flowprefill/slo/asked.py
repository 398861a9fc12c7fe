"""What a client asks for in the body and the headers of its request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from sgl_flowprefill.slo.objective import (
    CLASS_NAME,
    LONGEST_SLO_S,
    SLO_KEY,
    TBT_KEY,
    SloError,
    check_object,
    class_name,
    is_sheddable,
    objective_s,
    shortened,
)
from sgl_flowprefill.slo.policy import SloPolicy
from sgl_flowprefill.slo.resolve import Ask

TTFT_HEADERS: Final = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
"""Milliseconds; the second is the older name, and counts where the first is not there."""
CLASS_HEADER: Final = "x-flowprefill-slo-class"
SMG_HEADER: Final = "X-SMG-Priority"


def body_ask(custom_params: Any) -> Ask:
    """What SGLang's ``custom_params`` ask for. Raises SloError for what is not valid."""
    check_object(custom_params)
    return Ask(
        "body",
        objective_s(SLO_KEY, custom_params),
        objective_s(TBT_KEY, custom_params),
        class_name(custom_params),
        is_sheddable(custom_params),
    )


def header_asks(headers: Mapping[str, str], policy: SloPolicy) -> Iterator[Ask]:
    """What ``headers``, whose names are compared without case, ask for. Raises SloError for what is not valid."""
    for name in TTFT_HEADERS:
        if (text := headers.get(name)) is not None:
            yield Ask(f"header {name}", ttft_s=_milliseconds(name, text) / 1e3)
    if (slo_class := headers.get(CLASS_HEADER)) is not None:
        if not CLASS_NAME.fullmatch(slo_class):
            raise SloError(f"The header {CLASS_HEADER} must be the name of a class, got {shortened(slo_class)}.")
        yield Ask(f"header {CLASS_HEADER}", slo_class=slo_class)
    if (priority := headers.get(SMG_HEADER)) is not None:
        yield Ask(f"header {SMG_HEADER}", slo_class=policy.of_smg_priority(priority.strip().lower()))


def _milliseconds(name: str, text: str) -> float:
    try:
        value_ms = float(text)
    except ValueError:
        value_ms = 0.0
    if not 0 < value_ms <= LONGEST_SLO_S * 1e3:
        raise SloError(
            f"The header {name} must be a positive, finite number of milliseconds "
            f"(at most {LONGEST_SLO_S * 1e3:,.0f}), got {shortened(text)}; for example {name}: 500."
        )
    return value_ms
