"""Clients that people use, at the gateway of a cluster and straight at one server: what they get, which is compared
with transformers, and the objectives that reach the scheduler. The commands are those of docs/clients-tested.md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from anthropic import Anthropic
from msgspec import UNSET
from openai import BadRequestError, OpenAI

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import Abort, Arrival, Complete, Decoded, Event, Fail, Leave, read_events
from sgl_flowprefill.model import embedded_model_path
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import objectives_since
from tests.waiting import until

EventT = TypeVar("EventT", bound=Event)

PAGE = Path(__file__).parents[2] / "docs" / "clients-tested.md"
MODEL = "embedded"
PROMPT = " bake lomi tura"
MESSAGES = [{"role": "user", "content": "bake lomi tura"}]
TTFT_SLO_S = 3.5
SLO = {"custom_params": {"ttft_slo": TTFT_SLO_S, "tbt_slo": 0.5}}
HEADER_SLO_S = 2.25
HEADER = {"x-slo-ttft-ms": f"{1000 * HEADER_SLO_S:g}"}


@pytest.fixture
def openai(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def anthropic(cluster: Cluster) -> Anthropic:
    return Anthropic(base_url=cluster.url, api_key="none", max_retries=0, timeout=120)


def compare_chat(comparison: Comparison, *texts: str) -> None:
    """Compare answers to the messages."""
    prompt = comparison.reference.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for text in texts:
        comparison.text("chat", prompt, text, None)
    comparison.assert_same()
    assert comparison.counts["tokens"] == TOKENS * len(texts)


def in_pieces(pieces: Sequence[str | None]) -> str:
    """The text of a streamed answer, of which there are several pieces."""
    texts = [piece for piece in pieces if piece]
    assert len(texts) > 1, pieces
    return "".join(texts)


def test_openai_chat(cluster: Cluster, openai: OpenAI, comparison: Comparison) -> None:
    start_s = time.monotonic()
    asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, "extra_body": SLO}
    whole = openai.chat.completions.create(**asked)
    assert whole.usage.completion_tokens == TOKENS
    chunks = list(openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == TOKENS
    streamed = in_pieces([chunk.choices[0].delta.content for chunk in chunks if chunk.choices])
    compare_chat(comparison, whole.choices[0].message.content, streamed)
    assert objectives_since(cluster, start_s) == [TTFT_SLO_S] * 2


def test_openai_completions(cluster: Cluster, openai: OpenAI, comparison: Comparison) -> None:
    start_s = time.monotonic()
    asked: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "extra_body": SLO}
    whole = openai.completions.create(**asked, logprobs=1).choices[0]
    streamed = in_pieces([chunk.choices[0].text for chunk in openai.completions.create(**asked, stream=True)])
    comparison.text("whole", PROMPT, whole.text, whole.logprobs.token_logprobs)
    comparison.text("streamed", PROMPT, streamed, None)
    comparison.assert_same()
    assert comparison.counts["tokens"] == 2 * TOKENS
    assert objectives_since(cluster, start_s) == [TTFT_SLO_S] * 2


def test_openai_answers_say_what_became_of_their_requests(cluster: Cluster, openai: OpenAI) -> None:
    asked: Any = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "extra_body": SLO}
    chat, completion = asked | {"messages": MESSAGES}, asked | {"prompt": PROMPT}
    answers = [
        openai.chat.completions.create(**chat),
        openai.completions.create(**completion),
        *openai.chat.completions.create(**chat, stream=True),
        *openai.completions.create(**completion, stream=True),
    ]
    told = [answer.model_dump().get("metadata") or {} for answer in answers]
    reports = [metadata["flowprefill"] for metadata in told if "flowprefill" in metadata]
    assert [report["ttft_slo_s"] for report in reports] == [TTFT_SLO_S] * 4
    assert all(report["met"] is not None for report in reports)
    assert all(report["predicted_s"] is not None for report in reports), "a decode server has it of the prefill server"


def test_openai_responses(cluster: Cluster, openai: OpenAI, comparison: Comparison) -> None:
    """The gateway's own idea of this endpoint has no place for an objective."""
    start_s = time.monotonic()
    model = openai.models.list().data[0].id  # this endpoint refuses others
    tokens = TOKENS + 2  # two of which SGLang keeps back
    asked: Any = {"model": model, "input": MESSAGES, "max_output_tokens": tokens, "temperature": 0}
    if cluster.config.unified == 0:
        with pytest.raises(BadRequestError, match="unknown field `custom_params`"):
            openai.responses.create(**asked, extra_body=SLO)
        assert objectives_since(cluster, start_s) == []
        return
    whole = openai.responses.create(**asked, extra_body=SLO)
    events = list(openai.responses.create(**asked, extra_headers=HEADER, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    streamed = in_pieces([event.delta for event in events if event.type == "response.output_text.delta"])
    compare_chat(comparison, whole.output_text, streamed)
    assert objectives_since(cluster, start_s) == [TTFT_SLO_S, HEADER_SLO_S]


def test_anthropic_messages(cluster: Cluster, anthropic: Anthropic, comparison: Comparison) -> None:
    start_s = time.monotonic()
    asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS}
    greedy = {"temperature": 0}  # which this client has no parameter for
    whole = anthropic.messages.create(**asked, extra_body=greedy | SLO)
    assert whole.usage.output_tokens == TOKENS
    with anthropic.messages.stream(**asked, extra_body=greedy, extra_headers=HEADER) as stream:
        streamed = in_pieces(list(stream.text_stream))
    compare_chat(comparison, whole.content[0].text, streamed)
    # The gateway forwards the body's objective to this endpoint, and not the header's.
    by_header_s = HEADER_SLO_S if cluster.config.unified else cluster.config.options.default_ttft_slo
    assert objectives_since(cluster, start_s) == [TTFT_SLO_S, by_header_s]


def documented(client: str, **places: str) -> list[list[str]]:
    """The commands that the page has for ``client``, with what ``places`` puts in place of some of their words."""
    section = PAGE.read_text().split(f"\n## {client}\n")[1].split("\n## ")[0]
    lines = "\n".join(line.strip() for line in section.splitlines() if line.startswith("    "))
    commands = [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines()]
    return [[places.get(word, word) for word in command] for command in commands]


@pytest.mark.parametrize("stream", [False, True])
def test_curl(cluster: Cluster, comparison: Comparison, stream: bool) -> None:
    start_s = time.monotonic()
    address = "http://127.0.0.1:30000/v1/completions"
    [[*command, body]] = documented("curl", **{address: f"{cluster.url}/v1/completions"})
    command.append(json.dumps(json.loads(body) | {"stream": stream}))
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    if stream:
        lines = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        text = in_pieces([json.loads(line)["choices"][0]["text"] for line in lines])
    else:
        text = json.loads(said)["choices"][0]["text"]
    comparison.text("curl", PROMPT, text, None)
    comparison.assert_same()
    assert comparison.counts["tokens"] == TOKENS
    assert objectives_since(cluster, start_s) == [0.5]


class Served(NamedTuple):
    """What event logs say of a client's requests."""

    objectives: Counter[tuple[float, str]]
    """Requests by their objective for the first token, in seconds, and by where that came from."""
    prefilled_s: list[float]
    """From each request's receipt until its prefill was over, in the order in which they came."""
    tokens: list[int]
    """Of each answer, in the order in which they ended; a server without a decode server behind it does not say."""


def served_since(cluster: Cluster, start_s: float, requests: int) -> Served:
    """So many ``requests`` have come since then and no others, and all of them were answered."""

    def logged(kind: type[EventT]) -> list[EventT]:
        events = chain.from_iterable(map(read_events, cluster.event_logs))
        return [event for event in events if isinstance(event, kind) and event.t_s > start_s]

    ends = (Leave,) if cluster.config.unified else (Leave, Decoded)
    # The logs reach the files when schedulers turn idle.
    until(lambda: all(len(logged(end)) >= requests for end in ends), 30, say=lambda: [len(logged(end)) for end in ends])
    arrivals = logged(Arrival)
    over_s = {rid: event.t_s for event in logged(Complete) for rid in event.rids}
    assert len(arrivals) == requests
    assert [*logged(Fail), *logged(Abort)] == []
    assert [event.reason for event in logged(Leave)] == [UNSET] * requests
    assert [event.reason for event in logged(Decoded)] == [None] * (requests if Decoded in ends else 0)
    return Served(
        Counter((event.ttft_slo_s, event.slo_source) for event in arrivals),
        [over_s[event.rid] - event.received_s for event in arrivals],
        [event.tokens for event in logged(Decoded)],
    )


BENCHMARKED = 24
"""Requests of a benchmark."""
BENCHMARK_SLO_S = 0.75


def run_benchmark(command: Sequence[str]) -> str:
    """What it prints."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    print(f"{shlex.join(command)}\n{run.stdout[-6000:]}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.stress
@pytest.mark.parametrize(
    ("number", "source"), [(0, "body"), (1, "header x-slo-ttft-ms")], ids=["generate, body", "chat, header"]
)
def test_sglangs_benchmark_counts_goodput(cluster: Cluster, tmp_path: Path, number: int, source: str) -> None:
    """The gateway forwards no header with an objective: requests have the server's default then."""
    result = tmp_path / "result.jsonl"
    places = {"python": sys.executable, "MODEL": str(embedded_model_path()), "result.jsonl": str(result)}
    command = documented("sglang.bench_serving", **places, **{"http://127.0.0.1:30000": cluster.url})[number]
    start_s = time.monotonic()
    assert "Request goodput (req/s):" in run_benchmark(command)
    served = served_since(cluster, start_s, 1 + BENCHMARKED)  # the first warms up
    objective = (BENCHMARK_SLO_S, source)
    if source != "body" and not cluster.config.unified:
        objective = (cluster.config.options.default_ttft_slo, "default")
    assert served.objectives == {objective: 1 + BENCHMARKED}

    measured = json.loads(result.read_text())
    assert measured["completed"] == BENCHMARKED
    assert measured["goodput_slos_ms"] == {"ttft": 1e3 * BENCHMARK_SLO_S, "tpot": 100.0}
    good = round(BENCHMARKED * measured["slo_attainment"])
    assert measured["request_goodput"] * measured["duration"] == pytest.approx(good)
    # The way to the client and back comes on top of what servers see.
    prefilled_s = served.prefilled_s[1:]
    assert good <= sum(took_s <= BENCHMARK_SLO_S for took_s in prefilled_s)
    assert measured["mean_ttft_ms"] > 1e3 * statistics.mean(prefilled_s)
    if served.tokens:
        assert measured["total_output_tokens"] == sum(served.tokens[1:])


@pytest.fixture(scope="session")
def aiperf() -> Path:
    """The program, in a virtual environment of its own, which is kept."""
    create, _ = documented("AIPerf")
    package = create[-1]
    folder = Path(tempfile.gettempdir()) / package.replace("==", "-")
    program = folder / "bin" / "aiperf"
    if not program.exists():
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "pip"), "install", "--quiet", package],
        ):
            try:
                subprocess.run(command, capture_output=True, text=True, timeout=1500, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"{error}: {getattr(error, 'stderr', None) or ''}"[-500:])
    return program


@pytest.mark.stress
@pytest.mark.timeout(2400)
def test_aiperf_counts_goodput(cluster: Cluster, aiperf: Path, tmp_path: Path) -> None:
    places = {"aiperf/bin/aiperf": str(aiperf), "MODEL": str(embedded_model_path()), "results": str(tmp_path)}
    _, command = documented("AIPerf", **places, **{"http://127.0.0.1:30000": cluster.url})
    start_s = time.monotonic()
    assert "Goodput (requests/sec)" in run_benchmark(command)
    served = served_since(cluster, start_s, BENCHMARKED)
    assert served.objectives == {(BENCHMARK_SLO_S, "body"): BENCHMARKED}
    assert set(served.tokens) <= {TOKENS}

    measured = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert measured["request_count"]["avg"] == BENCHMARKED
    assert measured.get("error_request_count") is None
    assert measured["good_request_count"]["avg"] <= sum(took_s <= BENCHMARK_SLO_S for took_s in served.prefilled_s)
    assert measured["time_to_first_token"]["avg"] > 1e3 * statistics.mean(served.prefilled_s)
    assert measured["output_sequence_length"]["avg"] == TOKENS
