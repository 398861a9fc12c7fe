"""Python programs that make an engine of SGLang's, or a server: requests get their objectives as all others do, and the
answers of transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.events import Arrival, read_events
from sgl_flowprefill.model import embedded_model_path
from tests.reference import Comparison
from tests.servers.conftest import SLO_POLICY

pytestmark = pytest.mark.stress

PROGRAM = """
import json
import sys

import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(model_path=sys.argv[1], max_total_tokens=20000)
    one = {"max_new_tokens": 1, "temperature": 0}

    def ask(asked, params, **how):
        answers = engine.generate(asked, params, return_logprob=True, **how)
        for text, answer in zip(asked, answers) if isinstance(asked, list) else [(asked, answers)]:
            print("answer:", json.dumps([text, answer["meta_info"]["output_token_logprobs"]]))

    ask("bake lomi", one)
    ask("bake lomi", one | {"custom_params": {"ttft_slo": 1.5}})
    ask(["bake", "lomi"], [one, one | {"custom_params": {"slo_class": "interactive"}}])
    ask("bake lomi", one, priority=11)
    for wrong in ({"ttft_slo": -1}, {"slo_class": "urgent"}):
        try:
            engine.generate("bake lomi", one | {"custom_params": wrong})
        except ValueError as error:
            print("refused:", error)
    engine.shutdown()
"""


def run_program(directory: Path, text: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A program that serves the embedded model with FlowPrefill and SLO_POLICY, when it has ended; its event log."""
    program, policy, log = directory / "program.py", directory / "policy.yaml", directory / "events.jsonl"
    program.write_text(text)
    policy.write_text(SLO_POLICY)
    env = os.environ | {
        "FLOWPREFILL": "1",
        "FLOWPREFILL_EVENT_LOG": str(log),
        "FLOWPREFILL_SLO_POLICY": str(policy),
        "FLOWPREFILL_EXPLORATION_SHARE": "0",
        "SGLANG_PLATFORM": "flowprefill_cpu",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, str(program), str(embedded_model_path()), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False), log


def compare(comparison: Comparison, run: subprocess.CompletedProcess[str], answers: int) -> None:
    """Compare what a program has printed of its answers, of one token each."""
    for line in run.stdout.splitlines():
        if line.startswith("answer:"):
            text, logprobs = json.loads(line.removeprefix("answer:"))
            comparison.generated(text, text, {"output_token_logprobs": logprobs})
    comparison.assert_same_with_logprobs()
    assert comparison.counts["answers"] == comparison.counts["tokens"] == answers


def test_requests_of_the_engine_in_python_have_the_objectives_that_they_ask_for(
    comparison: Comparison, tmp_path: Path
) -> None:
    run, log = run_program(tmp_path, PROGRAM)
    assert run.returncode == 0, run.stderr[-3000:]
    compare(comparison, run, answers=5)
    refused = [line for line in run.stdout.splitlines() if line.startswith("refused:")]
    assert "positive, finite number of seconds" in refused[0]
    assert "there are interactive, batch, default" in refused[1]
    arrivals = [event for event in read_events(log) if isinstance(event, Arrival)]
    seen = [(event.ttft_slo_s, event.slo_class, event.slo_source) for event in arrivals]
    assert seen[:2] == [(5.0, "default", "default"), (1.5, "default", "body")]
    assert sorted(seen[2:4]) == [(0.75, "interactive", "body"), (5.0, "default", "default")]
    assert seen[4:] == [(0.75, "interactive", "priority")]


SERVER = """
import json
import multiprocessing
import sys
import time

import requests
from sglang.srt.entrypoints.http_server_engine import launch_server_process
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import kill_process_tree

BY_HAND = {"disable_overlap_schedule": True, "chunked_prefill_size": -1, "prefill_decode_interval": 0}

if __name__ == "__main__":
    model, port, method, options = sys.argv[1:]
    multiprocessing.set_start_method(method)
    if options == "set":
        load_plugins()
    by_hand = BY_HAND if options == "by hand" else {}
    server_args = ServerArgs(model_path=model, port=int(port), max_total_tokens=20000, **by_hand)
    server = launch_server_process(server_args)

    def ask(custom_params, headers):
        sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": custom_params}
        body = {"text": "bake lomi", "sampling_params": sampling, "return_logprob": True}
        return requests.post(server_args.url() + "/generate", json=body, headers=headers, timeout=120)

    try:
        forged = {"tbt_slo": 1, "slo_source": "me", "slo_weight": 9, "sheddable": False}
        for custom_params, headers in (
            ({}, {}),
            ({}, {"X-SLO-TTFT-MS": "1500"}),
            ({"slo_class": "interactive"}, {}),
            ({"ttft_slo": 2.5, "slo_class": "batch"} | forged, {}),
        ):
            answer = ask(custom_params, headers)
            assert answer.status_code == 200
            print("answer:", json.dumps(["bake lomi", answer.json()["meta_info"]["output_token_logprobs"]]))
        print("refused:", ask({"slo_class": "urgent"}, {}).status_code)
        print("live page:", requests.get(server_args.url() + "/flowprefill", timeout=60).status_code)
        time.sleep(1)  # the log reaches the file when the scheduler turns idle
    finally:
        kill_process_tree(server.pid)
"""


@pytest.mark.parametrize(("method", "options"), [("spawn", "set"), ("fork", "set"), ("fork", "by hand")])
def test_a_server_that_another_process_starts_knows_what_its_clients_ask_for(
    method: str, options: str, comparison: Comparison, tmp_path: Path
) -> None:
    run, log = run_program(tmp_path, SERVER, str(free_port("127.0.0.1")), method, options)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert {"refused: 400", "live page: 200"} <= set(run.stdout.splitlines())
    compare(comparison, run, answers=4)
    arrivals = [event for event in read_events(log) if isinstance(event, Arrival)]
    seen = [
        (event.ttft_slo_s, event.slo_class, event.slo_source)
        for event in arrivals
        if not event.rid.startswith(HEALTH_CHECK_RID_PREFIX)
    ]
    assert seen[-4:] == [
        (5.0, "default", "default"),
        (1.5, "default", "header x-slo-ttft-ms"),
        (0.75, "interactive", "body"),
        (2.5, "batch", "body"),
    ]
