"""How long streams wait for their next tokens beside long prompts, on a server that prefills and decodes.

Times are looked at in the scheduler's process, and what begins the answers is compared when all is measured.
``tests/integration/test_unified.py`` compares whole answers, and ``tests/servers/test_unified_serving.py`` sees tokens
come over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.model import embedded_model_path
from tests.engine import keep_freed_memory
from tests.reference import TOKENS, Comparison
from tests.remote import Remote
from tests.unified_engine import CHECKS, UnifiedEngine
from tests.unified_scenarios.serving import Beside, gaps_beside_a_prompt

pytestmark = [pytest.mark.stress, pytest.mark.alone, pytest.mark.timeout(1800)]

STREAMS = 4
TBT_SLO_S = 0.15
MAX_BLOCKING_S = FlowPrefillConfig().max_blocking_ms * 1e-3
LENGTHS = (8192, 32_000)
LEAST_GAPS = 100
"""Prompts of each length come until there have been more gaps than these."""


def _keep_freed_memory(engine: UnifiedEngine) -> None:
    keep_freed_memory()


@pytest.fixture(scope="module")
def unified() -> Iterator[Remote]:
    """An engine without checks, which has seen a long prompt beside streams."""
    unchecked = dict.fromkeys(CHECKS, "0")
    with closing(Remote(UnifiedEngine, str(embedded_model_path()), unchecked)) as remote:
        remote.call(_keep_freed_memory)
        remote.call(gaps_beside_a_prompt, min(LENGTHS), 0, TBT_SLO_S, STREAMS)
        yield remote


@pytest.mark.parametrize("tokens", LENGTHS)
def test_streams_get_their_tokens_in_time_beside_long_prompts(
    unified: Remote, comparison: Comparison, tokens: int
) -> None:
    beside: list[Beside] = []
    while sum(len(one.gaps_s) for one in beside) <= LEAST_GAPS:
        beside.append(unified.call(gaps_beside_a_prompt, tokens, 540 + len(beside), TBT_SLO_S, STREAMS))
        assert len(beside[-1].gaps_s)
    gaps_s = np.array([gap_s for one in beside for gap_s in one.gaps_s])
    middle_s, p99_s = np.quantile(gaps_s, [0.5, 0.99])
    print(
        f"\n{tokens} tokens in {', '.join(f'{one.prefill_s:.1f}' for one in beside)} s beside {STREAMS} streams: "
        f"{len(gaps_s)} gaps, p50 {middle_s * 1e3:.1f}, p99 {p99_s * 1e3:.1f}, longest {gaps_s.max() * 1e3:.1f} ms "
        f"(objective {TBT_SLO_S * 1e3:g}, bound of blocking {MAX_BLOCKING_S * 1e3:g})"
    )
    for one in beside:
        for rid, ask in one.asked.items():
            answer = one.answers[rid]
            assert len(answer.tokens) >= (1 if rid == "prompt" else TOKENS)
            comparison.answer(rid, ask.prompt, answer.tokens, answer.logprobs)
    comparison.assert_same_with_logprobs()
    assert comparison.counts["answers"] == len(beside) * (STREAMS + 1)
    assert p99_s <= TBT_SLO_S
    assert gaps_s.max() <= TBT_SLO_S + 2 * MAX_BLOCKING_S
