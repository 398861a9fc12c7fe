"""Three times 3,400 preemptions of two tensor-parallel ranks, with aborts: `make stress`."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests.prompts import prompt
from tests.ranks import Chaos, Ranks

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

PREEMPTIONS = 3_400


@pytest.mark.parametrize(("seed", "switch_probability"), [(1, 0.9), (2, 0.9), (3, 0.6)])
def test_ten_thousand_preemptions_of_two_ranks_end_and_change_no_token(
    seed: int, switch_probability: float, tmp_path: Path
) -> None:
    path = str(embedded_model_path(EmbeddedModel(heads=2, layers=4, context_tokens=4608)))
    prefixes = [prompt(seed, 200 * (seed + 1)) for seed in range(4)]
    alone: dict[tuple[int, ...], int | None] = {}
    started_s = time.monotonic()
    with Ranks(path, 2, tmp_path, Chaos(seed, switch_probability)) as ranks:
        for round_number in itertools.count():
            rng = random.Random(1000 * seed + round_number)
            prompts = {}
            for i in range(rng.randrange(4, 16)):
                prefix = rng.choice(prefixes) if rng.random() < 0.6 else None
                tokens = rng.randrange(1, 1200) + (len(prefix) if prefix else 0)
                prompts[f"n{round_number:04}-{i:02}"] = prompt(rng.randrange(40), tokens, prefix)
            dropped = set()
            for rid, tokens in prompts.items():
                ranks.submit(rid, tokens)
                if rng.random() < 0.15:
                    time.sleep(rng.random() * 0.05)
                    ranks.abort(rid)
                    dropped.add(rid)
            ranks.finish([rid for rid in prompts if rid not in dropped])
            for rid in prompts.keys() - dropped:
                expected = alone.setdefault(tuple(prompts[rid]), ranks.tokens[rid])
                assert ranks.tokens[rid] == expected, "the same prompt got another token in another interleaving"
            if round_number % 10 == 0:
                preemptions = ranks.preemptions()
                print(
                    f"round {round_number}, {time.monotonic() - started_s:.0f} s: {preemptions} preemptions", flush=True
                )
                if preemptions >= PREEMPTIONS:
                    return
