"""Features of SGLang that work with FlowPrefill each by itself, and which of them a test has compared together.

A pair that none has is refused, unless ``--flowprefill-uncompared`` says otherwise: what a server keeps for one of them
while a prefill is suspended may not be all that it would have to keep for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from sgl_flowprefill.compat.row import ABOVE_ONE, GIVEN, SERVERS, Server, Values, shown

UNCOMPARED: Final = "FLOWPREFILL_UNCOMPARED"
"""The variable of the switch: ``sgl_flowprefill.config``."""
_SWITCH: Final = TypeAdapter(bool)
SWITCHED_ON: Final = f"--flowprefill-uncompared true, or {UNCOMPARED}=1, starts the server all the same"


class DataParallel(NamedTuple):
    """How many ranks of attention a server has, and how many replicas. SGLang makes ``--dp-size`` that of attention
    where the deprecated ``--enable-dp-attention`` says so.
    """

    option: str
    """By which the ranks are given."""
    ranks: int
    replicas: int

    @classmethod
    def of(cls, options: Any) -> DataParallel:
        replicas, ranks = (getattr(options, name, None) or 1 for name in ("dp_size", "attn_dp_size"))
        if getattr(options, "enable_dp_attention", None) and ranks == 1:
            return cls("dp_size", replicas, 1)
        return cls("attn_dp_size", ranks, replicas)


class Feature(NamedTuple):
    """What a server is asked for by an option."""

    name: str
    options: tuple[str, ...]
    """Fields of ServerArgs by which it is asked for; the first one stands for them."""
    given: Callable[[Any], str | None]
    """How it is asked for on the command line of a server with these options; None where it is not."""
    servers: tuple[Server, ...] = SERVERS
    """Those that have it."""


ADAPTER_OPTIONS: Final = ("enable_lora", "lora_paths")


def _given(option: str, values: Values = GIVEN) -> Callable[[Any], str | None]:
    def given(options: Any) -> str | None:
        value = getattr(options, option, None)
        return shown(option, value) if values.holds(value) else None

    return given


def _adapters(options: Any) -> str | None:
    return "--enable-lora" if any(getattr(options, name, None) for name in ADAPTER_OPTIONS) else None


def _joint(options: Any) -> str | None:
    option, ranks, _ = DataParallel.of(options)
    return shown(option, ranks) if ranks > 1 else None


def _ranks(options: Any) -> str | None:
    return None if _joint(options) else _given("tp_size", ABOVE_ONE)(options)


def _feature(name: str, option: str, servers: tuple[Server, ...] = SERVERS) -> Feature:
    return Feature(name, (option,), _given(option), servers)


DRAFTS: Final = _feature("a draft model", "speculative_algorithm", ("prefill",))
ADAPTERS: Final = Feature("adapters", ADAPTER_OPTIONS, _adapters)
STORAGE: Final = _feature("prefixes in storage", "hicache_storage_backend")
HOST_CACHE: Final = _feature("prefixes in host memory", "enable_hierarchical_cache")
EXPERTS: Final = _feature("experts that move", "enable_eplb", ("prefill",))
JOINT: Final = Feature("DP attention", ("attn_dp_size", "dp_size", "enable_dp_attention", "tp_size"), _joint)
RANKS: Final = Feature("several ranks", ("tp_size",), _ranks)
FEATURES: Final = (DRAFTS, ADAPTERS, STORAGE, HOST_CACHE, EXPERTS, JOINT, RANKS)

Pair = tuple[Feature, Feature]


COMPARED: Final[Mapping[Pair, Mapping[Server, str]]] = {
    (DRAFTS, STORAGE): {
        "prefill": "test_host_storage_pairs.py::"
        "test_suspended_prefills_hand_over_what_drafts_begin_with_behind_prefixes_of_storage",
    },
    (ADAPTERS, STORAGE): {
        "prefill": "test_host_storage_pairs.py::test_suspended_prefills_keep_their_adapters_behind_prefixes_of_storage",
        "unified": "test_host_storage_pairs.py::test_streams_keep_their_adapters_behind_prefixes_of_storage",
    },
    (STORAGE, HOST_CACHE): {
        "prefill": "test_host_storage.py::test_rounds_of_reads_change_no_answer_and_no_kv",
        "unified": "test_host_storage.py::test_streams_that_join_behind_reads_change_no_answer",
    },
    (STORAGE, JOINT): {
        "prefill": "test_host_storage_ranks.py::test_ranks_with_requests_of_their_own_read_what_others_have_stored",
    },
    (STORAGE, RANKS): {
        "prefill": "test_host_storage_ranks.py::test_two_ranks_read_the_same_prefixes_while_suspended_prefills_go_on",
        "unified": "test_host_storage_ranks.py::test_two_ranks_read_the_same_prefixes_between_decode_steps",
    },
    (ADAPTERS, HOST_CACHE): {
        "prefill": "test_host_cache_pairs.py::"
        "test_suspended_prefills_keep_their_adapters_behind_prefixes_of_host_memory",
        "unified": "test_host_cache_pairs.py::test_streams_keep_their_adapters_behind_prefixes_of_host_memory",
    },
    (HOST_CACHE, JOINT): {
        "prefill": "test_host_cache_ranks.py::test_ranks_with_requests_of_their_own_load_their_own_prefixes",
    },
    (HOST_CACHE, RANKS): {
        "prefill": "test_host_cache_ranks.py::"
        "test_two_ranks_load_the_same_prefixes_and_suspended_prefills_wait_for_their_own",
        "unified": "test_host_cache_ranks.py::test_two_ranks_load_the_same_prefixes_between_decode_steps",
    },
    (DRAFTS, HOST_CACHE): {
        "prefill": "test_host_cache_pairs.py::"
        "test_suspended_prefills_hand_over_what_drafts_begin_with_behind_prefixes_of_host_memory",
    },
    (DRAFTS, RANKS): {
        "prefill": "test_draft_ranks.py::"
        "test_two_ranks_that_are_preempted_all_the_time_hand_over_what_drafts_begin_with",
    },
    (EXPERTS, RANKS): {
        "prefill": "test_experts.py::test_experts_move_between_two_ranks_while_nothing_is_suspended",
    },
}
"""By pair and server the test of ``tests/integration`` that has compared it."""
PAIRS: Final[tuple[Pair, ...]] = tuple(pair for pair in combinations(FEATURES, 2) if pair != (JOINT, RANKS))
"""All there are: DP attention has several ranks anyway."""


class Uncompared(NamedTuple):
    """Two features that a server is asked for and that have not been compared together there."""

    options: tuple[str, ...]
    """Of both, those of the first one first."""
    given: str
    """Both, as they are asked for on a command line."""


def servers_of(pair: Pair) -> tuple[Server, ...]:
    """Kinds of servers that have both features."""
    return tuple(server for server in SERVERS if all(server in feature.servers for feature in pair))


def is_compared(pair: Pair, server: Server) -> bool:
    return server in COMPARED.get(pair, {})


def uncompared(options: Any, server: Server) -> Iterator[Uncompared]:
    """What a ``server`` is asked for that has not been compared there."""
    for one, other in PAIRS:
        given, beside = one.given(options), other.given(options)
        if given is not None and beside is not None and not is_compared((one, other), server):
            yield Uncompared((*one.options, *other.options), f"{given} with {beside}")


def takes_uncompared(env: Mapping[str, str]) -> bool:
    """Whether servers of the environment ``env`` start with such pairs. The options of FlowPrefill, which are read in
    the same way, refuse what says neither.
    """
    try:
        return _SWITCH.validate_python(env.get(UNCOMPARED, "false"))
    except ValidationError:
        return False
