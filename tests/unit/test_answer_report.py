"""What answers say of their requests, from the scheduler to the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("sglang")

from sglang.srt.entrypoints.openai.protocol import ResponsesRequest, ResponsesResponse
from sglang.srt.managers.io_struct import GenerateReqInput, unwrap_from_pickle
from sglang.srt.managers.schedule_batch import FINISH_LENGTH

from sgl_flowprefill.answers import REPORT_KEY, Report, report, report_of_first_token, table
from sgl_flowprefill.carried import Carried
from sgl_flowprefill.events import Abort, Arrival, Complete, Fail, Leave, Ready, Resume, Start, Suspend
from sgl_flowprefill.misses import Cause
from sgl_flowprefill.outcomes import Outcomes
from sgl_flowprefill.patches import answer_report, carried_report
from sgl_flowprefill.runtime.event_recorder import AnswerReports, EventRecorder
from sgl_flowprefill.slo import Objective
from tests.decode_streamer import decode_streamer, decoding

DOCS = Path(__file__).parents[2] / "docs"
TOLD = {"met": True, "ttft_s": 0.25}
CARRIED = Carried(
    cause_if_late=Cause.OVERLOAD,
    ttft_slo_s=0.3000001,
    predicted_s=0.2,
    slack_at_admission_s=-0.05,
    waited_s=0.15,
    suspended_s=0.0,
    blocked_s=None,
    suspensions=2,
)
KNOWN_OF_PREFILL = {
    "predicted_s": 0.2,
    "slack_at_admission_s": -0.05,
    "waited_s": 0.15,
    "suspended_s": 0.0,
    "suspensions": 2,
}
STREAM = [
    'data: {"id":"1","choices":[{"index":0,"text":"\\"finish_reason\\":\\"stop\\"","finish_reason":null}]}\n\n',
    'data: {"id":"1","choices":[{"index":0,"text":"b","finish_reason":"stop"}]}\n\n',
    'data: {"id":"1","choices":[],"usage":{"prompt_tokens":3}}\n\n',
    "data: [DONE]\n\n",
]


class Req:
    """What is read of SGLang's Req."""

    def __init__(self, rid: str, finished: bool) -> None:
        self.rid = rid
        self.is_over = finished

    def finished(self) -> bool:
        return self.is_over


def recorder_of(decodes: bool = True) -> tuple[EventRecorder, AnswerReports]:
    recorder = EventRecorder(None, decodes=decodes)
    return recorder, AnswerReports(recorder)


def prefill(recorder: EventRecorder, rid: str, task: int = 0) -> None:
    recorder.write(Arrival, 10.0, rid, 100, 1.0, 11.0, 10.0, "chat", "body")
    recorder.write(Ready, 10.1, rid, 10.05, 90, 10, 0.2)
    recorder.write(Start, 10.2, task, [rid], 90, 10, 0.2)
    recorder.write(Complete, 10.5, task, [rid], 9, 0.3, 0.2, 0.2, 0.2)


def test_a_report_has_what_the_docs_say() -> None:
    outcomes = Outcomes(decodes=True)
    for event in (
        Arrival(10.0, "a", 100, 0.4, 10.4, 10.0, "chat", "body"),
        Ready(10.1, "a", 10.05, 90, 10, 0.2),
        Start(10.2, 0, ["a"], 90, 10, 0.2),
        Suspend(10.3, 1, ["b"], 3, ["a"], 10.2, 10.25, 0.1),
    ):
        outcomes.read(event)
    [outcome] = outcomes.read(Complete(10.5, 0, ["a"], 9, 0.3, 0.2, 0.2, 0.2))
    assert report(outcome) == {
        "ttft_slo_s": 0.4,
        "slo_class": "chat",
        "slo_source": "body",
        "met": False,
        "cause": "misprediction",
        "ttft_s": 0.5,
        "predicted_s": 0.2,
        "slack_at_admission_s": pytest.approx(0.1),
        "waited_s": 0.15,
        "suspensions": 0,
        "suspended_s": 0.0,
        "blocked_s": 0.1,
    }
    assert json.loads(json.dumps(report(outcome)))["cause"] == "misprediction"
    assert table() in (DOCS / "answers.md").read_text()


def test_a_report_goes_with_the_last_event_and_is_forgotten_then() -> None:
    recorder, reports = recorder_of()
    prefill(recorder, "a")
    assert reports.of(Req("a", finished=False)) == []
    recorder.write(Leave, 12.0, "a")
    [told] = reports.of(Req("a", finished=True))
    assert (told["met"], told["slo_class"]) == (True, "chat")
    reports.forget_sent()
    assert len(reports) == 0
    assert reports.of(Req("a", finished=True)) == []


def test_a_report_of_a_long_answer_is_kept_while_others_end() -> None:
    recorder, reports = recorder_of()
    prefill(recorder, "long", 0)
    prefill(recorder, "short", 1)
    recorder.write(Leave, 12.0, "short")
    reports.forget_sent()
    assert len(reports.of(Req("long", finished=True))) == 1


def test_a_prefill_server_says_what_it_knows_of_a_request_from_the_end_of_its_prefill_until_it_leaves() -> None:
    recorder, reports = recorder_of(decodes=False)
    req = Req("a", finished=False)
    recorder.write(Arrival, 10.0, "a", 100, 1.0, 11.0, 10.0, "chat", "body")
    assert reports.to_carry(req) is None
    recorder.write(Ready, 10.1, "a", 10.05, 90, 10, 0.2)
    recorder.write(Start, 10.2, 0, ["a"], 90, 10, 0.2)
    recorder.write(Suspend, 10.3, 0, ["a"], 3, ["b"], 10.29, 10.3, 0.01)
    recorder.write(Resume, 10.4, 0, ["a"], 3)
    assert reports.to_carry(req) is None
    recorder.write(Complete, 10.7, 0, ["a"], 9, 0.4, 0.2, 0.2, 0.2)
    carried = reports.to_carry(req)
    assert carried is not None
    assert (carried.cause_if_late, carried.predicted_s, carried.suspensions) == (Cause.TRANSFER, 0.2, 1)
    assert carried.ttft_slo_s == 1.0
    assert (carried.suspended_s, carried.waited_s) == (pytest.approx(0.1), pytest.approx(0.15))
    assert (carried.slack_at_admission_s, carried.blocked_s) == (pytest.approx(0.7), 0.0)
    recorder.write(Leave, 10.8, "a")
    assert reports.to_carry(req) is None
    assert reports.to_carry(Req("HEALTH_CHECK", finished=False)) is None


@pytest.mark.parametrize(
    ("ttft_s", "met", "cause"), [(0.25, True, None), (0.35, False, "overload"), (None, None, None)]
)
def test_a_decode_server_knows_whether_the_first_token_is_late_and_the_prefill_server_why(
    ttft_s: float | None, met: bool | None, cause: str | None
) -> None:
    told = report_of_first_token(Objective(0.3, 0.1, "chat", "body"), ttft_s, CARRIED)
    assert (told["met"], told["cause"], told["ttft_s"]) == (met, cause, ttft_s)
    assert {name: told[name] for name in KNOWN_OF_PREFILL} == KNOWN_OF_PREFILL
    assert told["blocked_s"] is None
    assert told.keys() == set(Report.__struct_fields__)


@pytest.mark.parametrize("ttft_slo_s", [0.2, None])
def test_what_follows_from_an_objective_is_not_said_where_the_prefill_server_had_another(
    ttft_slo_s: float | None,
) -> None:
    carried = msgspec.structs.replace(CARRIED, ttft_slo_s=ttft_slo_s)
    told = report_of_first_token(Objective(0.3, 0.1), 0.35, carried)
    assert (told["ttft_slo_s"], told["met"], told["cause"], told["slack_at_admission_s"]) == (0.3, False, None, None)
    assert (told["predicted_s"], told["waited_s"]) == (0.2, 0.15)


@pytest.mark.parametrize(
    ("end", "cause"),
    [(Abort(10.2, ["a"]), "aborted"), (Fail(10.2, ["a"], 500, "raised"), "failed")],
)
def test_requests_without_an_answer_leave_no_report_behind(end: Abort | Fail, cause: str) -> None:
    recorder, reports = recorder_of()
    recorder.write(Arrival, 10.0, "a", 100, 1.0, 11.0, 10.0)
    recorder.write(lambda: end)
    assert reports.of(Req("a", finished=True))[0]["cause"] == cause
    reports.forget_sent()
    assert len(reports) == 0


@pytest.mark.parametrize(("carried", "known_of_prefill"), [(None, {}), (CARRIED, KNOWN_OF_PREFILL)])
@pytest.mark.parametrize(("stream", "messages"), [(True, 3), (False, 1)])
def test_a_decode_server_says_when_the_first_token_came_to_those_who_stream_and_to_others(
    stream: bool,
    messages: int,
    carried: Carried | None,
    known_of_prefill: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock_s[0])
    sent: list[Any] = []
    streamer = decode_streamer(monkeypatch, sent)
    assert streamer.has_additional_customized_info
    reqs = [decoding("a", 100.0, stream), decoding("of another way than the HTTP server", 0.0, stream)]
    setattr(reqs[0], carried_report.CARRIED, carried)
    for at_s in (100.25, 101.0, 103.0):
        clock_s[0] = at_s
        for req in reqs:
            req.output_ids.append(5)
            req.finished_reason = FINISH_LENGTH(3) if at_s == 103.0 else None
        streamer.stream_output(reqs, False)
    assert len(sent) == messages
    assert [message.customized_info for message in sent[:-1]] == [None] * (messages - 1)
    [[told], of_the_other] = unwrap_from_pickle(sent[-1].customized_info)[REPORT_KEY]
    known = {"ttft_slo_s": 0.3, "slo_class": "chat", "slo_source": "body", "met": True, "ttft_s": 0.25}
    assert {name: value for name, value in told.items() if value is not None} == known | known_of_prefill
    assert told.keys() == set(Report.__struct_fields__)
    assert of_the_other == []


def test_a_decode_server_says_nothing_of_first_tokens_on_another_node_than_its_http_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When a request was received is by the other machine's clock."""
    sent: list[Any] = []
    streamer = decode_streamer(monkeypatch, sent, node_rank=1)
    req = decoding("a", 100.0)
    setattr(req, carried_report.CARRIED, CARRIED)
    req.output_ids.append(5)
    req.finished_reason = FINISH_LENGTH(1)
    streamer.stream_output([req], False)
    [[told]] = unwrap_from_pickle(sent[-1].customized_info)[REPORT_KEY]
    assert (told["ttft_s"], told["met"], told["cause"]) == (None, None, None)
    assert {name: told[name] for name in KNOWN_OF_PREFILL} == KNOWN_OF_PREFILL


def manager(meta_info: dict[str, Any], customized_info: dict[str, Any], index: int) -> SimpleNamespace:
    """What SGLang's request state is after a batch of its output has been added to ``meta_info``."""
    state = SimpleNamespace(obj=SimpleNamespace())

    def original(_: Any, meta_info: dict[str, Any], state: Any, others: dict[str, Any], index: int, __: Any) -> None:
        for key, values in others.items():
            meta_info[key] = values[index]

    answer_report.add_report(original, None, meta_info, state, customized_info, index, None)
    return state


def test_meta_info_has_one_object_and_what_others_add_beside_it() -> None:
    meta_info: dict[str, Any] = {}
    manager(meta_info, {REPORT_KEY: [[], [TOLD]], "other": [[1], [2]]}, 1)
    assert meta_info == {REPORT_KEY: TOLD, "other": [2]}
    without: dict[str, Any] = {}
    manager(without, {REPORT_KEY: [[], [TOLD]]}, 0)
    assert without == {}


def test_streams_have_metadata_in_the_last_event_with_a_choice_alone() -> None:
    amended = [answer_report.with_metadata(event, TOLD) for event in STREAM]
    assert [amended[0], *amended[2:]] == [STREAM[0], *STREAM[2:]]
    parsed = json.loads(amended[1].removeprefix("data: "))
    assert parsed.pop("metadata") == {REPORT_KEY: TOLD}
    assert parsed == json.loads(STREAM[1].removeprefix("data: "))
    assert amended[1].endswith("\n\n")


def test_a_stream_tells_what_its_request_was_told() -> None:
    request = SimpleNamespace()

    async def events(_: Any, adapted_request: Any, *__: Any) -> AsyncGenerator[str, None]:
        yield STREAM[0]
        manager_state = manager({}, {REPORT_KEY: [[TOLD]]}, 0)
        adapted_request.__dict__.update(manager_state.obj.__dict__)
        for event in STREAM[1:]:
            yield event

    async def collected() -> list[str]:
        return [event async for event in answer_report.report_in_stream(events, None, request)]

    sent = asyncio.run(collected())
    assert [event == as_it_was for event, as_it_was in zip(sent, STREAM, strict=True)] == [True, False, True, True]


def test_the_span_of_a_request_has_what_its_report_knows() -> None:
    state = SimpleNamespace(obj=SimpleNamespace())
    assert answer_report.add_to_span({"rid": "a"}, None, state, None, 0) == {"rid": "a"}
    setattr(state.obj, answer_report.REPORT, {"met": False, "cause": "overload", "ttft_s": None})
    told = answer_report.add_to_span({"rid": "a"}, None, state, None, 0)
    assert told == {"rid": "a", "flowprefill.met": False, "flowprefill.cause": "overload"}


@pytest.mark.parametrize(("prompts", "has_report"), [(["a"], True), (["a", "b"], False)])
def test_a_stream_of_a_list_of_one_prompt_tells_what_the_prompt_was_told(prompts: list[str], has_report: bool) -> None:
    request = GenerateReqInput(text=prompts)

    async def events(_: Any, adapted_request: Any) -> AsyncGenerator[str, None]:
        adapted_request.normalize_batch_and_arguments()
        setattr(adapted_request[0], answer_report.REPORT, TOLD)  # as ``add_report`` finds it
        for event in STREAM:
            yield event

    async def collected() -> list[str]:
        return [event async for event in answer_report.report_in_stream(events, None, request)]

    sent = asyncio.run(collected())
    assert (sent != STREAM) is has_report
    assert (sent[1] == answer_report.with_metadata(STREAM[1], TOLD)) is has_report


def test_an_answer_of_the_responses_api_has_the_report_as_a_text_beside_the_clients_own() -> None:
    asked = ResponsesRequest(input="a", metadata={"mine": "1"})
    request = GenerateReqInput(text="a")

    def response(status: str) -> Any:
        made = ResponsesResponse.from_request(asked, {}, "m", created_time=1, output=[], status=status, usage=None)
        return answer_report.add_to_response(made, ResponsesResponse, asked)

    async def answer() -> tuple[Any, Any]:
        answer_report.note_request(None, "resp_1", "a", request, {}, None, raw_request=None, priority=0)
        begun = response("in_progress")
        setattr(request, answer_report.REPORT, TOLD)
        return begun.metadata, response("completed").metadata

    begun, ended = asyncio.run(answer())
    assert begun == {"mine": "1"}
    assert json.loads(ended.pop(REPORT_KEY)) == TOLD
    assert ended == begun
    assert response("completed").metadata == {"mine": "1"}, "of another request"
