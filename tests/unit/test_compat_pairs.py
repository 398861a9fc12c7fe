"""Features of SGLang that a server is asked for together: each pair is compared by a test, or refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from sgl_flowprefill.compat import MODE, Server, incompatible_option, refusals, risks
from sgl_flowprefill.compat.pairs import COMPARED, FEATURES, PAIRS, Pair, is_compared, servers_of, takes_uncompared
from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from tests.unit.test_compat_refusals import started

ASKED: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a draft model": ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE"),
    "adapters": ({"lora_paths": ["a=b"]}, "--enable-lora"),
    "prefixes in storage": ({"hicache_storage_backend": "file"}, "--hicache-storage-backend file"),
    "prefixes in host memory": ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
    "experts that move": ({"enable_eplb": True}, "--enable-eplb"),
    "DP attention": ({"dp_size": 2, "enable_dp_attention": True, "tp_size": 2}, "--dp-size 2"),
    "several ranks": ({"tp_size": 2}, "--tp-size 2"),
}
"""How a server is asked for each feature."""
SWITCH: Final = {"FLOWPREFILL_UNCOMPARED": "True"}


def asked(pair: Pair, server: Server) -> SimpleNamespace:
    options: dict[str, Any] = {}
    for feature in pair:
        options |= ASKED[feature.name][0]
    return started(MODE[server], **options)


def given(pair: Pair) -> str:
    return " with ".join(ASKED[feature.name][1] for feature in pair)


CASES: Final = [(pair, server) for pair in PAIRS for server in servers_of(pair)]


@pytest.mark.parametrize(
    ("pair", "server"), CASES, ids=[f"{one.name} and {other.name}, {server}" for (one, other), server in CASES]
)
def test_a_pair_that_no_test_compares_is_refused_unless_the_switch_is_on(pair: Pair, server: Server) -> None:
    options, name = asked(pair, server), given(pair)
    refused = [one.given for one in refusals(options, {})]
    if is_compared(pair, server):
        assert name not in refused
        return
    assert name in refused
    assert str(incompatible_option(options, {})).startswith(f"{name} is refused by FlowPrefill: they have not been ")
    assert str(incompatible_option(options, {})).endswith(
        "; --flowprefill-uncompared true, or FLOWPREFILL_UNCOMPARED=1, starts the server all the same"
    )
    assert risks(options, {}) == []
    assert incompatible_option(options, SWITCH) is None
    assert [risk for risk in risks(options, SWITCH) if risk.startswith(f"{name} has not been compared")]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_each_feature_works_by_itself(feature: Any) -> None:
    for server in feature.servers:
        assert incompatible_option(started(MODE[server], **ASKED[feature.name][0]), {}) is None


def test_what_compares_a_pair_is_there() -> None:
    folder = Path(__file__).parents[1] / "integration"
    named = [test for tests in COMPARED.values() for test in tests.values()]
    for file, _, function in (test.partition("::") for test in named):
        assert f"\ndef {function}(" in (folder / file).read_text(), f"{file} has no {function}"
    assert len(set(named)) == len(named)
    assert set(COMPARED) <= set(PAIRS)
    assert all(set(tests) <= set(servers_of(pair)) for pair, tests in COMPARED.items())


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "t", "y", "false", "0", "no", "off", "n"])
def test_the_switch_is_on_where_the_options_of_flowprefill_say_so(text: str) -> None:
    env = {"FLOWPREFILL_UNCOMPARED": text}
    assert takes_uncompared(env) == FlowPrefillConfig.from_env(env).uncompared


def test_a_switch_that_says_neither_is_off_and_refused_with_the_options_of_flowprefill() -> None:
    env = {"FLOWPREFILL_UNCOMPARED": "maybe"}
    assert not takes_uncompared(env)
    with pytest.raises(ConfigError, match=r"^--flowprefill-uncompared maybe: "):
        FlowPrefillConfig.from_env(env)


def test_the_switch_lets_nothing_else_start() -> None:
    options = started("null", is_embedding=True)
    assert incompatible_option(options, SWITCH) == incompatible_option(options, {})


def test_a_decode_server_has_no_risks() -> None:
    assert risks(SimpleNamespace(disaggregation_mode="decode", enable_lora=True, tp_size=2), SWITCH) == []
