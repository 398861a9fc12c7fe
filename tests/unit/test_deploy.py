"""The Kubernetes manifests: valid against the API's schemas, and in agreement with the launcher and each other."""

from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from sgl_flowprefill.cluster import cli, preflight
from sgl_flowprefill.cluster.cluster import DRAIN_S
from sgl_flowprefill.config import FlowPrefillConfig, is_enabled

DIRECTORY = Path(__file__).parents[2] / "deploy" / "kubernetes"
OLDEST, NEWEST = "1.30", "1.33"
RESOURCES = [
    pytest.param(resource, id=f"{resource['kind']} {resource['metadata']['name']}")
    for file in sorted(DIRECTORY.glob("*.yaml"))
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
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    mounted = {mount["name"] for mount in container(role)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_servers_get_a_token_for_gated_models_where_there_is_one(role):
    [token] = container(role)["env"]
    assert token["name"] == "HF_TOKEN"
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True


def test_the_config_map_turns_flowprefill_on():
    environment = named("ConfigMap", "flowprefill")["data"]
    assert is_enabled(environment)
    assert FlowPrefillConfig.from_env(environment).default_ttft_slo == 5.0
    for role in ("prefill", "decode"):
        assert container(role)["envFrom"] == [{"configMapRef": {"name": "flowprefill"}}]
