"""Published trace formats: what is read, how a format is known, and errors that say where a file is wrong."""

import json
from pathlib import Path

import pytest

from sgl_flowprefill.bench.workloads.formats import TraceFormatError, detect_format, load_trace
from sgl_flowprefill.bench.workloads.trace import Slo

QWEN = [
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 3.0, "type": "text", "turn": 1}
    | {"input_length": 40, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"chat_id": 2, "parent_chat_id": -1, "timestamp": 3.5, "type": "search", "turn": 1}
    | {"input_length": 20, "output_length": 0, "hash_ids": [3, 4]},
    {"chat_id": 3, "parent_chat_id": 1, "timestamp": 9.0, "type": "text", "turn": 2}
    | {"input_length": 90, "output_length": 5, "hash_ids": [0, 1, 5, 6, 7, 8]},
]
MOONCAKE = [
    {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 3500, "input_length": 3000, "output_length": 5, "hash_ids": [0, 2, 3, 4, 5, 6]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,4396,109
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
"""


def write_json(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "qwen": write_json(tmp_path / "qwen.jsonl", QWEN),
        "mooncake": write_json(tmp_path / "mooncake.jsonl", MOONCAKE),
        "azure": write(tmp_path / "azure.csv", AZURE),
        "burstgpt": write(tmp_path / "burst.csv", BURSTGPT),
    }


@pytest.mark.parametrize("name", ["qwen", "mooncake", "azure", "burstgpt"])
def test_format_is_known_by_its_fields(files: dict[str, Path], name: str) -> None:
    assert detect_format(files[name]) == name
    trace = load_trace(files[name])
    assert trace.requests[0].arrival_s == 0
    assert trace == load_trace(files[name], name)


def test_qwen_prompts_keep_their_length_and_share_their_parents_prefix(files: dict[str, Path]) -> None:
    first, search, child = load_trace(files["qwen"]).requests
    assert [r.arrival_s for r in (first, search, child)] == [0.0, 0.5, 6.0]
    assert (first.prompt_tokens, child.prompt_tokens, child.shared_tokens) == (40, 90, 32)
    assert (first.ttft_slo_s, search.ttft_slo_s) == (0.25, 4.0)
    assert search.output_tokens == 1


def test_papers_rule_counts_only_what_the_parent_did_not_have(files: dict[str, Path]) -> None:
    first, _, child = load_trace(files["qwen"], new_tokens_only=True).requests
    assert first.prompt_tokens == 40
    assert (child.prompt_tokens, child.shared_tokens) == ((6 - 3) * 16, 0)
    with pytest.raises(TraceFormatError, match="only QwenTrace"):
        load_trace(files["azure"], new_tokens_only=True)


def test_the_papers_rule_needs_to_know_the_parents(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "parent_chat_id"} for row in QWEN]
    path = write_json(tmp_path / "t.jsonl", rows)
    assert len(load_trace(path).requests) == 3
    with pytest.raises(TraceFormatError, match="leave out --new-tokens-only"):
        load_trace(path, new_tokens_only=True)


def test_mooncake_times_are_milliseconds_and_blocks_512_tokens(files: dict[str, Path]) -> None:
    first, second = load_trace(files["mooncake"]).requests
    assert second.arrival_s == 2.5
    assert second.shared_tokens == 512
    assert (first.request_class, second.request_class) == ("short", "long")


def test_azure_times_are_wall_clock(files: dict[str, Path]) -> None:
    assert load_trace(files["azure"]).requests[1].arrival_s == pytest.approx(4.314579, abs=1e-5)


def test_empty_answers_ask_for_one_token(files: dict[str, Path]) -> None:
    assert [r.output_tokens for r in load_trace(files["burstgpt"]).requests] == [18, 1]


def test_objectives_can_be_given_by_class(files: dict[str, Path]) -> None:
    requests = load_trace(files["azure"], slos={"long": Slo(9.0, 1.0)}).requests
    assert [r.ttft_slo_s for r in requests] == [0.5, 9.0]


def test_objectives_of_a_class_that_no_request_has_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(TraceFormatError, match="no request is of class 'txt'; the classes are search, text"):
        load_trace(files["qwen"], slos={"text": Slo(9.0, 1.0), "txt": Slo(9.0, 1.0)})


def test_rows_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    trace = load_trace(write_json(tmp_path / "t.jsonl", MOONCAKE[::-1]))
    assert [r.arrival_s for r in trace.requests] == [0.0, 2.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_length": "many"}, "line 2, field 'input_length': 'many' is not a number"),
        ({"input_length": 0}, "line 2, field 'input_length': 0 is not a number of at least 1"),
        ({"input_length": 1.5}, "line 2, field 'input_length': 1.5 is not a whole number"),
        ({"timestamp": None}, "line 2, field 'timestamp': it is missing"),
        ({"timestamp": -1}, "line 2, field 'timestamp': -1 is not a number of at least 0"),
        ({"hash_ids": "0"}, "line 2, field 'hash_ids': it is not a list"),
        ({"type": "video"}, "line 2, field 'type': 'video' is none of text, image, search, file"),
        ({"hash_ids": [1, -1]}, "line 2, field 'hash_ids': it is not a list of whole numbers"),
        ({"hash_ids": [1, "2"]}, "line 2, field 'hash_ids': it is not a list of whole numbers"),
        ({"timestamp": float("inf")}, "line 2, field 'timestamp': inf is not a number"),
        ({"parent_chat_id": "first"}, "line 2, field 'parent_chat_id': 'first' is not a number"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_json(tmp_path / "bad.jsonl", [QWEN[0], QWEN[1] | change, QWEN[2]])
    with pytest.raises(TraceFormatError) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; correct the line, or leave it out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "are those of no known trace format"),
        ("a,b,c\n1,2,3\n", "the fields a, b, c are those of no known trace format"),
        ('{"timestamp": 1\n', "line 1: it is not JSON"),
        (json.dumps(MOONCAKE[0]) + "\n[1]\n", "line 2: it is not a JSON object"),
        (json.dumps(MOONCAKE[0]) + '\n{"timestamp": "\\ud800"}\n', "line 2"),
        (AZURE + "2023-11-16 18:15:51,1.5,1\n", "line 4, field 'ContextTokens': 1.5 is not a whole number"),
        (AZURE + "2023-11-16 18:15:51,,1\n", "line 4, field 'ContextTokens': '' is not a number"),
        (BURSTGPT + "nan,x,1,1,1,x\n", "line 4, field 'Timestamp': 'nan' is not a number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "it holds no request"),
        (AZURE + "yesterday,1,1\n", "line 4, field 'TIMESTAMP': 'yesterday' is not a date and time"),
        (AZURE + "2023-11-16 18:15:51,1,1,1\n", "line 4: it has more fields"),
        (AZURE + "2023-11-16 18:15:51,12\n", "line 4, field 'GeneratedTokens': it is missing"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceFormatError) as caught:
        load_trace(write(tmp_path / "bad", text))
    assert message in str(caught.value)


def test_missing_file_and_unknown_format_are_clear(tmp_path: Path, files: dict[str, Path]) -> None:
    with pytest.raises(TraceFormatError, match="No such file"):
        load_trace(tmp_path / "absent")
    with pytest.raises(TraceFormatError, match="known: auto, qwen"):
        load_trace(files["qwen"], "parquet")
