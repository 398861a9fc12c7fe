"""Hundreds of random interleavings with aborts on one scheduler: `make stress`."""

from __future__ import annotations

import random

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.engine import PrefillEngine
from tests.integration.test_preemption import chaos
from tests.prompts import prompt

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

ROUNDS = 300


def test_ten_thousand_suspensions_leave_nothing_behind_and_change_no_token() -> None:
    engine = PrefillEngine(str(embedded_model_path()))
    prefixes = [prompt(seed, 200 * (seed + 1)) for seed in range(4)]
    alone: dict[tuple[int, ...], int | None] = {}
    suspensions = 0
    for round_number in range(ROUNDS):
        rng = random.Random(round_number)
        prompts = {}
        for i in range(rng.randrange(2, 12)):
            prefix = rng.choice(prefixes) if rng.random() < 0.6 else None
            tokens = rng.randrange(1, 1200) + (len(prefix) if prefix else 0)
            prompts[f"s{i:02}"] = prompt(rng.randrange(40), tokens, prefix)
        engine.answers.clear()
        seen = chaos(engine, round_number, switch_probability=rng.choice([0.05, 0.3, 0.8]))
        for rid, tokens in prompts.items():
            engine.submit(rid, tokens)
            for _ in range(rng.randrange(6)):
                engine.step()
        dropped = {rid for rid in prompts if rng.random() < 0.15}
        for rid in dropped:
            engine.abort(rid)
            for _ in range(rng.randrange(4)):
                engine.step()
        engine.run()
        suspensions += seen["suspensions"]
        for rid, tokens in prompts.items():
            answer = engine.answers.get(rid)
            if rid in dropped and (answer is None or answer.aborted):
                continue
            assert answer is not None
            expected = alone.setdefault(tuple(tokens), answer.token)
            assert answer.token == expected, "the same prompt got another token in another interleaving"
        if round_number % 10 == 0:
            engine.assert_clean()
            print(f"round {round_number} of {ROUNDS}: {suspensions} suspensions so far", flush=True)
    engine.assert_clean()
    print(f"{suspensions} suspensions")
    assert suspensions >= 10_000
