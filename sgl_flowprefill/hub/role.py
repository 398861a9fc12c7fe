"""What the hub asks of the engine that it drives: SGLang's scheduler as one kind of server, or a simulated one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from sgl_flowprefill.hub.task import DecodeStep, PrefillTask
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import PrefillShape


class Arrival(NamedTuple):
    """A request that can be started from now on."""

    req: Any
    """The role's own: SGLang's Req."""
    prompt: Sequence[int]
    shape: PrefillShape
    """New and cached tokens of the request, by the prefix that is cached now."""
    received_s: float
    deadline_s: float
    readable_s: float
    """When this process could first have read that the request can be run."""
    logprob_rows: int = 0
    """Tokens of its prompt whose log probabilities are asked for."""
    retracted: bool = False
    """Whether it was a stream and has part of its answer: it starts before all other requests."""
    objective: Objective | None = None
    """What the request is promised, of an engine that says so."""
    number: int | None = None
    """Its number (``WaitingRequest.number``), if a prefill of it has begun before, which was given back."""
    dp_rank: int = 0
    """The part of the engine that computes it, of several that compute at the same time (``Work.dp_ranks``)."""

    @property
    def was_given_back(self) -> bool:
        """Whether a prefill of it has begun before, which was given back."""
        return self.number is not None

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has been computed for the request."""
        return not (self.retracted or self.was_given_back)


class Role(Protocol):
    """An engine, as one kind of server."""

    @property
    def is_exiting(self) -> bool:
        """Whether the loop ends."""

    @property
    def is_paused(self) -> bool:
        """Whether nothing may run."""

    def take_news(self, stalls_due: bool) -> bool:
        """Take what has happened since the last turn. Whether KV cache has been freed.

        ``stalls_due``: it is time to look for what sends no news, such as a decode server that is gone.
        """

    def arrived(self) -> Iterable[Arrival]:
        """The requests that can be started since the last turn. Asked when abandoned tasks have been dropped."""

    def waiting(self) -> Collection[Any]:
        """The requests that ``arrived`` has told of and that can still be started; the hub forgets all other requests.

        A request is not among them before ``arrived`` has told of it: where they are as many as the hub knows, the hub
        takes them for the same.
        """

    def abandoned(self, live: Sequence[PrefillTask]) -> Sequence[PrefillTask]:
        """The ``live`` tasks that nobody waits for any more."""

    def match(self, req: Any) -> PrefillShape:
        """Match the prompt of ``req``, which waits, with the cached prefixes again: its new and cached tokens now."""

    def make_batch(self, reqs: Sequence[Any]) -> Any | None:
        """A batch of ``reqs`` in their order, with KV cache for all that it computes; of the first of them alone where
        there is none for the others, and None where there is none for the first.
        """

    def requests(self, batch: Any) -> Sequence[Any]:
        """The requests of ``batch``, in its order."""

    def shapes(self, batch: Any) -> Sequence[PrefillShape]:
        """What ``batch`` computes, with the cached prefixes that its admission found."""

    def switch_to(self, task: PrefillTask) -> None:
        """``task`` runs next."""

    def forward(self, batch: Any) -> Any:
        """The forward pass over ``batch``. Called in the greenlet of its task."""

    def finish(self, task: PrefillTask) -> None:
        """Process the result of ``task``, which is on the host: hand over its KV cache, and answer."""

    def drop(self, task: PrefillTask) -> None:
        """Free what ``task`` holds, whose forward pass has been unwound, and answer its requests: all have been given
        up, or it has failed (``task.failure``).
        """

    def rest(self) -> bool:
        """Housekeeping while nothing can run. Whether there is nothing that the server waits for either."""


class Decoder(Protocol):
    """The decode steps of an engine that has streams."""

    def step(self) -> DecodeStep | None:
        """Queue one forward pass that gives every stream its next token. Tasks that have finished join before it. None
        if no stream is left.

        Until it has ended the hub asks for one other at most, and only if it ``can_step_ahead``; without that the
        streams that it computes stay as they are. Raises StepOutOfMemory where the device has no memory for it: the
        next call runs the same step again.
        """

    def can_step_ahead(self) -> bool:
        """Whether another step may be queued behind the one in flight: nothing that it computes depends on what the
        host does with the result of that one, no stream is known to end with it while requests wait, which may start
        then, and streams are left for it. What it computes for streams that end with the result is thrown away.
        """
        return False

    def finish_step(self, step: DecodeStep) -> None:
        """Process the result of ``step``, which is on the host: answer, and end the streams that are over."""

    def missing_tokens(self) -> int:
        """Tokens of KV cache that the next step lacks; zero or less where it has them."""

    def give_back(self, task: PrefillTask) -> None:
        """Free what ``task`` holds, whose forward pass has been unwound: its requests wait again."""


class NoStreams(Decoder):
    """The decode steps of an engine without streams: a policy that knows of none asks for no step."""

    def step(self) -> DecodeStep | None:
        raise NotImplementedError("an engine without streams was asked for a decode step: give its hub a decoder")

    def finish_step(self, step: DecodeStep) -> None:
        raise NotImplementedError("an engine without streams has run a decode step: give its hub a decoder")

    def missing_tokens(self) -> int:
        return 0

    def give_back(self, task: PrefillTask) -> None:
        raise NotImplementedError("an engine without streams was asked for KV cache: give its hub a decoder")
