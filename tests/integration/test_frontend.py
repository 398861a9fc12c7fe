"""SGLang frontend programs through a real gateway: what they get, and the objectives that reach the scheduler."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sglang as sgl
import torch

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import read_events
from sgl_flowprefill.frontend import Endpoint
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.slo import SloError

pytestmark = pytest.mark.server

PROMPT = "bake lomi tupe"
CHOICES = [" lomi", " bake lomi", " tupe bake"]
"""Their first tokens differ."""
EXAMPLE = Path(__file__).parents[2] / "examples" / "frontend.py"


@sgl.function
def answered(s: Any, word: str) -> None:
    s += PROMPT + " " + word
    s += sgl.gen("answer", max_tokens=4, temperature=0)


@sgl.function
def forked(s: Any) -> None:
    s += PROMPT
    branches = s.fork(2)
    for number, branch in enumerate(branches):
        branch += f" {number}" + sgl.gen("branch", max_tokens=3, temperature=0)
    s += branches[0]["branch"] + branches[1]["branch"] + sgl.gen("end", max_tokens=2, temperature=0)


@pytest.fixture
def endpoint(flowprefill_cluster: Cluster) -> Endpoint:
    return Endpoint(flowprefill_cluster.url, ttft_slo=3.25)


def objectives_since(cluster: Cluster, start_s: float) -> list[float]:
    """The objectives of the requests that the scheduler was given since then."""
    time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
    log = cluster.config.options.event_log
    assert log is not None
    return [event.ttft_slo_s for event in read_events(log) if event.kind == "arrival" and event.t_s > start_s]


def test_every_request_of_a_program_has_the_endpoints_objective(
    flowprefill_cluster: Cluster, endpoint: Endpoint
) -> None:
    start_s = time.monotonic()
    state = answered.run(word="lomi", backend=endpoint)
    assert state["answer"]
    streamed = answered.run(word="lomi", backend=endpoint, stream=True)
    assert "".join(streamed.text_iter("answer")) == state["answer"]
    assert forked.run(backend=endpoint)["end"]
    objectives = objectives_since(flowprefill_cluster, start_s)
    assert len(objectives) >= 5
    assert set(objectives) == {3.25}


def test_a_batch_has_the_objective_of_its_run(flowprefill_cluster: Cluster, endpoint: Endpoint) -> None:
    start_s = time.monotonic()
    words = ["lomi", "bake", "tupe"]
    states = answered.run_batch([{"word": word} for word in words], backend=endpoint.with_ttft_slo(7.5))
    assert all(state["answer"] for state in states)
    objectives = objectives_since(flowprefill_cluster, start_s)
    assert len(objectives) >= len(words)
    assert set(objectives) == {7.5}
    alone = answered.run(word=words[0], backend=endpoint.with_ttft_slo(None))
    assert alone["answer"] == states[0]["answer"]
    default_s = flowprefill_cluster.config.options.default_ttft_slo
    assert objectives_since(flowprefill_cluster, start_s)[len(objectives) :] == [default_s]


@pytest.mark.parametrize(
    "method",
    [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized],
    ids=lambda method: type(method).__name__,
)
def test_select_decides_by_the_models_own_log_probabilities(
    flowprefill_cluster: Cluster, endpoint: Endpoint, method: Any
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += PROMPT
        s += sgl.select("choice", choices=CHOICES, choices_method=method)

    start_s = time.monotonic()
    state = program.run(backend=endpoint)
    assert state["choice"] in CHOICES
    meta = state.get_meta_info("choice")
    for choice, scored in zip(CHOICES, meta["input_token_logprobs"], strict=True):
        token_ids, expected = reference_logprobs(PROMPT + choice)
        assert [entry[1] for entry in scored] == token_ids[-len(scored) :]
        assert [entry[0] for entry in scored] == pytest.approx(expected[-len(scored) :], abs=2e-3)
    assert state["choice"] == CHOICES[by_reference(method)]
    assert set(objectives_since(flowprefill_cluster, start_s)) == {3.25}


def by_reference(method: Any) -> int:
    """The choice by transformers."""
    before = len(reference_logprobs(PROMPT)[0])  # tokens before the choice, without the first
    of_all = [np.array(reference_logprobs(PROMPT + choice)[1]) for choice in CHOICES]
    if method is sgl.token_length_normalized:  # SGLang's frontend counts the last token of the prompt
        return int(np.argmax([scores[before - 1 :].mean() for scores in of_all]))
    of_choices = [scores[before:] for scores in of_all]
    if method is sgl.unconditional_likelihood_normalized:
        # Of the prompt, "by themselves" has the last two tokens.
        alone = [np.array(reference_logprobs(PROMPT + choice, from_token=before - 1)[1][1:]) for choice in CHOICES]
        return int(np.argmax([(one - other).mean() for one, other in zip(of_choices, alone, strict=True)]))
    first = [scores[0] for scores in of_choices]
    assert len(set(first)) == len(first), "the first token decides"
    return int(np.argmax(first))


@cache
def reference_model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model_path()
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def reference_logprobs(text: str, from_token: int = 0) -> tuple[list[int], list[float]]:
    """Tokens of ``text`` after the first, and the log probability of each, by transformers."""
    tokenizer, model = reference_model()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, from_token:]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return ids[0, 1:].tolist(), logits.gather(1, ids[0, 1:, None])[:, 0].tolist()


def test_the_example_runs_as_it_is(flowprefill_cluster: Cluster) -> None:
    start_s = time.monotonic()
    command = [sys.executable, str(EXAMPLE), flowprefill_cluster.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3
    assert set(objectives_since(flowprefill_cluster, start_s)) == {2.0, 0.3}


@pytest.mark.parametrize("ttft_slo", [0, -1.0, float("nan"), float("inf")])
def test_an_objective_that_is_no_positive_number_is_refused_before_anything_is_sent(
    endpoint: Endpoint, ttft_slo: float
) -> None:
    with pytest.raises(SloError, match="positive"):
        endpoint.with_ttft_slo(ttft_slo)
    with pytest.raises(SloError, match="positive"):
        Endpoint("http://127.0.0.1:9", ttft_slo=ttft_slo)
