"""A prefill that fails on real servers: its client gets a 500, all servers free what they held, others go on."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from sgl_flowprefill.cluster import Cluster
from tests.faults import PARAMETER
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison
from tests.waiting import until

LONG, FAILING = prompt(61, 6000), prompt(62, 700)


def generate(cluster: Cluster, tokens: list[int], slo_s: float, **custom_params: Any) -> requests.Response:
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "custom_params": {"ttft_slo": slo_s, **custom_params}}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
    return requests.post(cluster.url + "/generate", json=body, timeout=120)


def compare(comparison: Comparison, name: str, tokens: list[int], response: requests.Response) -> None:
    assert response.status_code == 200, response.text
    logprobs = response.json()["meta_info"]["output_token_logprobs"]
    comparison.answer(name, tokens, [entry[1] for entry in logprobs], [entry[0] for entry in logprobs])


def wait_until_idle(url: str) -> None:
    """A server flushes its cache only if it holds no request, such as a health check of the gateway's."""
    until(
        lambda: requests.post(url + "/flush_cache", timeout=30).status_code == 200,
        20,
        say=lambda: f"{url} still holds a request",
        every_s=0.2,
    )


@pytest.mark.parametrize("servers", ["unified_server", "flowprefill_cluster"])
@pytest.mark.parametrize("fault", ["memory", "error"])
def test_its_client_gets_a_500_with_an_id_that_the_log_has_and_others_their_tokens(
    request: pytest.FixtureRequest, servers: str, comparison: Comparison, fault: str
) -> None:
    cluster: Cluster = request.getfixturevalue(servers)
    for url in cluster.server_urls:
        wait_until_idle(url)
    with ThreadPoolExecutor(2) as clients:
        suspended = clients.submit(generate, cluster, LONG, 60.0)
        time.sleep(0.2)
        failed = generate(cluster, FAILING, 2.0, **{PARAMETER: fault})
        assert failed.status_code == 500, failed.text
        found = re.search(r"error ([0-9a-f]{12})", failed.text)
        assert found is not None, failed.text
        compare(comparison, "suspended", LONG, suspended.result())
    log_dir = cluster.config.log_dir
    assert log_dir is not None
    log = (Path(log_dir) / ("unified.log" if cluster.config.unified else "prefill.log")).read_text()
    assert f"FlowPrefill: error {found[1]} in the prefill of" in log
    for url in cluster.server_urls:
        wait_until_idle(url)
    compare(comparison, "failed before", FAILING, generate(cluster, FAILING, 2.0))
    comparison.assert_same()
    assert comparison.counts["tokens"] == comparison.counts["log probabilities"] == 2 * TOKENS
