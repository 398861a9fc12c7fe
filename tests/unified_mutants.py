"""Mutants of a server that prefills and decodes: defects that are planted in a running engine, each to be caught.

``python -m tests.unified_mutants`` plants one after the other, and says what caught each; first it runs the same rounds
without any, which must pass. ``python -m tests.unified_mutants NAME`` plants one. What counts as caught is said in
``tests.mutants.outcome``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

from sgl_flowprefill.hub.task import DecodeStep
from sgl_flowprefill.model import embedded_model_path
from tests.late_device import LateDevice
from tests.mutants.outcome import Outcome, raise_crashes
from tests.remote import Remote
from tests.unified_asks import asks
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine
from tests.unified_rounds import Rounds
from tests.unified_scenarios import kv_cache

ROUNDS: Final = 8
AMPLE_TOKENS: Final = 60_000

Plant = Callable[[UnifiedEngine, Callable[[], None]], None]
"""Plants a defect in an engine for good; the function that it is given is to be called at each time that it strikes."""


def nothing(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """No defect."""


def main_attention_backend_as_a_slot(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """A task may have the attention backend with which decode steps run."""
    slots, main = engine.hub.slots, engine.scheduler.tp_worker.model_runner.attn_backend
    take = slots.take
    slots.give_back(main)

    def taken() -> Any:
        backend = take()
        if backend is main:
            struck()
        return backend

    slots.take = taken


def flags_of_the_decode_step_in_a_prefill(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """A task that is resumed finds the flags of the forward pass that ran last."""
    from sgl_flowprefill.runtime.forward_state import ForwardState, get_forward

    install = ForwardState.install

    def without_flags(state: ForwardState, model_runner: Any) -> None:
        flags = dict(get_forward()._plain)
        if any(flags.get(name) is not flag for name, flag in state.flags.items()):
            struck()
        install(replace(state, flags=flags), model_runner)

    patch.object(ForwardState, "install", without_flags).start()


def prefix_cached_although_it_was_not_computed(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """A task that is dropped or given back leaves its KV slots in the radix cache."""
    from sglang.srt.managers import schedule_batch
    from sglang.srt.mem_cache.common import release_kv_cache

    from sgl_flowprefill.runtime import unified_role

    def kept(req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
        if not checkpoint and not req.output_ids:
            struck()
            checkpoint = True
        release_kv_cache(req, tree_cache, checkpoint=checkpoint)

    for module in (unified_role, schedule_batch):
        patch.object(module, "release_kv_cache", kept).start()


def answers_of_started_prefills_without_kv_cache(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """Admission reserves KV cache for the answers of SGLang's running batch alone."""
    from sglang.srt.managers.schedule_policy import PrefillAdder

    def stock() -> type[PrefillAdder]:
        if engine.scheduler.in_flight_reqs():
            struck()
        return PrefillAdder

    engine.scheduler.get_prefill_adder_class = stock


def streams_retracted_before_prefills_are_given_back(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """No task is given back: where KV cache is short, SGLang's function takes it from streams."""
    role = engine.hub.role
    missing_tokens = role.missing_tokens

    def none() -> int:
        if missing_tokens() > 0:
            struck()
        return 0

    role.missing_tokens = none


def _join_with_what_the_last_stream_gets(late: Any, batch: Any, result: Any) -> None:
    """Merge ``late`` into ``batch``, which has its ``result``: it is given what the last stream of the step gets."""
    rows = list(range(len(batch.reqs)))
    batch.merge_batch(late)
    rows += [rows[-1]] * (len(batch.reqs) - len(rows))
    result.next_token_ids = result.next_token_ids[rows]
    result.logits_output.next_token_logprobs = result.logits_output.next_token_logprobs[rows]


def prefill_that_joins_while_tokens_are_on_their_way(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """A prefill that ends while a step is in flight joins at once, on a device whose results come late."""
    engine.use(LateDevice(2, seed=1))
    role, tasks = engine.hub.role, engine.hub.work.tasks
    finish = role.finish

    def finish_and_join(task: Any) -> None:
        finish(task)
        steps = [done for done in tasks.finishing if isinstance(done, DecodeStep)]
        if steps and role.joining:
            struck()
            _join_with_what_the_last_stream_gets(role.joining.pop(), steps[0].batch, steps[0].result)

    role.finish = finish_and_join


def prefill_that_joins_a_step_in_flight(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """The last of the prefills that are to join a step joins between the step's forward pass and its result, in which
    it is given what the last stream of the step gets.
    """
    scheduler, role = engine.scheduler, engine.hub.role
    join, run_batch = role.join, scheduler.run_batch
    late: list[Any] = []

    def all_but_one() -> Any:
        if not scheduler.running_batch.is_empty() and role.joining:
            late.append(role.joining.pop())
        return join()

    def run_and_merge(batch: Any, *arguments: Any, **options: Any) -> Any:
        result = run_batch(batch, *arguments, **options)
        if batch.forward_mode.is_decode() and late:
            struck()
            _join_with_what_the_last_stream_gets(late.pop(), batch, result)
        return result

    role.join, scheduler.run_batch = all_but_one, run_and_merge


def penalties_counted_twice(engine: UnifiedEngine, struck: Callable[[], None]) -> None:
    """Every second step is prepared once more than it is run, as far as penalties are concerned."""
    scheduler = engine.scheduler
    run_batch = scheduler.run_batch

    def prepared_twice(batch: Any, *arguments: Any, **options: Any) -> Any:
        penalties = batch.sampling_info.penalizer_orchestrator
        if batch.forward_mode.is_decode() and penalties.is_required and scheduler.forward_ct % 2:
            struck()
            batch.cumulate_penalty_output_tokens()
        return run_batch(batch, *arguments, **options)

    scheduler.run_batch = prepared_twice


MUTANTS: Final[dict[str, tuple[Plant, int]]] = {
    plant.__name__: (plant, tokens)
    for plant, tokens in (
        (main_attention_backend_as_a_slot, AMPLE_TOKENS),
        (flags_of_the_decode_step_in_a_prefill, AMPLE_TOKENS),
        (prefix_cached_although_it_was_not_computed, AMPLE_TOKENS),
        (answers_of_started_prefills_without_kv_cache, kv_cache.TIGHT_TOKENS),
        (streams_retracted_before_prefills_are_given_back, kv_cache.TIGHT_TOKENS),
        (prefill_that_joins_a_step_in_flight, AMPLE_TOKENS),
        (prefill_that_joins_while_tokens_are_on_their_way, AMPLE_TOKENS),
        (penalties_counted_twice, AMPLE_TOKENS),
    )
}
"""Each with the tokens of KV cache of the engine that it is planted in."""


def _plant(engine: UnifiedEngine, name: str) -> None:
    engine.strikes = 0

    def struck() -> None:
        engine.strikes += 1

    raise_crashes(engine.hub.role)
    plant = nothing if name == nothing.__name__ else MUTANTS[name][0]
    plant(engine, struck)


def _strikes(engine: UnifiedEngine) -> int:
    return engine.strikes


def outcome_of(name: str, stock: Stock, tokens: int) -> Outcome:
    """Play rounds with one mutant, or with none, or what is told by little KV cache."""
    with closing(Remote(UnifiedEngine, str(embedded_model_path()), max_total_tokens=tokens)) as remote:
        remote.call(_plant, name)
        comparison = StockComparison(stock)
        error = None
        try:
            if tokens == kv_cache.TIGHT_TOKENS:
                _play_scenarios(remote, comparison)
            else:
                Rounds(remote, comparison, asks(30, seed=7, longest_tokens=1200)).run(ROUNDS)
        except Exception as caught:
            error = caught
        strikes = remote.call(_strikes)
        print(f"{name}, {tokens} tokens: struck {strikes} times; {comparison}", flush=True)
    return Outcome(strikes, error)


def _play_scenarios(remote: Remote, comparison: StockComparison) -> None:
    played = remote.call(kv_cache.streams_without_room)
    comparison.compare(kv_cache.GROWING | kv_cache.LATE, played.answers)
    comparison.assert_same()
    assert not played.seen["retractions"], f"{played.seen['retractions']} streams were retracted"
    played = remote.call(kv_cache.starts_of_all_that_is_admitted)
    comparison.compare(kv_cache.RESERVED, played.answers)
    comparison.assert_same()
    lost = played.seen["retractions"] + played.seen["given back"]
    assert not lost, f"{lost} streams were retracted or prefills given back, although KV cache is reserved for all"


def main(names: list[str]) -> int:
    failed = []
    with closing(Remote(StockEngine, str(embedded_model_path()))) as remote:
        stock = Stock(remote)
        for name in names or [nothing.__name__, *MUTANTS]:
            for tokens in [MUTANTS[name][1]] if name in MUTANTS else [AMPLE_TOKENS, kv_cache.TIGHT_TOKENS]:
                outcome = outcome_of(name, stock, tokens)
                print(f"{name}: {str(outcome)[:3000]}", flush=True)
                if not outcome.is_as_it_should_be(name in MUTANTS):
                    failed.append(name)
    print(f"not as it should be: {', '.join(failed)}" if failed else "all are as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
