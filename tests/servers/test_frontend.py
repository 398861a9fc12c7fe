"""SGLang frontend programs, through a gateway and straight at one server: what they get, which is compared with
transformers, and the objectives that reach the scheduler.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import sglang as sgl
import torch

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.frontend import PREFIX_TTFT_SLO_S, SLORuntimeEndpoint, ttft_slo
from sgl_flowprefill.model import embedded_model_path
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import objectives_since

pytestmark = pytest.mark.usefixtures("programs")

PROMPT = "bake lomi tupe"
CHOICES = [" lomi", " bake lomi", " tupe bake"]
"""Their first tokens differ."""


@sgl.function
def answered(s: Any, word: str) -> None:
    s += PROMPT + " " + word
    s += sgl.gen("answer", max_tokens=TOKENS, temperature=0, return_logprob=True)


@sgl.function
def forked(s: Any) -> dict[str, Any]:
    """What ``/generate`` says of each answer, by its prompt."""
    s += PROMPT
    s.sync()  # else it depends on a race whether SGLang has the text before a fork cached
    branches = s.fork(2)
    for number, branch in enumerate(branches):
        branch += f" {number}" + sgl.gen("branch", max_tokens=TOKENS, temperature=0, return_logprob=True)
    answers = [branch["branch"] for branch in branches]
    s += answers[0] + answers[1] + sgl.gen("end", max_tokens=TOKENS, temperature=0, return_logprob=True)
    generated = {PROMPT + f" {number}": branch.get_meta_info("branch") for number, branch in enumerate(branches)}
    return generated | {PROMPT + answers[0] + answers[1]: s.get_meta_info("end")}


@pytest.fixture
def endpoint(cluster: Cluster) -> SLORuntimeEndpoint:
    return SLORuntimeEndpoint(cluster.url)


def wait_for(state: Any, name: str) -> str:
    """The answer ``name`` of a streamed program, which may have ended: then SGLang gives no pieces of it."""
    for _ in state.text_iter(name):
        pass
    answer: str = state[name]
    return answer


def compare(comparison: Comparison, prompt: str, state: Any) -> None:
    """Compare what ``answered`` got for ``prompt``: its text, and its tokens with their log probabilities."""
    comparison.text(f"text behind {prompt!r}", prompt, state["answer"], None)
    comparison.generated(f"answer to {prompt!r}", prompt, state.get_meta_info("answer"))


def test_what_runs_in_a_with_has_its_objective_and_transformers_answers(
    cluster: Cluster, endpoint: SLORuntimeEndpoint, comparison: Comparison
) -> None:
    start_s = time.monotonic()
    with ttft_slo(3.25, tbt=0.75):
        state = answered.run(word="lomi", backend=endpoint)
        streamed = answered.run(word="lomi", backend=endpoint, stream=True)
        assert "".join(streamed.text_iter("answer")) == state["answer"]
        tree = forked.run(backend=endpoint)
    compare(comparison, PROMPT + " lomi", state)
    for prompt, meta_info in tree.ret_value.items():
        comparison.generated(prompt, prompt, meta_info)
    comparison.assert_same()
    assert comparison.counts["tokens"] == 5 * TOKENS
    assert comparison.counts["log probabilities"] == 4 * TOKENS
    objectives = objectives_since(cluster, start_s)
    assert sorted(objectives) == [3.25] * 5 + [PREFIX_TTFT_SLO_S]


def test_programs_side_by_side_have_an_objective_each(
    cluster: Cluster, endpoint: SLORuntimeEndpoint, comparison: Comparison
) -> None:
    """A batch, a streamed program that forks, and a program in a thread."""

    def in_a_thread() -> Any:
        with ttft_slo(1.5):
            return answered.run(word="bake", backend=endpoint)

    start_s = time.monotonic()
    words = ["lomi", "bake", "tupe"]
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(in_a_thread)
        with ttft_slo(30):
            tree = forked.run(backend=endpoint, stream=True)
        with ttft_slo(7.5):
            batch = answered.run_batch([{"word": word} for word in words], backend=endpoint)
        for word, state in zip(words, batch, strict=True):
            compare(comparison, f"{PROMPT} {word}", state)
        compare(comparison, f"{PROMPT} bake", alone.result())
        end = wait_for(tree, "end")
    comparison.text("end", tree.text().removesuffix(end), end, None)
    comparison.assert_same()
    assert comparison.counts["answers"] == 2 * len(words) + 2 + 1
    assert comparison.counts["tokens"] == TOKENS * comparison.counts["answers"]
    objectives = objectives_since(cluster, start_s)
    assert sorted(objectives) == [1.5] + [7.5] * 3 + [30.0] * 3 + [PREFIX_TTFT_SLO_S]


def test_outside_of_any_with_the_servers_default_holds(
    cluster: Cluster, endpoint: SLORuntimeEndpoint, comparison: Comparison
) -> None:
    start_s = time.monotonic()
    compare(comparison, f"{PROMPT} lomi", answered.run(word="lomi", backend=endpoint))
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == TOKENS
    assert objectives_since(cluster, start_s) == [cluster.config.options.default_ttft_slo]


@pytest.mark.parametrize(
    "method",
    [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized],
    ids=lambda method: type(method).__name__,
)
def test_select_decides_by_the_models_own_log_probabilities(
    cluster: Cluster, endpoint: SLORuntimeEndpoint, comparison: Comparison, method: Any
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += PROMPT
        s += sgl.select("choice", choices=CHOICES, choices_method=method)

    start_s = time.monotonic()
    with ttft_slo(3.25):
        state = program.run(backend=endpoint)
    assert state["choice"] in CHOICES
    meta = state.get_meta_info("choice")
    for choice, scored in zip(CHOICES, meta["input_token_logprobs"], strict=True):
        assert scored
        token_ids = comparison.reference.ids(PROMPT + choice)
        assert [entry[1] for entry in scored] == token_ids[-len(scored) :]
        comparison.inputs(choice, token_ids, [entry[0] for entry in scored])
    comparison.assert_same()
    assert comparison.counts["log probabilities of prompts"] == sum(map(len, meta["input_token_logprobs"]))
    assert state["choice"] == CHOICES[by_reference(method)]
    alone = len(CHOICES) if method is sgl.unconditional_likelihood_normalized else 0
    assert objectives_since(cluster, start_s) == [3.25] * (1 + len(CHOICES) + alone)


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
