"""Decode steps beside prefills: when the next one has to start, what the steps take from prefills, and their margin.

A stream is a request that has its first token. All streams get their next token in one step, so the steps are a
periodic job: its period is the tightest time between tokens (TBT) that a stream asks for. A step starts as late as that
allows, because then it serves the most streams for its fixed cost. No torch, no SGLang, no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, runtime_checkable

MARGIN_QUANTILE: Final = 0.998
"""Share of steps that shall end in time, of those that can: an answer of 300 tokens may have three late ones."""
MARGIN_FACTOR: Final = 1.2
"""Multiple of that quantile that is planned with: a short answer may have no late token, and those of a step are late
together."""
MARGIN_STEPS: Final = 1000
"""Steps by which the margin is judged, the last ones."""
FIRST_MARGIN_S: Final = 0.01
"""The margin before any step has been seen, which counts as one step."""
MARGIN_OF_TBT: Final = 0.5
"""Share of the tightest TBT that the margin may take at most."""
LONGEST_GAP_S: Final = 10.0
"""The laxest objective that steps are planned by: a stream holds KV cache while it waits for a token, and prompts may
never stop coming.
"""
CORRECTED_BY: Final = 8
"""Steps over which the step model is corrected by those that were measured."""
MOST_BESIDE: Final = 2.0
"""Multiple of a step over the longest stream and one other that steps may take where that one alone is too long for an
objective.
"""
STALLED: Final = 4.0
"""Multiple of the prediction beyond which something else has held a step up: it corrects as one that took so long."""


@dataclass(slots=True, eq=False)
class Stream:
    """A request that has its first token and waits for others."""

    tbt_s: float
    """Objective for the time between its tokens."""
    context_tokens: int
    """Tokens of its prompt and its answer when it joined."""
    joined_s: float
    """When its last token before it joined had come."""
    dp_rank: int = 0
    """The part of the engine that computes it (``hub.work.Work.dp_ranks``)."""
    joined_at: int = field(default=0, init=False)
    """Steps that had begun when it joined."""


class Joiner(NamedTuple):
    """A request that has no token yet and will be a stream."""

    tbt_s: float
    """Objective for the time between its tokens."""
    context_tokens: int
    """Tokens of its prompt."""


class StepModel(Protocol):
    """Predicts how long a decode step takes."""

    def predict_s(self, requests: int, context_tokens: int) -> float:
        """Seconds of a step over ``requests`` streams that have ``context_tokens`` together."""


@runtime_checkable
class LearningStepModel(StepModel, Protocol):
    """A step model that learns from the steps that run."""

    def observe(self, requests: int, context_tokens: int, measured_s: float) -> None:
        """A step over ``requests`` streams that have ``context_tokens`` together has taken ``measured_s``."""


class NoSteps:
    """The step model of a server without streams."""

    def predict_s(self, requests: int, context_tokens: int) -> float:
        return 0.0


@dataclass(frozen=True)
class DecodeLimits:
    """What steps may take, and how they are planned."""

    max_share: float = 0.9
    """Share of the time while prefills could run that steps may take; prefills get the rest, whatever streams ask."""
    margin_s: float | None = None
    """How much earlier than needed a step starts; None: as much as the lateness of the last steps asks for."""
    charged: bool = True
    """Whether the prefill policy plans with the time that steps will take."""
    ahead: bool = False
    """Whether steps go before the tasks that have started while KV cache is short for the request that would win."""

    def __post_init__(self) -> None:
        if not 0.0 < self.max_share < 1.0:
            raise ValueError(f"steps may take a share between 0 and 1 of the time, not {self.max_share}: 0.9 is usual")
        if self.margin_s is not None and self.margin_s < 0:
            raise ValueError(f"a margin of {self.margin_s} s is negative: give seconds, or None to have it learned")


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """What steps take from prefills from now on, if streams stay as they are."""

    step_s: float = 0.0
    period_s: float = math.inf
    """From the start of a step to the start of the next while prefills run."""
    start_by_s: float = math.inf
    """When the next step has to start."""

    def taken_s(self, now_s: float, within_s: float) -> float:
        """Time that steps take of the next ``within_s``, if each starts when it has to."""
        after_first_s = within_s - max(0.0, self.start_by_s - now_s)
        if after_first_s <= 0.0:
            return 0.0
        steps, rest_s = divmod(after_first_s, self.period_s)
        return steps * self.step_s + min(self.step_s, rest_s)


NO_LOAD: Final = DecodeLoad()


class Streams:
    """The streams of a server, summed up: an event costs as much however many there are."""

    def __init__(self) -> None:
        self.requests = 0
        self.last_step_s = -math.inf
        """When the last step ended."""
        self._begun = 0
        """Steps that have begun."""
        self._ended = 0
        """Steps that have ended: all that have begun, but for one that runs, and one that is queued behind it."""
        self._stepped: Counter[float] = Counter()
        """Objectives of the streams that the last step served, with how many have each."""
        self._joined: list[Stream] = []
        """Streams that no step has served yet."""
        self._requests_at: Counter[int] = Counter()
        self._context_tokens_at: Counter[int] = Counter()
        """The streams of each rank, and the tokens that these have together."""
        self._lengths: list[int] = []
        """Of each stream, its context less the steps that had begun when it joined: these stay in order as all grow."""

    def join(self, stream: Stream) -> None:
        """``stream`` takes part in the next step that begins."""
        stream.joined_at = self._begun
        self.requests += 1
        self._requests_at[stream.dp_rank] += 1
        self._context_tokens_at[stream.dp_rank] += stream.context_tokens
        insort(self._lengths, _length(stream))
        self._joined.append(stream)

    def leave(self, stream: Stream) -> None:
        """``stream`` is over, or is retracted."""
        self.requests -= 1
        self._requests_at[stream.dp_rank] -= 1
        self._context_tokens_at[stream.dp_rank] -= self.context_of(stream)
        del self._lengths[bisect_left(self._lengths, _length(stream))]
        if stream.joined_at >= self._ended:
            self._joined.remove(stream)
        else:
            self._stepped[stream.tbt_s] -= 1
            if not self._stepped[stream.tbt_s]:
                del self._stepped[stream.tbt_s]

    def begin_step(self) -> None:
        """A step over the streams of now begins."""
        self._begun += 1

    def late_tokens(self, end_s: float) -> tuple[int, int]:
        """How many tokens the step that runs computes, and how many of them are later than their objectives say if it
        ends at ``end_s``.
        """
        joined = [stream for stream in self._joined if stream.joined_at <= self._ended]
        gap_s = end_s - self.last_step_s
        late = sum(count for tbt_s, count in self._stepped.items() if gap_s > tbt_s)
        late += sum(end_s - stream.joined_s > stream.tbt_s for stream in joined)
        return self._stepped.total() + len(joined), late

    def stepped(self, end_s: float) -> None:
        """The step that runs has ended: the streams with which it began have got a token at ``end_s``."""
        self._ended += 1
        self.last_step_s = end_s
        late = [stream for stream in self._joined if stream.joined_at >= self._ended]
        self._context_tokens_at.update(self._requests_at)
        self._context_tokens_at.subtract(stream.dp_rank for stream in late)
        self._stepped.update(stream.tbt_s for stream in self._joined if stream.joined_at < self._ended)
        self._joined = late

    def context_of(self, stream: Stream) -> int:
        """Tokens of its prompt and its answer by now."""
        return stream.context_tokens + max(0, self._ended - stream.joined_at)

    def last_token_s(self, stream: Stream) -> float:
        """When its last token came."""
        return self.last_step_s if stream.joined_at < self._ended else stream.joined_s

    @property
    def widest(self) -> int:
        """The most streams of one place: all places compute a step together, which takes what that of these does."""
        return max(self._requests_at.values(), default=0)

    @property
    def context_tokens(self) -> int:
        """The most tokens that the streams of one place have together."""
        return max(self._context_tokens_at.values(), default=0)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the stream that has most, but for those of a step or two that it did not take part in."""
        return self._lengths[-1] + self._ended if self._lengths else 0

    @property
    def fewest_served(self) -> int:
        """Streams that a step has served, at the place that has the fewest of those that have any streams."""
        joined = Counter(stream.dp_rank for stream in self._joined)
        return min((count - joined[place] for place, count in self._requests_at.items() if count), default=0)

    def start_by_s(self, lead_s: float) -> float:
        """When the next step has to start if it may take ``lead_s``: so that the first of its tokens that is due comes
        in time, but not before the one that precedes it. Infinity without streams.
        """
        last_tokens = [(stream.joined_s, stream.tbt_s) for stream in self._joined]
        if self._stepped:
            last_tokens.append((self.last_step_s, min(self._stepped)))
        starts_s = (last_s + max(0.0, min(tbt_s, LONGEST_GAP_S) - lead_s) for last_s, tbt_s in last_tokens)
        return min(starts_s, default=math.inf)

    def tightest_s(self, at_least_s: float = 0.0) -> float:
        """The tightest objective of those that are ``at_least_s``, each LONGEST_GAP_S at most; infinity without any."""
        objectives = [*self._stepped, *(stream.tbt_s for stream in self._joined)]
        planned_s = (min(tbt_s, LONGEST_GAP_S) for tbt_s in objectives)
        return min((tbt_s for tbt_s in planned_s if tbt_s >= at_least_s), default=math.inf)


def _length(stream: Stream) -> int:
    return stream.context_tokens - stream.joined_at


class Margin:
    """How much earlier than needed a step has to start, so that MARGIN_QUANTILE of them end in time.

    A step ends late by the sum of what held up its start and what it took more than predicted. The margin is a high
    quantile of that sum, not the sum of two quantiles. Steps that no margin would have brought in time stay out of it
    while they are the fewer: a pause, other weights, or an image encoder that runs whole must not cost prefills the
    time of earlier steps.
    """

    def __init__(self, first_s: float = FIRST_MARGIN_S) -> None:
        self._last_s = deque([first_s])
        self._sorted_s = [first_s]

    def observe(self, overrun_s: float) -> None:
        """A step ended ``overrun_s`` later than it would have if it had started and run as planned."""
        self._last_s.append(overrun_s)
        insort(self._sorted_s, overrun_s)
        if len(self._last_s) > MARGIN_STEPS:
            del self._sorted_s[bisect_left(self._sorted_s, self._last_s.popleft())]

    def value_s(self, most_s: float = math.inf) -> float:
        """The margin, where it may be ``most_s``: by the steps that ended no later than that; all of it, if fewer than
        half of them did, for an engine whose prefills stop late.
        """
        in_time = bisect_right(self._sorted_s, most_s)
        if 2 * in_time < len(self._sorted_s):
            return most_s
        place = min(int(MARGIN_QUANTILE * in_time), in_time - 1)
        return min(most_s, max(0.0, MARGIN_FACTOR * self._sorted_s[place]))


class CorrectedSteps:
    """A step model, corrected by the steps that were measured."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._learning = model if isinstance(model, LearningStepModel) else None
        self.slowdown = 1.0

    def predict_s(self, requests: int, context_tokens: int) -> float:
        return self.slowdown * self._model.predict_s(requests, context_tokens)

    def observe(self, requests: int, context_tokens: int, measured_s: float) -> None:
        """A step over ``requests`` streams has taken ``measured_s``."""
        predicted_s = self._model.predict_s(requests, context_tokens)
        slowdown = min(measured_s / predicted_s, STALLED * self.slowdown)
        self.slowdown += (slowdown - self.slowdown) / CORRECTED_BY
        if self._learning is not None:
            self._learning.observe(requests, context_tokens, measured_s)
            # Whatever it has learned, steps like this one are predicted as they were.
            self.slowdown *= predicted_s / self._model.predict_s(requests, context_tokens)


def decode_load(streams: Streams, model: StepModel, limits: DecodeLimits, margin_s: float) -> DecodeLoad:
    """What the steps of ``streams`` take, and when the next one has to start.

    It starts so that it ends ``margin_s`` before the first token is due, but no earlier than leaves prefills their
    share of the time since the last step, and not before a token that precedes one of its own: an objective that no
    step can keep makes none late.
    """
    if not streams.requests:
        return NO_LOAD
    step_s = model.predict_s(streams.widest, streams.context_tokens)
    least_period_s = step_s / limits.max_share
    rested_s = streams.last_step_s + least_period_s - step_s
    return DecodeLoad(
        step_s,
        period_s=max(streams.tightest_s() - margin_s, least_period_s),
        start_by_s=max(streams.start_by_s(margin_s + step_s), rested_s),
    )


def may_join(
    streams: Streams,
    requests: int,
    tokens: int,
    model: StepModel,
    limits: DecodeLimits,
    joiners: Sequence[Joiner] = (),
    is_waited_for: bool = False,
) -> bool:
    """Whether ``requests`` with ``tokens`` in all, those of live tasks among them, may join the streams of a place.

    A step over all must fit the tightest objective of the streams and leave prefills their share. A step over the
    streams and the ``joiners``, which are the new ones of these requests, must fit theirs, too: they wait for streams
    to end, but not for prefills. Objectives that this server would miss with one stream alone bar nobody, nor does that
    of a joiner whose own prompt is too long for it: it would be let in beside nobody. So an empty server lets in any
    single request.

    ``is_waited_for``: nobody else starts before these requests do. Then an objective bars nobody either for which a
    step over the longest stream is too long by itself, or with any other one: it is missed until that stream ends,
    or the requests would wait for just that. Steps may take MOST_BESIDE times as long as that one then; beside one
    stream alone, a request starts however long it is.
    """
    step_s = model.predict_s(streams.widest + requests, streams.context_tokens + tokens)
    if step_s <= 0.0:
        return True  # nothing is decoded here
    bound_s = streams.tightest_s(at_least_s=model.predict_s(1, 0) / limits.max_share)
    unavoidable_s = model.predict_s(2, streams.longest_tokens) / limits.max_share
    if is_waited_for and bound_s < unavoidable_s:
        most_s = MOST_BESIDE * unavoidable_s if streams.widest + requests > 2 else math.inf
        bound_s = min(most_s, streams.tightest_s(at_least_s=unavoidable_s))
    if step_s > limits.max_share * bound_s:
        return False
    new_tokens = sum(one.context_tokens for one in joiners)
    step_s = model.predict_s(streams.widest + min(len(joiners), requests), streams.context_tokens + new_tokens)
    too_tight = [one for one in joiners if step_s > limits.max_share * one.tbt_s]
    return not any(model.predict_s(1, one.context_tokens) <= limits.max_share * one.tbt_s for one in too_tight)
