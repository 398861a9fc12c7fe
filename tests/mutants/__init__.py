"""Mutants: defects that are planted in a running engine, to show that the comparisons catch each of them.

``python -m tests.mutants`` plants one after the other, each in a process of its own, and says which comparison caught
it; first it runs the same rounds without any, which must pass. ``python -m tests.mutants NAME`` plants one. A mutant
that never strikes, or that ends the rounds with another error than a comparison's, is not caught (``outcome``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest.mock import patch

from tests.engine import PrefillEngine

Plant = Callable[[PrefillEngine, Callable[[], None]], None]
"""Plants a defect in an engine for good; the function that it is given is to be called at each time that it strikes."""


def nothing(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """No defect."""


def wrong_kv_slot_after_a_resume(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """Once in the life of a task that is resumed, two neighbouring tokens have their KV slots exchanged."""

    disturbed: set[int] = set()

    def disturb(task: Any) -> None:
        slots = task.batch.out_cache_loc
        if len(slots) >= 2 and task.id not in disturbed:
            disturbed.add(task.id)
            slots[-2:] = slots[-2:].flip(0)
            struck()

    _at_resumes(engine, disturb)


def attention_metadata_of_another_task(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """A task that is resumed exchanges its attention metadata with a live one of the same shape."""

    def shape(task: Any) -> list[tuple[int, int]]:
        return [(sequence.query_tokens, len(sequence.slots)) for sequence in task.attn_backend.forward_metadata]

    def disturb(task: Any) -> None:
        for other in engine.scheduler.hub.work.tasks.live:
            if other is not task and other.has_run and shape(other) == shape(task):
                mine, its = task.attn_backend, other.attn_backend
                mine.forward_metadata, its.forward_metadata = its.forward_metadata, mine.forward_metadata
                struck()
                return

    _at_resumes(engine, disturb)


def lost_row_tile(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """In every 20th operator that runs in three or more row tiles, the second is left out."""
    _lose_tiles("sgl_flowprefill.runtime.tiles.row_tiles", 3, struck)


def lost_attention_tile(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """In every 20th attention that runs in two or more query tiles, the second is left out."""
    _lose_tiles("sgl_flowprefill.platforms.attention.query_tiles", 2, struck)


def prefix_cached_before_it_is_computed(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """The KV slots of a prompt are in the radix cache as soon as its prefill has started."""
    scheduler = engine.scheduler
    make_batch = scheduler.role.make_batch

    def early(reqs: Any) -> Any:
        batch = make_batch(reqs)
        if batch is not None:
            for req in batch.reqs:
                scheduler.checkpoint_disagg_prefill(req)
                struck()
        return batch

    scheduler.role.make_batch = early


def abort_that_is_not_heard(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """The scheduler does nothing when a client leaves."""
    scheduler = engine.scheduler
    process = scheduler.process_input_requests

    def filtered(messages: list[Any]) -> None:
        others = [one for one in messages if type(one).__name__ != "AbortReq"]
        for _ in range(len(messages) - len(others)):
            struck()
        process(others)

    scheduler.process_input_requests = filtered


def abort_that_stops_nothing(engine: PrefillEngine, struck: Callable[[], None]) -> None:
    """A task goes on although all of its clients have left."""
    abandoned = engine.scheduler.role.abandoned

    def none(live: Any) -> list[Any]:
        if abandoned(live):
            struck()
        return []

    engine.scheduler.role.abandoned = none


MUTANTS: Final[dict[str, Plant]] = {
    plant.__name__: plant
    for plant in (
        wrong_kv_slot_after_a_resume,
        attention_metadata_of_another_task,
        lost_row_tile,
        lost_attention_tile,
        prefix_cached_before_it_is_computed,
        abort_that_is_not_heard,
        abort_that_stops_nothing,
    )
}


def _at_resumes(engine: PrefillEngine, disturb: Callable[[Any], None]) -> None:
    executor = engine.scheduler.hub.executor
    run = executor.run

    def disturbed(task: Any, forward: Any) -> None:
        if task.has_run:
            disturb(task)
        run(task, forward)

    executor.run = disturbed


def _lose_tiles(name: str, least: int, struck: Callable[[], None]) -> None:
    module, _, function = name.rpartition(".")
    tiles = getattr(__import__(module, fromlist=[function]), function)
    seen = 0

    def lossy(*arguments: Any) -> Iterator[Any]:
        nonlocal seen
        whole = list(tiles(*arguments))
        if len(whole) >= least:
            seen += 1
            if seen % 20 == 0:
                del whole[1]
                struck()
        return iter(whole)

    patch(name, lossy).start()
