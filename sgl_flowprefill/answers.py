"""What an answer says of its request: the report that clients find beside SGLang's own figures.

``python -m sgl_flowprefill.answers`` prints the table of docs/answers.md.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, get_type_hints

import msgspec
from msgspec import Meta, Struct

from sgl_flowprefill.carried import Carried
from sgl_flowprefill.events import rounded
from sgl_flowprefill.outcomes import Outcome
from sgl_flowprefill.slo import Objective

REPORT_KEY: Final = "flowprefill"
"""Where reports are: in ``meta_info`` of ``/generate``, and in ``metadata`` of the OpenAI endpoints."""


class Report(Struct, frozen=True, kw_only=True):
    """What a client is told. Times are seconds; what is not known is null."""

    ttft_slo_s: Annotated[float, Meta(description="the TTFT objective")]
    slo_class: Annotated[str, Meta(description="the class of the request")]
    slo_source: Annotated[str, Meta(description="where the objective came from, such as `body` or `default`")]
    met: Annotated[
        bool | None, Meta(description="whether the first token came in time; null if aborted before, or not valid")
    ]
    cause: Annotated[str | None, Meta(description="why it did not, one of the causes below; null where it did")] = None
    ttft_s: Annotated[
        float | None, Meta(description="from the request's receipt by the HTTP server to the first token, as below")
    ]
    predicted_s: Annotated[float | None, Meta(description="the prefill by itself, as predicted, with margin")] = None
    slack_at_admission_s: Annotated[
        float | None,
        Meta(description="time to spare when the request could first be run: until its deadline, less `predicted_s`"),
    ] = None
    waited_s: Annotated[float | None, Meta(description="from when it could be run until its prefill began")] = None
    suspensions: Annotated[
        int | None, Meta(description="how often its prefill was suspended for others, until its first token")
    ] = None
    suspended_s: Annotated[float | None, Meta(description="how long, together")] = None
    blocked_s: Annotated[
        float | None, Meta(description="from when it could be known that it goes first to when it took another's place")
    ] = None


def report(outcome: Outcome) -> dict[str, Any]:
    """What the answer says of a request with this ``outcome``, as JSON has it."""
    arrival = outcome.arrival
    told = Report(
        ttft_slo_s=arrival.ttft_slo_s,
        slo_class=arrival.slo_class,
        slo_source=arrival.slo_source,
        met=outcome.met,
        cause=None if outcome.cause is None else str(outcome.cause),
        ttft_s=rounded(outcome.ttft_s),
        predicted_s=rounded(outcome.predicted_s),
        slack_at_admission_s=rounded(outcome.slack_at_admission_s),
        waited_s=rounded(outcome.waited_s),
        suspensions=outcome.suspensions,
        suspended_s=round(outcome.suspended_s, 6),
        blocked_s=round(outcome.blocked_s, 6),
    )
    return msgspec.structs.asdict(told)


def to_carry(if_late: Outcome) -> Carried:
    """What a prefill server tells the decode server of a request that has this outcome if its first token is late."""
    assert if_late.cause is not None
    return Carried(
        cause_if_late=if_late.cause,
        ttft_slo_s=if_late.arrival.ttft_slo_s,
        predicted_s=if_late.predicted_s,
        slack_at_admission_s=if_late.slack_at_admission_s,
        waited_s=if_late.waited_s,
        suspended_s=if_late.suspended_s,
        blocked_s=if_late.blocked_s,
        suspensions=if_late.suspensions,
    )


def report_of_first_token(objective: Objective, ttft_s: float | None, carried: Carried | None) -> dict[str, Any]:
    """What a server says that has the first token, and of the prefill what was ``carried`` to it. What follows from an
    objective is not said where the prefill server had another one.
    """
    met = None if ttft_s is None else ttft_s <= objective.ttft_s
    told = Report(
        ttft_slo_s=objective.ttft_s,
        slo_class=objective.slo_class,
        slo_source=objective.slo_source,
        met=met,
        ttft_s=rounded(ttft_s),
    )
    if carried is not None:
        is_agreed = carried.ttft_slo_s is not None and math.isclose(carried.ttft_slo_s, objective.ttft_s, rel_tol=1e-6)
        told = msgspec.structs.replace(
            told,
            cause=str(carried.cause_if_late) if met is False and is_agreed else None,
            predicted_s=rounded(carried.predicted_s),
            slack_at_admission_s=rounded(carried.slack_at_admission_s) if is_agreed else None,
            waited_s=rounded(carried.waited_s),
            suspensions=carried.suspensions,
            suspended_s=rounded(carried.suspended_s),
            blocked_s=rounded(carried.blocked_s),
        )
    return msgspec.structs.asdict(told)


def table() -> str:
    """Every field of a report, as the table of docs/answers.md."""
    rows = ["| field | |", "| --- | --- |"]
    for name, hint in get_type_hints(Report, include_extras=True).items():
        [note] = [item.description for item in hint.__metadata__ if isinstance(item, Meta)]
        rows.append(f"| `{name}` | {note} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
