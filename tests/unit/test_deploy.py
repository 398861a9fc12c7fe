"""The Kubernetes manifests: valid against the API's schemas, and in agreement with the launcher and each other; and the
image that they use."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from sgl_flowprefill import __version__
from sgl_flowprefill.cluster import cli, machine, preflight
from sgl_flowprefill.cluster.base import KEY_VARIABLE, ClusterConfig, Ports
from sgl_flowprefill.cluster.commands import last_value
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.config import FlowPrefillConfig, is_enabled
from tests.namespaces import unshare_pids

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "kubernetes.md"
OLDEST, NEWEST = "1.30", "1.33"
COMMON = "../common"
SHAPES = {"unified": ("unified",), "disaggregated": ("prefill", "decode", "gateway")}
"""Folders of manifests, and the roles of the pods that each has."""
PODS = [(shape, role) for shape, roles in SHAPES.items() for role in roles]
SERVERS = [(shape, role) for shape, role in PODS if role != "gateway"]


def kustomization(folder):
    return yaml.safe_load((DIRECTORY / folder / "kustomization.yaml").read_text())


def resources(shape):
    """What is applied, besides what kustomize generates."""
    files = [DIRECTORY / shape / file for file in kustomization(shape)["resources"] if file != COMMON]
    return [resource for file in files for resource in yaml.safe_load_all(file.read_text())]


RESOURCES = [
    pytest.param(resource, id=f"{shape} {resource['kind']} {resource['metadata']['name']}")
    for shape in SHAPES
    for resource in resources(shape)
]


def of_kind(shape, kind):
    return [resource for resource in resources(shape) if resource["kind"] == kind]


def named(shape, kind, name):
    return next(resource for resource in of_kind(shape, kind) if resource["metadata"]["name"] == name)


def pod(shape, role):
    return named(shape, "Deployment", f"flowprefill-{role}")["spec"]["template"]


def container(shape, role):
    [only] = pod(shape, role)["spec"]["containers"]
    return only


def all_containers(shape, role):
    return [*pod(shape, role)["spec"]["initContainers"], container(shape, role)]


def labels(shape, role):
    return pod(shape, role)["metadata"]["labels"]


def ports(shape, role):
    return {port["name"]: port["containerPort"] for port in container(shape, role)["ports"]}


def variables(a_container):
    return {variable["name"]: variable for variable in a_container["env"]}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("resource", RESOURCES)
def test_the_manifests_are_valid(resource, version):
    kubernetes_validate.validate(resource, version, strict=True)


def test_the_schema_check_finds_mistakes():
    service = named("unified", "Service", "flowprefill")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service | {"speck": {}}, NEWEST, strict=True)


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_the_launcher_takes_the_arguments(shape, role, monkeypatch):
    monkeypatch.setattr(preflight, "own_address", lambda gateway: "10.0.0.7")
    config = cli.parse(container(shape, role)["args"])
    started = {"unified": (0, 0, 1), "prefill": (1, 0, 0), "decode": (0, 1, 0), "gateway": (0, 0, 0)}
    assert (config.prefill, config.decode, config.unified) == started[role]
    assert config.host == "0.0.0.0"  # the pod's address, and what kubectl port-forward connects to
    own = config.ports.gateway if role == "unified" else getattr(config.ports, role)
    assert own == ports(shape, role)["http"]
    if role in ("prefill", "decode"):
        join = named(shape, "Service", urlsplit(config.join).hostname)["spec"]
        assert join["publishNotReadyAddresses"]
        assert join["selector"].items() <= labels(shape, "gateway").items()
        assert [port["port"] for port in join["ports"]] == [urlsplit(config.join).port]
    else:
        assert config.join is None


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_server_listens_everywhere_and_registers_the_address_of_its_pod(role, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.setattr(preflight, "own_address", lambda gateway: "10.0.0.7")
    monkeypatch.setattr(Gateway, "workers", lambda gateway: [])
    (tmp_path / "config.json").write_text("{}")
    given = container("disaggregated", role)["args"]
    args = [str(tmp_path) if argument == "$(MODEL)" else argument for argument in given]
    layout = preflight.prepare(dataclasses.replace(cli.parse(args), ports=Ports()))
    assert urlsplit(layout.server_url(role)).hostname == "10.0.0.7"
    assert dict(pairwise(layout.server_options(role)))["--host"] == "0.0.0.0"


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_every_container_is_probed_and_has_time_to_end(shape, role):
    probed = container(shape, role)
    assert probed["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert probed["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert probed["readinessProbe"]["httpGet"]["port"] == "http"
    spec = pod(shape, role)["spec"]
    before_s = 0
    if "lifecycle" in probed:
        command, seconds = probed["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        before_s = int(seconds)
    assert (before_s > 0) == (role == "unified")  # the others leave their gateway first
    assert spec["terminationGracePeriodSeconds"] > before_s + ClusterConfig.drain_timeout_s
    mounted = {mount["name"] for mount in probed["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_service_leads_to_a_port_of_the_pods_that_it_selects(shape):
    services = of_kind(shape, "Service")
    assert "flowprefill" in [service["metadata"]["name"] for service in services]
    for service in services:
        selector = service["spec"]["selector"].items()
        [selected] = [role for role in SHAPES[shape] if selector <= labels(shape, role).items()]
        assert all(port["targetPort"] in ports(shape, selected) for port in service["spec"]["ports"])


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_the_log_that_is_shown_is_the_one_that_is_written(shape, role, monkeypatch):
    monkeypatch.setattr(preflight, "own_address", lambda gateway: "10.0.0.7")
    [shown] = pod(shape, role)["spec"]["initContainers"]
    log = str(cli.parse(container(shape, role)["args"]).log(role))
    assert shown["restartPolicy"] == "Always"  # a sidecar, not a step before the others
    assert f"tail -n +1 -F {log} &" in " ".join(shown["args"]).replace("\n", " ")
    assert {"name": "logs", "mountPath": str(Path(log).parent)} in shown["volumeMounts"]
    assert {"name": "logs", "mountPath": str(Path(log).parent)} in container(shape, role)["volumeMounts"]
    [volume] = [volume for volume in pod(shape, role)["spec"]["volumes"] if volume["name"] == "logs"]
    assert volume["emptyDir"]["sizeLimit"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_image_is_of_this_version_and_from_a_registry(shape):
    assert {one["image"] for role in SHAPES[shape] for one in all_containers(shape, role)} == {"sgl-flowprefill"}
    [image] = kustomization(shape)["images"]
    assert image["name"] == "sgl-flowprefill"
    reference = f"{image['newName']}:{image['newTag']}"
    assert reference == f"REGISTRY/sgl-flowprefill:{__version__}"
    assert f"docker build -t {reference} " in PAGE.read_text()
    assert f"docker push {reference}\n" in PAGE.read_text()


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_no_container_has_more_rights_than_it_needs(shape, role):
    assert pod(shape, role)["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(shape, role)["spec"]["automountServiceAccountToken"] is False
    for one in all_containers(shape, role):
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        has_gpu = "nvidia.com/gpu" in one["resources"]["limits"]
        assert has_gpu == (one["name"] in ("unified", "prefill", "decode"))
        assert has_gpu or variables(one)["NVIDIA_VISIBLE_DEVICES"]["value"] == "void"
    assert pod(shape, role)["spec"]["securityContext"].get("runAsNonRoot", False) == (role == "gateway")


@pytest.mark.parametrize("shape", SHAPES)
def test_one_server_of_a_kind_may_be_evicted_at_a_time(shape):
    budgets = of_kind(shape, "PodDisruptionBudget")
    assert all(budget["spec"]["maxUnavailable"] == 1 for budget in budgets)
    covered = [
        role for role in SHAPES[shape] for budget in budgets if selects(budget["spec"]["selector"], labels(shape, role))
    ]
    assert covered == [role for role in SHAPES[shape] if role != "gateway"]


@pytest.mark.parametrize(("shape", "role"), SERVERS)
def test_servers_get_a_token_for_gated_models_where_there_is_one(shape, role):
    token = variables(container(shape, role))["HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["optional"] is True


def test_the_settings_turn_flowprefill_on_and_a_change_of_them_starts_servers_again():
    [settings] = kustomization("common")["configMapGenerator"]
    environment = dict(literal.split("=", 1) for literal in settings["literals"])
    assert is_enabled(environment)
    assert FlowPrefillConfig.from_env(environment).default_ttft_slo == 5.0
    assert environment["MODEL"]
    generators = [settings, *(kustomization(folder).get("generatorOptions", {}) for folder in ("common", *SHAPES))]
    assert not any("disableNameSuffixHash" in one.get("options", one) for one in generators)
    for shape, role in SERVERS:
        assert container(shape, role)["envFrom"] == [{"configMapRef": {"name": settings["name"]}}]
    assert [of_kind(shape, "ConfigMap") for shape in SHAPES] == [[], []]  # one that is no generator's has no hash


def selects(selector, of_labels):
    expressions = selector.get("matchExpressions", [])
    assert {expression["operator"] for expression in expressions} <= {"In"}
    return selector.get("matchLabels", {}).items() <= of_labels.items() and all(
        of_labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def may_connect(shape, source, target, port, namespace=None):
    """Whether the policies let pods with these labels connect, as the API documents it: pods of one namespace, or where
    ``namespace`` has the labels of the source's, of another one."""
    policies = [policy["spec"] for policy in of_kind(shape, "NetworkPolicy")]
    own = [policy for policy in policies if selects(policy["podSelector"], target)]
    rules = [rule for policy in own for rule in policy["ingress"]]
    return not own or any(
        any(is_peer(peer, source, namespace) for peer in rule["from"])
        and port in [allowed["port"] for allowed in rule.get("ports", [{"port": port}])]
        for rule in rules
    )


def is_peer(peer, source, namespace):
    [(kind, selector)] = peer.items()
    if kind == "podSelector":
        return namespace is None and selects(selector, source)
    assert kind == "namespaceSelector"
    return namespace is not None and selects(selector, namespace)


MONITORING = {"kubernetes.io/metadata.name": "monitoring", "flowprefill-metrics": "true"}
ANY_SERVER = ["prefill http", "prefill metrics", "prefill 8998", "decode http", "decode metrics", "decode 8998"]


@pytest.mark.parametrize(
    ("shape", "source", "namespace", "reachable"),
    [
        ("unified", {"app": "anything"}, None, []),
        ("unified", {"flowprefill-client": "true"}, None, ["unified http"]),
        ("unified", {"flowprefill-client": "true"}, {"name": "another"}, []),
        ("unified", "unified", None, []),
        ("unified", {"app": "prometheus"}, MONITORING, ["unified http"]),
        ("disaggregated", {"app": "anything"}, None, []),
        ("disaggregated", {"flowprefill-client": "true"}, None, ["gateway http"]),
        ("disaggregated", {"flowprefill-client": "false"}, None, []),
        ("disaggregated", "gateway", None, ["prefill http", "decode http"]),
        ("disaggregated", "prefill", None, ["gateway http", *ANY_SERVER]),
        ("disaggregated", "decode", None, ["gateway http", *ANY_SERVER]),
        ("disaggregated", "gateway", {"name": "another"}, []),
        ("disaggregated", {"app": "prometheus"}, MONITORING, ["gateway metrics", "prefill http", "decode http"]),
    ],
)
def test_only_clients_and_the_gateway_and_who_reads_metrics_can_connect(shape, source, namespace, reachable):
    source = labels(shape, source) if isinstance(source, str) else source
    roles = [role for role in ("unified", "gateway", "prefill", "decode") if role in SHAPES[shape]]
    targets = [(role, port) for role in roles for port in ("http", "metrics", 8998)]
    found = [
        f"{role} {port}" for role, port in targets if may_connect(shape, source, labels(shape, role), port, namespace)
    ]
    assert found == reachable


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pod_has_metrics_that_can_be_read(shape, monkeypatch):
    monkeypatch.setattr(preflight, "own_address", lambda gateway: "10.0.0.7")
    for role in SHAPES[shape]:
        config = cli.parse(container(shape, role)["args"])
        if role == "gateway":
            assert last_value(config.gateway_args, "--prometheus-host") == "0.0.0.0"
            assert last_value(config.gateway_args, "--prometheus-port") == str(ports(shape, role)["metrics"])
        else:
            assert "--enable-metrics" in config.server_args
        [monitored] = [monitor for monitor in pod_monitors() if selects(monitor["selector"], labels(shape, role))]
        [endpoint] = monitored["podMetricsEndpoints"]
        assert endpoint["port"] in ports(shape, role)
        assert may_connect(shape, {}, labels(shape, role), endpoint["port"], MONITORING)


def pod_monitors():
    """Those that the page shows."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    shown = [document for block in blocks for document in yaml.safe_load_all(block)]
    return [document["spec"] for document in shown if document.get("kind") == "PodMonitor"]


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_no_container_starts_without_the_key(shape, role):
    key = variables(container(shape, role))[KEY_VARIABLE]
    [generated] = kustomization("common")["secretGenerator"]
    assert key["valueFrom"] == {"secretKeyRef": {"name": generated["name"], "key": "key"}}
    assert generated["files"] == ["key=api-key.txt"]
    assert generated["options"]["disableNameSuffixHash"] is True  # it is asked for by its name


def test_all_manifests_are_applied_and_no_key_comes_with_them():
    assert {folder.name for folder in DIRECTORY.iterdir()} == {"common", *SHAPES}
    for shape in SHAPES:
        files = {file.name for file in (DIRECTORY / shape).iterdir()} - {"kustomization.yaml"}
        assert set(kustomization(shape)["resources"]) == {COMMON, *files}
        assert of_kind(shape, "Secret") == []
    assert {file.name for file in (DIRECTORY / "common").iterdir()} - {"api-key.txt"} == {"kustomization.yaml"}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "deploy/kubernetes/common/api-key.txt" in ignored
    assert "deploy/kubernetes" in (ROOT / ".dockerignore").read_text().splitlines()


PART_OF = {"app.kubernetes.io/part-of": "flowprefill"}


def test_a_rollout_is_of_a_deployment_by_its_name_or_of_ours():
    """Without either, it is of all Deployments in the namespace."""
    ours = ["-l", *(f"{key}={value}" for key, value in PART_OF.items())]
    rollouts = [command.split()[2:] for command in re.findall(r"kubectl rollout [^`\n]+", PAGE.read_text())]
    assert {verb for verb, *_ in rollouts} == {"undo", "restart", "pause", "resume"}
    for verb, kind, *which in rollouts:
        assert kind == "deployment"
        assert which == ours or (len(which) == 1 and not which[0].startswith("-")), verb
    for shape, role in PODS:
        deployment = named(shape, "Deployment", f"flowprefill-{role}")
        assert PART_OF.items() <= deployment["metadata"]["labels"].items()


def dockerfile():
    return (ROOT / "deploy" / "Dockerfile").read_text().splitlines()


def test_the_image_keeps_the_sglang_of_its_base_or_is_not_built():
    [install] = [line for line in dockerfile() if "pip install" in line]
    pinned = "sed -n 's/^Version: /==/p'"
    assert install.endswith(f'. "sglang$(python3 -m pip show sglang 2>/dev/null | {pinned})"')


def test_a_change_of_the_code_leaves_the_systems_packages_of_the_image():
    instructions = [line.split()[0] for line in dockerfile() if line[:1].isupper()]
    systems = next(line for line in dockerfile() if "apt-get install" in line)
    assert instructions.index("RUN") < instructions.index("COPY")
    assert {"tini", "libgomp1"} < set(systems.split())
    assert systems.startswith("RUN ")


def test_what_servers_cache_is_in_the_volume_that_may_stay():
    environment = dict(
        setting.split("=") for line in dockerfile() if line.startswith("ENV ") for setting in line.split()[1:]
    )
    named_by = {"FLOWPREFILL_CACHE_DIR", "HF_HOME", "FLASHINFER_WORKSPACE_BASE", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"}
    assert environment.keys() == named_by
    for shape, role in SERVERS:
        [cache] = [mount["mountPath"] for mount in container(shape, role)["volumeMounts"] if mount["name"] == "cache"]
        assert all(value.startswith(f"{cache}/") for value in environment.values())


def entry_point():
    """The image's, as a list."""
    return json.loads(next(line for line in dockerfile() if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT"))


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
