"""A prefill that fails on a real pair of servers: its client gets a 500, both free what it held, others go on."""

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
from tests.reference import Comparison

pytestmark = pytest.mark.server

LONG, FAILING = prompt(61, 9000), prompt(62, 700)


def generate(cluster: Cluster, tokens: list[int], slo_s: float, **custom_params: Any) -> requests.Response:
    sampling = {"max_new_tokens": 4, "temperature": 0, "custom_params": {"ttft_slo": slo_s, **custom_params}}
    return requests.post(
        cluster.url + "/generate", json={"input_ids": tokens, "sampling_params": sampling}, timeout=120
    )


def output_ids(response: requests.Response) -> list[int]:
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["output_ids"]
    return ids


def wait_until_idle(url: str) -> None:
    """A server flushes its cache only if it holds no request, such as a health check of the gateway's."""
    deadline_s = time.monotonic() + 20.0
    while requests.post(url + "/flush_cache", timeout=30).status_code != 200:
        assert time.monotonic() < deadline_s, f"{url} still holds a request"
        time.sleep(0.2)


@pytest.mark.parametrize("fault", ["memory", "error"])
def test_its_client_gets_a_500_with_an_id_that_the_log_has_and_others_their_tokens(
    flowprefill_cluster: Cluster, comparison: Comparison, fault: str
) -> None:
    cluster = flowprefill_cluster
    for url in (cluster.prefill_url, cluster.decode_url):
        wait_until_idle(url)
    with ThreadPoolExecutor(2) as clients:
        suspended = clients.submit(generate, cluster, LONG, 60.0)
        time.sleep(0.2)
        failed = generate(cluster, FAILING, 2.0, **{PARAMETER: fault})
        assert failed.status_code == 500, failed.text
        found = re.search(r"error ([0-9a-f]{12})", failed.text)
        assert found is not None, failed.text
        comparison.answer("suspended", LONG, output_ids(suspended.result()), None)
    log_dir = cluster.config.log_dir
    assert log_dir is not None
    log = (Path(log_dir) / "prefill.log").read_text()
    assert f"FlowPrefill: error {found[1]} in the prefill of" in log
    for url in (cluster.prefill_url, cluster.decode_url):
        wait_until_idle(url)
    comparison.answer("failed before", FAILING, output_ids(generate(cluster, FAILING, 2.0)), None)
    comparison.assert_same()
    assert comparison.counts["tokens"] == 8
