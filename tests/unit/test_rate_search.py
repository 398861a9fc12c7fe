"""Bisection over rate: it ends where the attainment does, whatever it begins with, and is not led astray by noise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.bench.capacity.rate_search import Bracket, RateSearch, Verdict, bracket, decided


@given(st.floats(0.4, 50), st.floats(0.1, 100))
def test_a_search_ends_within_its_precision_wherever_it_begins(true_rps: float, guess_rps: float) -> None:
    search = RateSearch(guess_rps, least_rps=0.3, precision=1.05)
    verdicts: list[Verdict] = []
    while (rate_rps := search.next_rps(verdicts)) is not None:
        left = search.probes_left(verdicts)
        assert left > 0
        verdicts.append((rate_rps, rate_rps <= true_rps))
        assert len(verdicts) < 40
    low_rps, high_rps = bracket(verdicts)
    assert low_rps <= true_rps < high_rps <= low_rps * 1.05
    assert search.probes_left(verdicts) == 0


def test_a_search_from_a_good_guess_needs_few_probes() -> None:
    search, verdicts = RateSearch(2.1, least_rps=0.3, precision=1.08), []
    while (rate_rps := search.next_rps(verdicts)) is not None:
        verdicts.append((rate_rps, rate_rps <= 2.3))
    assert len(verdicts) <= 5


def test_a_system_that_keeps_no_rate_ends_at_zero() -> None:
    search, verdicts = RateSearch(2.0, least_rps=0.5, precision=1.08), []
    while (rate_rps := search.next_rps(verdicts)) is not None:
        verdicts.append((rate_rps, False))
    assert min(rate for rate, _ in verdicts) == 0.5
    assert bracket(verdicts) == Bracket(0.0, 0.5)
    assert bracket(verdicts).rate_rps == 0.0


def test_a_search_ends_when_the_rate_to_beat_is_not_kept_and_goes_on_when_it_is() -> None:
    search = RateSearch(2.0, least_rps=0.5, precision=1.08, to_beat_rps=5.0)
    assert search.next_rps([]) == 5.0
    assert search.probes_left([]) == 1
    assert search.next_rps([(5.0, False)]) is None
    assert search.next_rps([(5.0, True)]) == 5.0 * search.step
    assert search.next_rps([(4.0, True), (5.2, False)]) == 5.0
    assert search.next_rps([(4.9, True), (5.2, False)]) is None, "known to within the precision"


def test_contradicting_verdicts_are_settled_by_the_most_and_then_by_caution() -> None:
    assert bracket([(1.0, True), (2.0, False), (3.0, True), (4.0, True), (5.0, False)]) == Bracket(4.0, 5.0)
    assert bracket([(1.0, True), (2.0, False), (3.0, True), (4.0, False)]) == Bracket(1.0, 2.0)
    assert bracket([(2.0, True), (2.0, False), (2.0, False)]) == Bracket(0.0, 2.0)
    assert bracket([]) == Bracket(0.0, math.inf)


@pytest.mark.parametrize(
    ("met", "missed", "verdict"),
    [(90, 0, True), (89, 10, None), (0, 10, None), (0, 11, False), (90, 10, True), (89, 11, False)],
)
def test_a_replay_is_decided_as_soon_as_nothing_can_change_it(met: int, missed: int, verdict: bool | None) -> None:
    assert decided(met, missed, 100, 0.9) is verdict


def test_a_share_of_a_few_requests_is_rounded_to_whole_requests() -> None:
    assert decided(29, 1, 30, 0.99) is False
    assert decided(30, 0, 30, 0.99) is True
    assert decided(27, 3, 30, 0.9) is True
