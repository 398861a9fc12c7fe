"""The Kubernetes manifests: valid against the API's schemas, and in agreement with the launcher and each other; and the
image that they use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from sgl_flowprefill.cluster import cli, preflight
from sgl_flowprefill.cluster.base import KEY_VARIABLE, ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig, is_enabled
from tests.namespaces import unshare_pids

DIRECTORY = Path(__file__).parents[2] / "deploy" / "kubernetes"
OLDEST, NEWEST = "1.30", "1.33"
RESOURCES = [
    pytest.param(resource, id=f"{resource['kind']} {resource['metadata']['name']}")
    for file in sorted(DIRECTORY.glob("*.yaml"))
    if file.name != "kustomization.yaml"
    for resource in yaml.safe_load_all(file.read_text())
]


def named(kind, name):
    return next(
        p.values[0] for p in RESOURCES if (p.values[0]["kind"], p.values[0]["metadata"]["name"]) == (kind, name)
    )


def container(role):
    return named("Deployment", f"flowprefill-{role}")["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("resource", RESOURCES)
def test_the_manifests_are_valid(resource, version):
    kubernetes_validate.validate(resource, version, strict=True)


def test_the_schema_check_finds_mistakes():
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(named("Service", "flowprefill") | {"speck": {}}, NEWEST, strict=True)


@pytest.mark.parametrize("role", ["prefill", "decode", "gateway"])
def test_the_launcher_takes_the_arguments(role, monkeypatch):
    monkeypatch.setattr(preflight, "own_address", lambda gateway: "10.0.0.7")
    config = cli.parse(container(role)["args"])
    servers = (config.prefill, config.decode)
    assert servers == {"prefill": (1, 0), "decode": (0, 1), "gateway": (0, 0)}[role]
    [port] = container(role)["ports"]
    assert getattr(config.ports, role) == port["containerPort"]
    if role == "gateway":
        assert config.host == "0.0.0.0"
    else:
        assert config.host == "10.0.0.7"
        join = named("Service", urlsplit(config.join).hostname)["spec"]
        assert join["publishNotReadyAddresses"]
        assert join["selector"].items() <= named("Deployment", "flowprefill-gateway")["metadata"]["labels"].items()
        assert [port["port"] for port in join["ports"]] == [urlsplit(config.join).port]


@pytest.mark.parametrize("role", ["prefill", "decode", "gateway"])
def test_every_container_is_probed_and_has_time_to_end(role):
    assert container(role)["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert container(role)["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert container(role)["readinessProbe"]["httpGet"]["port"] == "http"
    pod = named("Deployment", f"flowprefill-{role}")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > ClusterConfig.drain_timeout_s
    mounted = {mount["name"] for mount in container(role)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_servers_get_a_token_for_gated_models_where_there_is_one(role):
    _, token = container(role)["env"]
    assert token["name"] == "HF_TOKEN"
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True


def test_the_config_map_turns_flowprefill_on():
    environment = named("ConfigMap", "flowprefill")["data"]
    assert is_enabled(environment)
    assert FlowPrefillConfig.from_env(environment).default_ttft_slo == 5.0
    for role in ("prefill", "decode"):
        assert container(role)["envFrom"] == [{"configMapRef": {"name": "flowprefill"}}]


def selects(selector, labels):
    expressions = selector.get("matchExpressions", [])
    assert {expression["operator"] for expression in expressions} <= {"In"}
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def may_connect(source, target, port):
    """Whether the policies let pods with these labels of one namespace connect, as the API documents it."""
    policies = [p.values[0]["spec"] for p in RESOURCES if p.values[0]["kind"] == "NetworkPolicy"]
    own = [policy for policy in policies if selects(policy["podSelector"], target)]
    rules = [rule for policy in own for rule in policy["ingress"]]
    return not own or any(
        any(peer.keys() == {"podSelector"} and selects(peer["podSelector"], source) for peer in rule["from"])
        and port in [allowed["port"] for allowed in rule.get("ports", [{"port": port}])]
        for rule in rules
    )


def labels(role):
    return named("Deployment", f"flowprefill-{role}")["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize(
    ("source", "reachable"),
    [
        ({"app": "anything"}, []),
        ({"flowprefill-client": "true"}, ["gateway http"]),
        ({"flowprefill-client": "false"}, []),
        ("gateway", ["prefill http", "decode http"]),
        ("prefill", ["gateway http", "prefill http", "prefill 8998", "decode http", "decode 8998"]),
        ("decode", ["gateway http", "prefill http", "prefill 8998", "decode http", "decode 8998"]),
    ],
)
def test_only_the_gateway_reaches_servers_and_only_clients_the_gateway(source, reachable):
    source = labels(source) if isinstance(source, str) else source
    targets = [(role, port) for role in ("gateway", "prefill", "decode") for port in ("http", 8998)]
    assert [f"{role} {port}" for role, port in targets if may_connect(source, labels(role), port)] == reachable


@pytest.mark.parametrize("role", ["prefill", "decode", "gateway"])
def test_no_container_starts_without_the_key(role):
    key, *_ = container(role)["env"]
    [generated] = kustomization()["secretGenerator"]
    assert key["name"] == KEY_VARIABLE
    assert key["valueFrom"] == {"secretKeyRef": {"name": generated["name"], "key": "key"}}
    assert generated["files"] == ["key=api-key.txt"]


def kustomization():
    return yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())


def test_all_manifests_are_applied_and_no_key_comes_with_them():
    files = {file.name for file in DIRECTORY.iterdir()} - {"kustomization.yaml", "api-key.txt"}
    assert set(kustomization()["resources"]) == files
    assert [p.values[0]["kind"] for p in RESOURCES if p.values[0]["kind"] == "Secret"] == []
    ignored = (DIRECTORY.parents[1] / ".gitignore").read_text().splitlines()
    assert "deploy/kubernetes/api-key.txt" in ignored


def entry_point():
    """The image's, as a list."""
    lines = (DIRECTORY.parent / "Dockerfile").read_text().splitlines()
    return json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT"))


ORPHANS = """
import subprocess, sys, time
import psutil
subprocess.run(["sh", "-c", "sleep 0.1 & sleep 0.1 &"], start_new_session=True)
time.sleep(1)
print([process.pid for process in psutil.process_iter() if process.status() == psutil.STATUS_ZOMBIE])
"""


def test_the_image_leaves_no_zombies():
    init, dashes, *launcher = entry_point()
    assert (init, dashes, launcher) == ("tini", "--", ["python3", "launch.py"])
    if shutil.which(init) is None:
        pytest.skip("tini is not installed here")
    script = [sys.executable, "-c", ORPHANS]
    namespace = unshare_pids()
    assert subprocess.run([*namespace, *script], capture_output=True, text=True, timeout=60).stdout != "[]\n"
    result = subprocess.run([*namespace, init, dashes, *script], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr
