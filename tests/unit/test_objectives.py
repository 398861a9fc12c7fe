"""The order in which a request's objective is chosen, each source of it, and the hooks that apply it."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

pytest.importorskip("sglang")

from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from starlette.requests import Request as HttpRequest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import objective, resolver
from sgl_flowprefill.patches.request_slo import Objectives
from sgl_flowprefill.slo import Objective, PriorityClasses, SloError
from sgl_flowprefill.slo.asked import body_ask, header_asks
from sgl_flowprefill.slo.policy import parse
from sgl_flowprefill.slo.resolve import Ask, PerMinute, Request, Resolver

POLICY = parse(
    """
classes:
  interactive: {ttft_s: 0.5, tbt_s: 0.05, weight: 4, min_ttft_s: 0.2, tight_per_minute: 2}
  keyed: {ttft_s: 1, tight_per_minute: 1, tight_by: api_key}
  batch: {base_s: 10, per_1k_tokens_s: 2, sheddable: true}
  marked: {weight: 2}
priorities: {10: interactive, 0: keyed, -10: batch}
service_tiers: {flex: batch}
smg_priorities: {bulk: batch}
rules:
  - {class: interactive, model: "*-8B*", max_prompt_tokens: 100}
  - {class: batch, min_prompt_tokens: 10000}
""",
    "policy.yaml",
)
BODY, HEADER = Ask("body", 0.7, 0.07, "marked"), Ask("header x-slo-ttft-ms", 0.8, slo_class="keyed")
EVERYTHING = Request([BODY, HEADER], 10, "flex", "llama-8B", 50)


def policed() -> Resolver:
    return Resolver(5.0, 0.1, policy=POLICY)


def test_each_source_counts_where_those_before_it_say_nothing() -> None:
    asked = [
        (EVERYTHING, (0.7, 0.07, "marked", "body", 2.0)),
        (replace(EVERYTHING, asks=[HEADER]), (0.8, 0.05, "keyed", "header x-slo-ttft-ms", 1.0)),
        (replace(EVERYTHING, asks=[]), (0.5, 0.05, "interactive", "priority", 4.0)),
        (replace(EVERYTHING, asks=[], priority=None), (10.1, 0.05, "batch", "service_tier", 1.0)),
        (
            replace(EVERYTHING, asks=[], priority=None, service_tier="auto"),
            (0.5, 0.05, "interactive", "policy file", 4.0),
        ),
        (Request(model="llama-70B", prompt_tokens=50), (5.0, 0.1, "default", "default", 1.0)),
    ]
    for request, (ttft_s, tbt_s, slo_class, source, weight) in asked:
        is_sheddable = slo_class == "batch"
        expected = Objective(ttft_s, tbt_s, slo_class, source, weight, is_sheddable)
        assert policed().resolve(request, now_s=0.0) == expected


CLASSES = st.sampled_from([None, *POLICY.classes])
SECONDS = st.one_of(st.none(), st.floats(2.0, 100.0))  # not tight, not too tight
ASKS = st.lists(st.builds(Ask, st.sampled_from("abc"), SECONDS, SECONDS, CLASSES, st.sampled_from([None, True, False])))


@settings(max_examples=200, deadline=None)
@given(ASKS, st.sampled_from([None, -20, 0, 10]), st.sampled_from([None, "flex", "auto"]), st.integers(0, 20_000))
def test_each_part_of_an_objective_comes_from_the_first_that_has_it(
    asks: Sequence[Ask], priority: int | None, tier: str | None, tokens: int
) -> None:
    resolved = policed().resolve(Request(asks, priority, tier, "llama-8B", tokens), now_s=0.0)
    behind = policed().resolve(Request([], priority, tier, "llama-8B", tokens), now_s=0.0)
    ttfts, tbts = [], []
    for ask in asks:
        terms = None if ask.slo_class is None else POLICY.classes[ask.slo_class]
        own_s = None if terms is None else terms.objective_s(tokens)
        if ask.ttft_s is not None or own_s is not None:
            ttfts.append((own_s if ask.ttft_s is None else ask.ttft_s, ask.source))
        if ask.tbt_s is not None or (terms is not None and terms.tbt_s is not None):
            tbts.append(terms.tbt_s if terms is not None and ask.tbt_s is None else ask.tbt_s)
    if tier == "flex" and priority is None:
        assert behind.slo_class == "batch"
    if not any("tight" in resolved.slo_source for _ in ttfts):
        assert (resolved.ttft_s, resolved.slo_source) == [*ttfts, (behind.ttft_s, behind.slo_source)][0]
    assert resolved.tbt_s == [*tbts, behind.tbt_s][0]
    named = [ask.slo_class for ask in asks if ask.slo_class is not None]
    assert resolved.slo_class == [*named, behind.slo_class][0]
    assert resolved.sheddable == (resolved.slo_class == "batch" or any(ask.sheddable for ask in asks))


def test_a_client_takes_no_request_out_of_those_that_its_class_lets_the_server_refuse() -> None:
    def may_be_refused(slo_class: str, said: bool | None) -> bool:
        return policed().resolve(Request([Ask("body", slo_class=slo_class, sheddable=said)]), now_s=0.0).sheddable

    assert [may_be_refused("batch", said) for said in (None, False, True)] == [True, True, True]
    assert [may_be_refused("keyed", said) for said in (None, False, True)] == [False, False, True]


def test_the_tightest_objective_that_a_client_may_ask_for_is_what_a_tighter_one_becomes() -> None:
    tight = Ask("body", 0.01, slo_class="interactive")
    found = policed().resolve(Request([tight]), now_s=0.0)
    assert (found.ttft_s, found.slo_source) == (0.2, "body, raised to min_ttft_s")
    assert policed().resolve(Request([replace(tight, ttft_s=0.3)]), now_s=0.0).slo_source == "body"
    # The policy's own objective is no client's.
    assert policed().resolve(Request(priority=10), now_s=0.0).ttft_s == 0.5


def test_the_time_between_tokens_has_a_bound_too() -> None:
    policy = parse("classes: {default: {tbt_s: 0.1, min_tbt_s: 0.02}, own: {min_tbt_s: 0.01}}", "policy.yaml")
    served = Resolver(5.0, 1.0, policy=policy)
    asks = [Ask("body", tbt_s=0.001), Ask("body", tbt_s=0.03), Ask("body"), Ask("body", tbt_s=0.001, slo_class="own")]
    assert [served.resolve(Request([ask]), 0.0).tbt_s for ask in asks] == [0.02, 0.03, 0.1, 0.01]


def test_a_class_without_bounds_has_those_of_the_class_default() -> None:
    """Else a client would name that class, and any objective."""
    bounds = "{ttft_s: 3, min_ttft_s: 1, min_tbt_s: 0.02, tight_per_minute: 2}"
    policy = parse(f"classes: {{default: {bounds}, batch: {{ttft_s: 60}}, quick: {{ttft_s: 0.5}}, none: {{}}}}", "f")
    served = Resolver(5.0, 1.0, policy=policy)

    def got(slo_class: str, ttft_s: float, tbt_s: float = 0.1) -> tuple[float, float]:
        found = served.resolve(Request([Ask("body", ttft_s, tbt_s, slo_class)]), 0.0)
        return found.ttft_s, found.tbt_s

    assert got("quick", 0.1, 0.001) == (0.5, 0.02), "raised to no more than what the class has for all"
    assert got("batch", 0.1, 0.001) == (1.0, 0.02)
    assert got("none", 0.1) == (1.0, 0.1)
    assert got("batch", 2.0) == (60.0, 0.1), "one more than all classes together may have"
    assert got("none", 2.0) == (3.0, 0.1)
    assert got("batch", 70.0) == (70.0, 0.1)


def test_beyond_the_rate_of_tight_requests_the_class_gives_its_own_objective() -> None:
    served, tight = policed(), Request([Ask("body", 0.3, slo_class="interactive")])
    assert [served.resolve(tight, now_s=1.0).ttft_s for _ in range(4)] == [0.3, 0.3, 0.5, 0.5]
    assert served.resolve(tight, now_s=1.0).slo_source == "policy file, beyond tight_per_minute"
    lax = replace(tight, asks=[Ask("body", 0.6, slo_class="interactive")])
    assert served.resolve(lax, now_s=1.0).ttft_s == 0.6
    assert [served.resolve(tight, now_s=31.0).ttft_s for _ in range(2)] == [0.3, 0.5]


def test_each_api_key_has_a_rate_of_its_own_where_the_policy_says_so() -> None:
    served, tight = policed(), Request([Ask("body", 0.3, slo_class="keyed")], api_key="a")
    first = [served.resolve(request, 0.0).ttft_s for request in (tight, tight, replace(tight, api_key="b"))]
    assert first == [0.3, 1.0, 0.3]


def test_a_class_has_no_more_requests_because_clients_name_it_than_it_may_have() -> None:
    """Further ones go by the rules and ``default``, and what they ask for besides is bounded there."""
    policy = parse(
        """
classes:
  quick: {ttft_s: 0.5, tbt_s: 0.05, weight: 4, named_per_minute: 2}
  long: {ttft_s: 60}
  default: {ttft_s: 3, min_ttft_s: 1}
priorities: {10: quick, 0: default}
service_tiers: {priority: quick}
smg_priorities: {system: quick}
rules: [{class: long, min_prompt_tokens: 1000}, {class: quick, max_prompt_tokens: 10}]
""",
        "policy.yaml",
    )
    named = Request([Ask("body", slo_class="quick")], prompt_tokens=100)
    beyond = Objective(3.0, 0.1, "default", "policy file, beyond named_per_minute")
    ways = [
        named,
        replace(named, asks=list(header_asks(Headers({"x-flowprefill-slo-class": "quick"}), policy))),
        replace(named, asks=list(header_asks(Headers({"x-smg-priority": "system"}), policy))),
        Request(priority=10, prompt_tokens=100),
        Request(service_tier="priority", prompt_tokens=100),
        replace(named, asks=[Ask("body", slo_class="quick", ttft_s=0.5)]),
    ]
    for way in ways:
        served = Resolver(5.0, 0.1, policy=policy)
        found = [served.resolve(way, now_s=1.0) for _ in range(4)]
        assert [one.slo_class for one in found] == ["quick", "quick", "default", "default"]
        assert [one.weight for one in found] == [4.0, 4.0, 1.0, 1.0]
        assert served.resolve(named, now_s=31.0).slo_class == "quick", "half a minute later one more"
    served = Resolver(5.0, 0.1, policy=policy)
    assert [served.resolve(named, 0.0) for _ in range(3)][2] == beyond
    assert served.resolve(replace(named, prompt_tokens=2000), 0.0).slo_class == "long"
    tight = served.resolve(replace(named, asks=[Ask("body", 0.2, slo_class="quick")]), 0.0)
    assert (tight.ttft_s, tight.slo_source) == (1.0, "body, beyond named_per_minute, raised to min_ttft_s")
    # What clients do not name is not counted: rules, SGLang's own priority, a class that says nothing in the end.
    assert [served.resolve(Request(prompt_tokens=5), 0.0).slo_class for _ in range(3)] == ["quick"] * 3
    given = Request(prompt_tokens=50, default_priority=10)
    assert [served.resolve(given, 0.0).slo_class for _ in range(3)] == ["quick"] * 3
    fresh = Resolver(5.0, 0.1, policy=policy)
    for _ in range(3):
        asked = Request([Ask("body", slo_class="long", tbt_s=1.0), Ask("header h", slo_class="quick")])
        assert fresh.resolve(asked, 0.0).slo_class == "long"
    assert fresh.resolve(named, 0.0).slo_class == "quick"


def test_no_detour_leads_past_how_often_a_class_may_be_named() -> None:
    """A class without objectives, named first, would get the request those of the next."""
    policy = parse("classes: {quick: {ttft_s: 0.5, named_per_minute: 1}, none: {}, default: {ttft_s: 3}}", "f")
    served = Resolver(5.0, 0.1, policy=policy)
    detour = Request([Ask("body", slo_class="none"), Ask("header h", slo_class="quick")])
    assert [served.resolve(detour, 0.0).ttft_s for _ in range(3)] == [0.5, 3.0, 3.0]


def test_a_request_that_may_not_name_one_of_its_classes_counts_for_none_of_them() -> None:
    policy = parse("classes: {a: {ttft_s: 0.5, named_per_minute: 1}, b: {tbt_s: 0.05, named_per_minute: 1}}", "f")
    for had, free in ("ab", "ba"):
        served = Resolver(5.0, 0.1, policy=policy)
        both = Request([Ask("body", slo_class="a"), Ask("header h", slo_class="b")])
        assert served.resolve(Request([Ask("body", slo_class=had)]), 0.0).slo_class == had
        assert served.resolve(both, 0.0) == Objective(5.0, 0.1, "default", "default, beyond named_per_minute")
        assert served.resolve(Request([Ask("body", slo_class=free)]), 0.0).slo_class == free
        assert served.resolve(both, 60.0) == Objective(0.5, 0.05, "a", "body")
        for name in (had, free):
            assert served.resolve(Request([Ask("body", slo_class=name)]), 60.0).slo_class == "default"


def test_each_api_key_may_name_a_class_so_often_where_the_policy_says_so() -> None:
    policy = parse("classes: {quick: {ttft_s: 0.5, named_per_minute: 1, tight_by: api_key}}", "f")
    served, named = Resolver(5.0, 0.1, policy=policy), Request([Ask("body", slo_class="quick")], api_key="a")
    classes = [served.resolve(one, 0.0).slo_class for one in (named, named, replace(named, api_key="b"))]
    assert classes == ["quick", "default", "quick"]


def test_the_priority_that_sglang_gives_all_others_counts_behind_the_service_tier() -> None:
    given = Request(service_tier="flex", prompt_tokens=50, default_priority=10)
    assert policed().resolve(given, 0.0).slo_source == "service_tier"
    found = policed().resolve(replace(given, service_tier="auto"), 0.0)
    assert (found.slo_class, found.slo_source) == ("interactive", "default priority")
    assert policed().resolve(replace(given, priority=0, service_tier=None), 0.0).slo_class == "keyed"
    by_option = Resolver(5.0, 0.1, PriorityClasses.parse("10:0.5,0:2"))
    assert by_option.resolve(Request(default_priority=3), 0.0) == Objective(2.0, 0.1, slo_source="default priority")


def test_a_minute_has_at_most_twice_its_rate() -> None:
    bucket = PerMinute()
    times = [0.5 * index for index in range(240)]
    taken = [now_s for now_s in times if bucket.take(("class", ""), 10.0, now_s)]
    for start_s in times:
        assert sum(start_s <= now_s < start_s + 60 for now_s in taken) <= 20
    assert len(taken) in range(28, 31)


def test_priorities_of_the_option_have_the_place_of_the_policys() -> None:
    by_option = Resolver(5.0, 0.1, PriorityClasses.parse("10:0.5,0:2"))
    assert by_option.resolve(Request(priority=12), 0.0) == Objective(0.5, 0.1, "default", "priority")
    assert by_option.resolve(Request([Ask("body", 1.0)], 12), 0.0) == Objective(1.0, 0.1, "default", "body")
    assert by_option.resolve(Request(service_tier="flex"), 0.0) == Objective(5.0, 0.1)


def test_bounds_are_for_what_clients_ask_for() -> None:
    policy = parse("classes: {default: {ttft_s: 3, min_ttft_s: 1, tight_per_minute: 1}}", "policy.yaml")
    served = Resolver(5.0, 0.1, PriorityClasses.parse("10:0.5"), policy)
    assert [served.resolve(Request(priority=10), 0.0).ttft_s for _ in range(3)] == [0.5, 0.5, 0.5]


def test_priorities_of_a_policy_count_in_both_directions() -> None:
    low_first = parse("classes: {a: {ttft_s: 1}, b: {ttft_s: 9}}\npriorities: {0: a, 10: b}", "policy.yaml")
    assert [low_first.of_priority(number) for number in (-5, 0, 1, 10, 99)] == ["a", "a", "b", "b", "b"]
    assert [POLICY.of_priority(number) for number in (99, 10, 9, 0, -1, -99)] == [
        *("interactive", "interactive", "keyed", "keyed", "batch", "batch")
    ]


def test_a_class_called_default_has_the_requests_that_belong_to_no_other() -> None:
    policy = parse("classes: {default: {ttft_s: 3, tbt_s: 0.3, weight: 2}}", "policy.yaml")
    found = Resolver(5.0, 0.1, policy=policy).resolve(Request(), 0.0)
    assert found == Objective(3.0, 0.3, "default", "policy file", 2.0)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, []),
        ({"X-LLM-D-SLO-TTFT-MS": "250"}, [Ask("header x-llm-d-slo-ttft-ms", 0.25)]),
        (
            {"x-slo-ttft-ms": "300", "x-llm-d-slo-ttft-ms": "2.5e2"},
            [Ask("header x-llm-d-slo-ttft-ms", 0.25), Ask("header x-slo-ttft-ms", 0.3)],
        ),
        ({"x-flowprefill-slo-class": "batch"}, [Ask("header x-flowprefill-slo-class", slo_class="batch")]),
        ({"x-smg-priority": "Bulk"}, [Ask("header X-SMG-Priority", slo_class="batch")]),
        ({"X-SMG-Priority": "interactive"}, [Ask("header X-SMG-Priority", slo_class="interactive")]),
        ({"X-SMG-Priority": "system"}, [Ask("header X-SMG-Priority")]),
    ],
)
def test_headers_ask_for_objectives_and_classes(headers: dict[str, str], expected: list[Ask]) -> None:
    assert list(header_asks(Headers(headers), POLICY)) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms") for value in ("", "soon", "-1", "0")),
        *(("x-slo-ttft-ms", value) for value in ("nan", "inf", "1e999", "0.5s", "1e13")),
        ("x-flowprefill-slo-class", "no class"),
        ("x-flowprefill-slo-class", ""),
    ],
)
def test_a_wrong_header_is_refused_with_its_name_and_value(name: str, value: str) -> None:
    with pytest.raises(SloError) as error:
        list(header_asks(Headers({name: value}), POLICY))
    assert f"header {name}" in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("custom_params", "word"),
    [
        ({"slo_class": 3}, "name of a class"),
        ({"slo_class": "two words"}, "name of a class"),
        ({"slo_class": "x" * 65}, "name of a class"),
        ({"sheddable": 1}, "true or false"),
        ({"ttft_slo": 0}, "positive"),
    ],
)
def test_a_wrong_body_is_refused_with_the_value(custom_params: dict[str, Any], word: str) -> None:
    with pytest.raises(SloError, match=word):
        body_ask(custom_params)


def test_a_class_that_is_not_there_is_refused_with_those_that_are() -> None:
    policed().check([Ask("body", slo_class="batch"), Ask("body", slo_class="default"), Ask("body")])
    with pytest.raises(SloError, match=r"The body names the class 'urgent'; there are interactive, .*, default\."):
        policed().check([Ask("body", slo_class="urgent")])
    with pytest.raises(SloError, match="this server has no --flowprefill-slo-policy"):
        Resolver(5.0, 0.1).check([Ask("body", slo_class="batch")])


def test_what_is_resolved_is_what_the_scheduler_reads() -> None:
    promised = Objective(0.25, 0.05, "interactive", "header x-slo-ttft-ms", 4.0, True)
    defaults = resolver(FlowPrefillConfig())

    def read(custom_params: Any) -> Objective:
        params = SimpleNamespace(custom_params=custom_params)
        return objective(SimpleNamespace(rid="r", sampling_params=params, input_text=None), defaults)

    travelled = json.loads(json.dumps(promised.to_custom_params()))
    assert read(travelled | {"other": 1}) == promised
    # A request that came past the HTTP process, by what its client names.
    assert read(None) == Objective(5.0, 0.1)
    assert read({"ttft_slo": 2, "slo_source": "me"}) == Objective(2.0, 0.1, slo_source="body")


TRAVELS = Objective(0.25, 0.05, "interactive", "body", 4.0, True).to_custom_params()


@pytest.mark.parametrize("key", ["ttft_slo", "tbt_slo", "slo_weight"])
@pytest.mark.parametrize("value", ["nan", math.nan, 0, -1, True, "2", None, [2]])
def test_what_the_server_cannot_have_written_is_not_taken_for_resolved(key: str, value: Any) -> None:
    assert Objective.resolved(TRAVELS) is not None
    assert Objective.resolved(TRAVELS | {key: value}) is None
    assert Objective.resolved({name: told for name, told in TRAVELS.items() if name != key}) is None


@pytest.mark.parametrize("weight", [math.inf, 1e7])
def test_no_weight_is_above_those_that_a_policy_may_have(weight: float) -> None:
    assert Objective.resolved(TRAVELS | {"slo_weight": weight}) is None


# ---- the hooks ------------------------------------------------------------------------------------------------------


def http(body: Any, headers: dict[str, str] | None = None) -> HttpRequest:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent, "more_body": False}

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return HttpRequest({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def manager_of(disaggregation_mode: str) -> Any:
    """What the hooks read of SGLang's TokenizerManager."""
    return SimpleNamespace(
        served_model_name="served-8B", server_args=SimpleNamespace(disaggregation_mode=disaggregation_mode)
    )


MANAGER = manager_of("null")


async def passed(
    hooks: Objectives,
    request: Any,
    sampling: Any = None,
    priority: int | None = None,
    default_priority: int | None = None,
    manager: Any = MANAGER,
) -> dict[str, Any]:
    """The ``custom_params`` with which a prompt leaves for the scheduler of a server with this ``default_priority``."""

    async def generate_request(manager: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
        obj.priority = default_priority if obj.priority is None else obj.priority  # as SGLang does
        custom_params = (obj.sampling_params or {}).get("custom_params")
        tokenized = SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=custom_params), input_ids=range(len(obj.text.split()))
        )
        assert hooks.resolve(tokenized, manager, obj, obj.text, None) is None
        yield tokenized.sampling_params.custom_params

    obj = SimpleNamespace(text="a b c", sampling_params=sampling, priority=priority, received_time=None)
    async for answer in hooks.read_request(generate_request, manager, obj, request):
        return dict(answer)
    raise AssertionError("no answer")


def promised(hooks: Objectives, *args: Any, **kwargs: Any) -> tuple[float, str, str]:
    sent = asyncio.run(passed(hooks, *args, **kwargs))
    return sent["ttft_slo"], sent["slo_class"], sent["slo_source"]


def test_every_way_in_leads_to_the_scheduler() -> None:
    hooks = Objectives(policed())
    top = {"custom_params": {"ttft_slo": 2}}
    assert promised(hooks, http(top)) == (2.0, "interactive", "body")
    assert promised(hooks, http(top, {"x-slo-ttft-ms": "900"})) == (2.0, "interactive", "body")
    assert promised(hooks, http({}), {"custom_params": {"ttft_slo": 3, "x": 1}}) == (3.0, "interactive", "body")
    assert promised(hooks, http({}, {"X-Slo-Ttft-Ms": "900"})) == (0.9, "interactive", "header x-slo-ttft-ms")
    assert promised(hooks, http({"priority": -5})) == (10.006, "batch", "priority")
    assert promised(hooks, http({"priority": -5}), priority=10) == (0.5, "interactive", "priority")
    assert promised(hooks, http({"service_tier": "flex"})) == (10.006, "batch", "service_tier")
    assert promised(hooks, http({"model": "llama-70B"})) == (5.0, "default", "default")
    # sgl.Engine has no HTTP request, gRPC one without a body, an upload one that is no JSON.
    assert promised(hooks, None, {"custom_params": {"slo_class": "keyed"}}) == (1.0, "keyed", "body")
    grpc = SimpleNamespace(headers={"x-slo-ttft-ms": "800"})
    assert promised(hooks, grpc) == (0.8, "interactive", "header x-slo-ttft-ms")
    assert promised(hooks, http(b"--boundary")) == (0.5, "interactive", "policy file")


def test_what_only_the_server_says_is_not_the_clients_to_write() -> None:
    hooks = Objectives(policed())
    forged = {"custom_params": {"slo_weight": 1e9, "slo_source": "me", "slo_class": "keyed"}}
    sent = asyncio.run(passed(hooks, http({}), forged))
    assert (sent["slo_weight"], sent["slo_source"]) == (1.0, "body")


def test_no_custom_params_take_a_request_past_the_policy() -> None:
    hooks = Objectives(policed())
    for custom_params in ("text", "", [], 0):
        with pytest.raises(SloError, match="must be an object"):
            asyncio.run(passed(hooks, http({"priority": -5}), {"custom_params": custom_params}))
    assert promised(hooks, http({"priority": -5}), {"custom_params": None})[1] == "batch"


def test_requests_at_the_same_time_keep_their_own_headers() -> None:
    hooks = Objectives(policed())

    async def both() -> list[dict[str, Any]]:
        requests = [http({}, {"x-slo-ttft-ms": str(ms)}) for ms in range(1000, 1050)]
        return list(await asyncio.gather(*(passed(hooks, one) for one in requests)))

    assert [sent["ttft_slo"] for sent in asyncio.run(both())] == [ms / 1e3 for ms in range(1000, 1050)]


def test_a_request_goes_by_one_policy_to_its_end_and_the_next_one_by_the_next() -> None:
    hooks = Objectives(policed())

    async def a_list(manager: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
        found = []
        for _ in range(2):
            tokenized = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=None), input_ids=range(3))
            hooks.resolve(tokenized, manager, obj)
            found.append(tokenized.sampling_params.custom_params["ttft_slo"])
            hooks.use(parse("classes: {other: {ttft_s: 9}}", "policy.yaml"))  # while the second one is tokenized
        yield found

    async def answer() -> Any:
        obj = SimpleNamespace(sampling_params=None, priority=10, received_time=None)
        return await anext(aiter(hooks.read_request(a_list, MANAGER, obj, http({}))))

    assert asyncio.run(answer()) == [0.5, 0.5]
    assert promised(hooks, http({"custom_params": {"slo_class": "other"}}))[:2] == (9.0, "other")


def test_what_a_class_has_had_of_tight_requests_outlives_its_policy() -> None:
    hooks = Objectives(policed(), clock=lambda: 0.0)
    tight = http({"custom_params": {"slo_class": "interactive", "ttft_slo": 0.3}})
    assert [promised(hooks, tight)[0] for _ in range(2)] == [0.3, 0.3]
    hooks.use(POLICY.model_copy())
    assert promised(hooks, tight) == (0.5, "interactive", "policy file, beyond tight_per_minute")


def test_a_decode_server_which_sees_what_a_pool_of_prefill_servers_got_counts_no_requests() -> None:
    policy = parse("classes: {quick: {ttft_s: 1, named_per_minute: 1}, strict: {ttft_s: 3, tight_per_minute: 1}}", "f")
    named = http({"custom_params": {"slo_class": "quick"}})
    tight = http({"custom_params": {"slo_class": "strict", "ttft_slo": 2}})

    def got_s(request: HttpRequest, mode: str) -> list[float]:
        hooks = Objectives(Resolver(5.0, 0.1, policy=policy), clock=lambda: 0.0)
        return [promised(hooks, request, manager=manager_of(mode))[0] for _ in range(3)]

    for mode in ("prefill", "null"):
        assert got_s(named, mode) == [1.0, 5.0, 5.0]
        assert got_s(tight, mode) == [2.0, 3.0, 3.0]
    assert got_s(named, "decode") == [1.0] * 3
    assert got_s(tight, "decode") == [2.0] * 3


@pytest.mark.parametrize(
    ("body", "headers", "sentence"),
    [
        ({"custom_params": {"tbt_slo": -1}}, {}, "positive, finite number of seconds"),
        ({"custom_params": {"slo_class": "urgent"}}, {}, "there are interactive"),
        ({"sampling_params": [{}, {"custom_params": {"slo_class": "urgent"}}]}, {}, "there are interactive"),
        (
            {"custom_params": {"slo_class": "batch"}, "sampling_params": {"custom_params": {"slo_class": "keyed"}}},
            {},
            "'batch' at the top of the request, but 'keyed'",
        ),
        ({"custom_params": [{"ttft_slo": 1}]}, {}, "must be an object"),
        ({"sampling_params": {"custom_params": "text"}}, {}, "must be an object"),
        ({}, {"x-slo-ttft-ms": "soon"}, "positive, finite number of milliseconds"),
        ({}, {"x-flowprefill-slo-class": "urgent"}, "there are interactive"),
    ],
)
def test_a_stream_with_a_wrong_objective_is_a_400_before_it_begins(
    body: dict[str, Any], headers: dict[str, str], sentence: str
) -> None:
    hooks = Objectives(policed())

    async def endpoint(*args: Any) -> str:
        return "begun"

    with pytest.raises(HTTPException, match=sentence) as error:
        asyncio.run(hooks.check_first(endpoint, "handler", http(body, headers)))
    assert error.value.status_code == 400
    assert asyncio.run(hooks.check_first(endpoint, "handler", http({}))) == "begun"
    sampling = body.get("sampling_params")
    with pytest.raises(SloError, match=sentence):
        asyncio.run(passed(hooks, http(body, headers), sampling[-1] if isinstance(sampling, list) else sampling))


@pytest.mark.parametrize("claimed_s", [None, 1_790_000_000.0, -1.0])
def test_a_generate_request_is_received_when_it_comes_whatever_its_body_says(claimed_s: float | None) -> None:
    now_s = iter([5.0, 9.0])
    hooks = Objectives(policed(), clock=lambda: next(now_s))

    async def endpoint(obj: GenerateReqInput, request: Any) -> list[float]:
        return [time_s async for time_s in hooks.read_request(received_s, MANAGER, obj, request)]

    obj = GenerateReqInput(text="a b c", received_time=claimed_s)
    assert asyncio.run(hooks.check_first(endpoint, obj, http({"received_time": claimed_s}))) == [5.0]


def test_a_request_of_grpc_is_received_when_it_comes_and_not_by_the_wall_clock() -> None:
    """The server in SGLang's wheel writes the time of the wall clock into what is no OpenAI request."""
    hooks = Objectives(policed(), clock=lambda: 5.0)

    async def received() -> float:
        obj = GenerateReqInput(text="a b c", received_time=1_790_000_000.0)
        return await anext(aiter(hooks.read_request(received_s, MANAGER, obj, None)))

    assert asyncio.run(received()) == 5.0


async def received_s(manager: Any, obj: GenerateReqInput, request: Any) -> AsyncIterator[float]:
    await asyncio.sleep(0)
    assert obj.received_time is not None
    yield obj.received_time


def test_what_is_generated_after_an_answer_counts_from_when_it_begins_and_what_runs_beside_it_does_not() -> None:
    """As turns behind tools do, and pieces of a long recording, which have the time of the first."""
    now_s = iter([5.0, 6.0, 9.0])
    hooks = Objectives(policed(), clock=lambda: next(now_s))

    async def endpoint(handler: Any, *, raw_request: Any) -> list[float]:
        def generate(claimed_s: float | None) -> Any:
            obj = GenerateReqInput(text="a", received_time=claimed_s)
            return anext(aiter(hooks.read_request(received_s, MANAGER, obj, raw_request)))

        beside = await asyncio.gather(generate(None), generate(1.0))
        return [*beside, await generate(1.0), await generate(None)]

    found = asyncio.run(hooks.check_first(endpoint, "handler", raw_request=http({})))
    assert found == [5.0, 5.0, 6.0, 9.0]


def test_an_endpoint_that_gets_its_http_request_by_name_is_checked_first_too() -> None:
    """As that of transcriptions does, whose body is a form."""
    hooks = Objectives(policed())

    async def endpoint(handler: Any, *, raw_request: Any) -> str:
        return "begun"

    wrong = http(b"--boundary", {"x-slo-ttft-ms": "soon"})
    with pytest.raises(HTTPException, match="positive, finite number of milliseconds"):
        asyncio.run(hooks.check_first(endpoint, "handler", raw_request=wrong))
    assert asyncio.run(hooks.check_first(endpoint, "handler", raw_request=http(b"--boundary"))) == "begun"


def test_the_priority_that_sglang_gives_a_request_is_not_what_its_client_asks_for() -> None:
    """SGLang gives it also where it passes no priority of the body on."""
    hooks = Objectives(policed())
    assert promised(hooks, http({"priority": -5}), default_priority=10) == (10.006, "batch", "priority")
    assert promised(hooks, http({}), priority=0, default_priority=10)[1:] == ("keyed", "priority")
    assert promised(hooks, http({"service_tier": "flex"}), default_priority=10)[1:] == ("batch", "service_tier")
    assert promised(hooks, http({}), default_priority=10)[1:] == ("interactive", "default priority")


def test_a_prompt_of_embeddings_is_as_long_as_they_are_many() -> None:
    hooks = Objectives(policed())

    async def generate(manager: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
        embeds = [[0.5]] * 10_000
        tokenized = SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=None), input_ids=None, input_embeds=embeds
        )
        hooks.resolve(tokenized, manager, obj)
        yield tokenized.sampling_params.custom_params

    async def sent() -> Any:
        obj = GenerateReqInput(input_embeds=[[0.5]] * 10_000)
        return await anext(aiter(hooks.read_request(generate, MANAGER, obj)))

    found = asyncio.run(sent())
    assert (found["slo_class"], found["ttft_slo"]) == ("batch", 30.0)


def test_an_api_key_is_the_same_however_its_scheme_is_spelt() -> None:
    hooks = Objectives(policed(), clock=lambda: 0.0)

    def promised_s(key: str) -> float:
        body = {"custom_params": {"slo_class": "keyed", "ttft_slo": 0.3}}
        return promised(hooks, http(body, {"Authorization": key}))[0]

    spelt = ("Bearer k", "bearer k", "BEARER   k", "Bearer k ", "k")
    assert [promised_s(key) for key in spelt] == [0.3, 1.0, 1.0, 1.0, 1.0]
    assert promised_s("Bearer other") == 0.3


@pytest.mark.parametrize("by_endpoint_s", [None, 4.0], ids=["sglang.Engine", "OpenAI"])
@pytest.mark.parametrize("prompts", ["a b c", ["a b c", "d"]], ids=["one", "two"])
def test_all_samples_of_a_prompt_count_from_when_their_request_was_received(
    prompts: str | list[str], by_endpoint_s: float | None
) -> None:
    """SGLang prefills their prompt first, and makes copies of the request after that."""
    now_s = iter([5.0])

    async def samples(manager: Any, obj: GenerateReqInput, request: Any) -> AsyncIterator[float]:
        obj.normalize_batch_and_arguments()
        for number in range(obj.batch_size):
            for _ in range(obj.parallel_sample_num):
                stats = APIServerReqTimeStats()
                stats.set_created_time(copy.copy(obj[number]).received_time)
                yield stats.created_time

    async def received_s(obj: GenerateReqInput) -> set[float]:
        return {time_s async for time_s in hooks.read_request(samples, MANAGER, obj, None)}

    hooks = Objectives(policed(), clock=lambda: next(now_s))
    obj = GenerateReqInput(text=prompts, sampling_params={"n": 2}, received_time=by_endpoint_s)
    assert asyncio.run(received_s(obj)) == {by_endpoint_s or 5.0}
