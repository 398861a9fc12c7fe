"""Chance in place of the policy: prefills are suspended anywhere, and all that they compute is compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.engine import PrefillEngine
from tests.kv import watch_kv
from tests.prompts import population
from tests.reference import Comparison, Kv

FLUSH_ROUNDS: Final = 10
"""How often all is flushed: in between, prompts of earlier rounds are cached."""


def chaos(engine: Any, seed: int, switch_probability: float) -> dict[str, int]:
    """Suspend at random preemption checkpoints and run whatever a coin says; figures of what happened."""
    rng = random.Random(seed)
    scheduler = engine.scheduler
    seen = {"suspensions": 0, "deepest": 0}

    def pick(now_s: float, running: Any, admit: bool = True) -> Any:
        tasks = sorted(scheduler.hub.work.policy.started, key=lambda job: job.item.id)
        requests = scheduler.hub.work.policy.first_waiting(now_s, 1000) if admit else []
        choices = tasks + sorted(requests, key=lambda job: job.item.number)  # the coin alone decides, not the clock
        if not choices:
            return None
        choice = rng.choice(choices)
        seen["suspensions"] += running is not None and choice is not running
        started = sum(1 for job in tasks if job.item.operators_passed > 0)
        seen["deepest"] = max(seen["deepest"], started)
        return choice

    scheduler.hub.work.policy.pick = pick
    executor = scheduler.hub.executor
    executor.interrupted = executor.ends_waiting = lambda: rng.random() < switch_probability
    return seen


def calm(engine: Any) -> None:
    """End the chaos: the policy decides again."""
    scheduler = engine.scheduler
    scheduler.hub.work.policy.__dict__.pop("pick", None)
    executor = scheduler.hub.executor
    executor.interrupted = executor.ends_waiting = scheduler.hub.events.pending


@dataclass
class Rounds:
    """Rounds of random prompts on one engine, with aborts, each answer and its KV cache compared."""

    engine: PrefillEngine
    comparison: Comparison
    prompts: Sequence[Sequence[int]] = field(default_factory=lambda: population(150))
    seen: Counter[str] = field(default_factory=Counter)
    _kv: dict[str, Kv] = field(default_factory=dict)

    def __post_init__(self) -> None:
        watch_kv(self.engine.scheduler, self._keep)

    def _keep(self, rid: str, kv: Kv) -> None:
        self._kv[rid] = self._kv[rid] + kv if rid in self._kv else kv

    def close(self) -> None:
        """Let the engine be as it was."""
        calm(self.engine)
        del self.engine.scheduler.send_kv_chunk

    def run(self, rounds: int) -> None:
        """Raises AssertionError at the end of the first round with an answer that is not the reference's."""
        for number in range(rounds):
            self.play(random.Random(number))
            self.comparison.assert_same()
            if number % FLUSH_ROUNDS == FLUSH_ROUNDS - 1:
                self.engine.assert_clean()
                print(f"round {number + 1} of {rounds}: {self}", flush=True)
        self.engine.assert_clean()

    def play(self, rng: random.Random) -> None:
        """One round."""
        places = [rng.randrange(len(self.prompts)) for _ in range(rng.randrange(2, 12))]
        if rng.random() < 0.5:
            places.append(places[0] ^ 1)
        asked = {f"s{i:02}": self.prompts[place] for i, place in enumerate(places)}
        self.ask(
            rng,
            asked,
            with_inputs={rid for rid in asked if rng.random() < 0.1},
            dropped={rid for rid in asked if rng.random() < 0.15},
            switch_probability=rng.choice([0.05, 0.3, 0.8]),
        )

    def ask(
        self,
        rng: random.Random,
        asked: dict[str, Sequence[int]],
        *,
        with_inputs: set[str],
        dropped: set[str],
        switch_probability: float,
        at_once: bool = False,
    ) -> None:
        """Submit what is ``asked``, now and then or ``at_once``, ``with_inputs`` those that want log probabilities of
        the prompt too, abort what is ``dropped``, and compare.
        """
        engine = self.engine
        engine.answers.clear()
        engine.batch_sizes.clear()
        self._kv.clear()
        left: set[str] = set()
        chance = chaos(engine, rng.randrange(1 << 30), switch_probability)
        for rid, tokens in asked.items():
            engine.submit(rid, tokens, logprobs=True, inputs_from=0 if rid in with_inputs else None)
            if rid in dropped and rng.random() < 0.3:
                self._abort(rid, left)
            for _ in range(0 if at_once else rng.randrange(6)):
                engine.turn()
        for rid in sorted(dropped - left):
            self._abort(rid, left)
            for _ in range(rng.randrange(4)):
                engine.turn()
        engine.run()
        self.seen += Counter({"suspensions": chance["suspensions"]})
        self.seen["deepest"] = max(self.seen["deepest"], chance["deepest"])
        self.seen["batches of several"] += sum(size > 1 for size in engine.batch_sizes)
        for rid, tokens in asked.items():
            self.compare(rid, tokens, left)

    def _abort(self, rid: str, left: set[str]) -> None:
        """Abort ``rid``, and note it in ``left`` if it has no answer yet."""
        scheduler = self.engine.scheduler
        if rid not in self.engine.answers:
            left.add(rid)
        self.seen["aborts of started tasks"] += any(rid in task.rids for task in scheduler.hub.work.tasks.live)
        self.engine.abort(rid)
        self.engine.turn()
        for task in scheduler.hub.work.tasks.live:
            if left.issuperset(task.rids):
                self.comparison.differences["abort"].append(f"task {task.id} goes on, though all of {task.rids} left")

    def compare(self, rid: str, tokens: Sequence[int], left: Collection[str] = (), pattern: str | None = None) -> None:
        """Compare all that there is of one request: of those who ``left``, that there is no answer. It had to match
        ``pattern``, if there is one.
        """
        answer = self.engine.answers.get(rid)
        if rid in left:
            self.comparison.counts["aborts"] += 1
            if answer is not None and not answer.aborted:
                self.comparison.differences["abort"].append(f"{rid} left before its answer, and is answered")
            return
        if answer is None or answer.token is None:
            self.comparison.answer(rid, tokens, [], None)
            return
        self.seen["answers with a cached prefix"] += answer.req.cached_tokens > 0
        logprobs = None if answer.logprob is None else [answer.logprob]
        self.comparison.answer(rid, tokens, [answer.token], logprobs, pattern)
        if answer.input_logprobs is not None:
            self.comparison.inputs(rid, tokens, answer.input_logprobs[1:])
        self.compare_kv(rid, tokens)

    def compare_kv(self, rid: str, tokens: Sequence[int]) -> None:
        """Compare the KV cache that was handed over for one request."""
        if rid in self._kv:
            self.comparison.kv(rid, tokens, self._kv.pop(rid))
        else:
            self.comparison.differences["KV"].append(f"{rid}: none was handed over")

    def __str__(self) -> str:
        return f"{', '.join(f'{count:,} {what}' for what, count in self.seen.items())}; {self.comparison}"
