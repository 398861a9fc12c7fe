"""What a prefill server knows of a request, on its way to the decode server in what SGLang sends with the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.disaggregation.utils import MetadataBuffers

from sgl_flowprefill.carried import CAUSES, FORMAT, MOST_SUSPENSIONS, WORDS, Carried, decode, encode
from sgl_flowprefill.misses import Course, judge
from sgl_flowprefill.patches import carried_report

ROOM = 0x1234_5678_9ABC_DEF0
TIMES = st.none() | st.floats(-1e9, 1e9, width=32)
WORD = st.integers(-(1 << 31), (1 << 31) - 1)
SOME = Carried(
    cause_if_late=CAUSES[-1],
    ttft_slo_s=0.25,
    predicted_s=0.5,
    slack_at_admission_s=-2.25,
    waited_s=0.125,
    suspended_s=0.0,
    blocked_s=None,
    suspensions=3,
)
OTHERS = Carried(
    cause_if_late=CAUSES[0],
    ttft_slo_s=None,
    predicted_s=8.0,
    slack_at_admission_s=None,
    waited_s=None,
    suspended_s=1.5,
    blocked_s=0.25,
    suspensions=0,
)


@given(
    st.builds(
        Carried,
        cause_if_late=st.sampled_from(CAUSES),
        ttft_slo_s=TIMES,
        predicted_s=TIMES,
        slack_at_admission_s=TIMES,
        waited_s=TIMES,
        suspended_s=TIMES,
        blocked_s=TIMES,
        suspensions=st.integers(0, MOST_SUSPENSIONS),
    ),
    st.integers(0, (1 << 63) - 1),
)
def test_what_is_written_is_what_is_read(carried: Carried, room: int) -> None:
    words = encode(carried, room)
    assert len(words) == WORDS
    assert torch.tensor(words, dtype=torch.int32).tolist() == list(words)
    assert decode(words, room) == carried


def test_times_are_told_to_the_microsecond() -> None:
    found = decode(encode(Carried(**{**_fields(SOME), "predicted_s": 12.345678}), ROOM), ROOM)
    assert found is not None
    assert found.predicted_s == pytest.approx(12.345678, abs=1e-6)


def test_more_suspensions_than_there_is_room_for_leave_the_rest_as_it_is() -> None:
    found = decode(encode(Carried(**{**_fields(SOME), "suspensions": 1 << 40}), ROOM), ROOM)
    assert found == Carried(**{**_fields(SOME), "suspensions": MOST_SUSPENSIONS})


def _fields(carried: Carried) -> dict[str, Any]:
    return {name: getattr(carried, name) for name in Carried.__struct_fields__}


@given(st.lists(WORD, min_size=WORDS, max_size=WORDS).filter(lambda words: words[0] != FORMAT))
def test_what_does_not_begin_as_it_should_is_not_believed(words: list[int]) -> None:
    assert decode(words, ROOM) is None


@pytest.mark.parametrize(
    "change",
    [
        {0: FORMAT + 1},  # of another release
        {1: 1},  # of another request
        {8: -1},
        {8: len(CAUSES)},
    ],
)
def test_words_of_another_format_or_request_are_not_believed(change: dict[int, int]) -> None:
    words = dict(enumerate(encode(SOME, ROOM)))
    assert decode(list(words.values()), ROOM) == SOME
    assert decode(list((words | change).values()), ROOM) is None
    assert decode([0] * WORDS, 0) is None, "nobody has written"


def test_each_cause_that_can_be_found_when_a_prefill_has_run_has_a_number() -> None:
    took: list[dict[str, float]] = [
        {"alone_s": 2.0},
        {"alone_s": 0.5, "arrived_s": 0.6},
        {"alone_s": 0.5, "ready_s": 0.6},
        {"computed_s": 0.9},
        {"alone_s": 0.5, "overrun_s": 1.5},
        {"alone_s": 0.5},
    ]
    usual = {"received_s": 0.0, "deadline_s": 1.0, "arrived_s": 0.1, "ready_s": 0.2, "computed_s": 2.0}
    found = [judge(Course(**(usual | one), first_token_s=3.0), 3.0).cause for one in took]
    assert found == list(CAUSES)


# ---- in SGLang's buffers --------------------------------------------------------------------------------------------


def buffers(rows: int = 2) -> Any:
    return MetadataBuffers(rows, hidden_size=16, hidden_states_dtype=torch.float32, max_sampling_mask_tokens=16)


def prefilled(row: int, room: int | None) -> Any:
    """What is read of SGLang's Req when its KV cache is sent; some of it by 0.5.22 alone."""
    return SimpleNamespace(
        metadata_buffer_index=row,
        bootstrap_room=room,
        output_ids=[7],
        cached_tokens=31,
        cached_tokens_device=32,
        cached_tokens_host=33,
        cached_tokens_storage=34,
        get_mm_token_counts=lambda: (35, 36, 37),
        multimodal_inputs=SimpleNamespace(compute_mm_token_counts=lambda: (35, 36, 37)),
        return_logprob=False,
        return_sampling_mask=False,
        hidden_states_tensor=None,
    )


def sent(source: Any, row: int, room: int | None, carried: Carried | None) -> torch.Tensor:
    """The row that goes to the decode server, as SGLang has it sent."""
    req = prefilled(row, room)
    carried_report.write(source, req, carried)
    source.set_buf(req)
    assert source.cached_tokens[row, : carried_report.OURS.start].tolist() == [31, 32, 33, 34, 35, 36, 37]
    return source.cached_tokens[row].clone()


def arrived(target: Any, row: int, room: int | None, cached_tokens: torch.Tensor | None, req: Any = None) -> Any:
    """The request at a decode server at whose ``row`` this has come."""
    if cached_tokens is not None:
        target.cached_tokens[row] = cached_tokens
    decode_req = SimpleNamespace(req=req or SimpleNamespace(bootstrap_room=room), metadata_buffer_index=row)
    carried_report.read(None, SimpleNamespace(metadata_buffers=target), decode_req)
    return decode_req.req


def test_a_row_of_sglangs_brings_what_was_written_beside_its_own_numbers() -> None:
    source, target = buffers(), buffers()
    assert carried_report.of(arrived(target, 0, ROOM, sent(source, 1, ROOM, SOME))) == SOME
    assert carried_report.of(arrived(target, 0, 5, sent(source, 1, 5, OTHERS))) == OTHERS


def test_a_row_says_nothing_of_a_request_that_nothing_is_known_of() -> None:
    source, target = buffers(), buffers()
    rooms: Sequence[tuple[int | None, Carried | None]] = [(6, None), (None, SOME)]
    for room, carried in rooms:
        sent(source, 1, ROOM, SOME)
        row = sent(source, 1, room, carried)
        assert not row[carried_report.OURS].any(), "of the request that had it before"
        assert carried_report.of(arrived(target, 0, room, row)) is None
    arrived(target, 0, ROOM, sent(source, 1, ROOM, SOME))
    assert carried_report.of(arrived(target, 0, 6, None)) is None, "of whom nothing came"
    assert carried_report.of(SimpleNamespace()) is None


def test_what_came_at_first_counts_when_a_stream_was_handed_back() -> None:
    source, target = buffers(), buffers()
    for first in (SOME, None):
        req = arrived(target, 0, ROOM, sent(source, 1, ROOM, first))
        again = arrived(target, 1, ROOM, sent(source, 0, ROOM, OTHERS), req)
        assert carried_report.of(again) == first


def test_servers_whose_rows_have_no_room_do_without() -> None:
    narrow = SimpleNamespace(cached_tokens=torch.zeros((2, carried_report.OURS.stop - 1), dtype=torch.int32))
    carried_report.write(narrow, prefilled(1, ROOM), SOME)
    assert not narrow.cached_tokens.any()
    assert carried_report.of(arrived(narrow, 0, ROOM, None)) is None
