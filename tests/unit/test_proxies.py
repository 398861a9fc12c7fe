"""Where the environment names a proxy, a cluster is asked without it: by a proxy that refuses everything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import requests

from sgl_flowprefill.cluster import StartError, cli, machine, preflight
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.cluster.proxies import VARIABLES, ask_directly
from sgl_flowprefill.cluster.top_command import documents
from sgl_flowprefill.live import STATE
from tests.http_server import answering

ASK = "import requests, sys; sys.exit(requests.get(sys.argv[1], timeout=10).status_code != 200)"


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    with answering(lambda path, headers: (403, "by the proxy")) as url:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, url)
        yield


def answer(path: str, headers: Mapping[str, str]) -> tuple[int, str]:
    return 200, '{"workers": []}'


def test_launcher_and_servers_ask_this_machine_without_the_proxy() -> None:
    with answering(answer) as url:
        assert requests.get(url, timeout=10).status_code == 403, "the proxy is there"
        layout = preflight.prepare(cli.parse(["--ports", "0"]))
        assert requests.get(url, timeout=10).status_code == 200
        for env in (layout.server_env("prefill"), layout.gateway_env()):
            subprocess.run([sys.executable, "-c", ASK, url], env=env, check=True)
    assert requests.get("http://model.example", timeout=10).text == "by the proxy", "the web is asked as before"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_the_gateway_that_servers_join_is_asked_without_the_proxy(host: str) -> None:
    with answering(answer) as url:
        preflight.prepare(cli.parse(["--role", "decode", "--join", url.replace("127.0.0.1", host)]))
        assert Gateway(url).workers() == []
    assert {host, "127.0.0.1"} <= set(os.environ["no_proxy"].split(","))


def test_top_asks_the_server_that_it_is_told_of_without_the_proxy() -> None:
    with (
        answering(lambda path, headers: (200 if path == STATE else 404, "")) as url,
        pytest.raises(StartError, match=r"is no server with FlowPrefill \(status 200\)"),
    ):
        next(documents(url, None))
    with pytest.raises(StartError, match=r"--url http://\[no: nothing answers there"):
        next(documents("http://[no", None))


@pytest.mark.parametrize(
    ("upper", "lower", "expected"),
    [
        ("", "", "127.0.0.1,localhost,::1,10.0.0.5"),
        ("corp.example", "", "corp.example,127.0.0.1,localhost,::1,10.0.0.5"),
        ("a.example, 10.0.0.5", "b.example,localhost", "a.example,10.0.0.5,b.example,localhost,127.0.0.1,::1"),
    ],
)
def test_hosts_that_the_user_asks_without_a_proxy_stay_so(
    upper: str, lower: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", upper)
    monkeypatch.setenv("no_proxy", lower)
    ask_directly("10.0.0.5", None)
    assert [os.environ[name] for name in VARIABLES] == [expected] * 2


def test_a_user_who_asks_all_hosts_without_a_proxy_goes_on_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("no_proxy")
    ask_directly("10.0.0.5")
    assert os.environ["NO_PROXY"] == "*"
    assert requests.utils.should_bypass_proxies("http://model.example", None)
