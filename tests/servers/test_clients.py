"""Clients that people use, at the gateway of a cluster and straight at one server: what they get, which is compared
with transformers, and the objectives that reach the scheduler. The commands are those of docs/clients-tested.md.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.model import embedded_model_path
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import objectives_since

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


def run_benchmark(command: Sequence[str], cluster: Cluster) -> str:
    """What it prints. Its 24 requests, and those that warm it up, want their first token within 0.75 s."""
    start_s = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    print(f"{shlex.join(command)}\n{run.stdout[-6000:]}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    objectives = objectives_since(cluster, start_s)
    assert len(objectives) >= 24
    assert set(objectives) == {0.75}
    return run.stdout


@pytest.mark.stress
@pytest.mark.parametrize("number", [0, 1], ids=["generate, body", "chat, header"])
def test_sglangs_benchmark_counts_goodput(unified_server: Cluster, tmp_path: Path, number: int) -> None:
    result = tmp_path / "result.jsonl"
    places = {"python": sys.executable, "MODEL": str(embedded_model_path()), "result.jsonl": str(result)}
    command = documented("sglang.bench_serving", **places, **{"http://127.0.0.1:30000": unified_server.url})[number]
    assert "Request goodput (req/s):" in run_benchmark(command, unified_server)
    measured = json.loads(result.read_text())
    assert measured["completed"] == 24
    assert measured["goodput_slos_ms"] == {"ttft": 750.0, "tpot": 100.0}
    assert 0 <= measured["request_goodput"] <= measured["request_throughput"] + 1e-9


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
def test_aiperf_counts_goodput(unified_server: Cluster, aiperf: Path, tmp_path: Path) -> None:
    places = {"aiperf/bin/aiperf": str(aiperf), "MODEL": str(embedded_model_path()), "results": str(tmp_path)}
    _, command = documented("AIPerf", **places, **{"http://127.0.0.1:30000": unified_server.url})
    assert "Goodput (requests/sec)" in run_benchmark(command, unified_server)
    measured = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert measured["request_count"]["avg"] == 24
    assert measured["good_request_count"]["avg"] <= 24
    assert measured["output_sequence_length"]["avg"] == TOKENS
