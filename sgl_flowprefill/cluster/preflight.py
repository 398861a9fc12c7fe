"""What can be known before a server is started: ports, model, devices, memory and options.

Every check raises StartError with one sentence that names what was found and the way out.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import requests

from sgl_flowprefill.cluster import free_ports, machine
from sgl_flowprefill.cluster.base import GATEWAY_PORT, ClusterConfig, StartError
from sgl_flowprefill.cluster.commands import (
    CPU_PLATFORM,
    GUIDING_OPTIONS,
    JOINT_ATTENTION,
    PLATFORM_VARIABLE,
    PLUGIN,
    ROLES,
    Layout,
    Role,
    last_value,
)
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.cluster.proxies import ask_directly
from sgl_flowprefill.cluster.saying import say
from sgl_flowprefill.compat import incompatible_option, risks, take_over
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.model.embedded import EmbeddedModel
from sgl_flowprefill.paths import CACHE_VARIABLE

OWN_OPTIONS: Final = {
    "--model-path": "--model-path of the launcher",
    "--model": "--model-path of the launcher",
    "--host": "--host of the launcher",
    "--port": "--ports",
    "--api-key": "--api-key of the launcher",
    "--disaggregation-bootstrap-port": "--ports",
    "--disaggregation-mode": "nothing: the launcher starts servers of each mode, or with --unified servers of none",
}
"""SGLang options that the launcher sets itself, and what to use instead."""
OWN_GATEWAY_OPTIONS: Final = {
    "--host": "--host of the launcher",
    "--port": "--ports of the launcher",
    "--api-key": OWN_OPTIONS["--api-key"],
    "--worker-urls": "--unified N, or --role unified --join for servers elsewhere",
    "--prefill": "--prefill N, or --role prefill --join for servers elsewhere",
    "--decode": "--decode N, or --role decode --join for servers elsewhere",
}
"""Options of smg that the launcher sets itself, and what to use instead."""
CONFIG: Final = "--config"
"""SGLang's option that names a file with options."""
TLS_OPTIONS: Final = ("--ssl-", "--enable-ssl-", "--tls-")
"""How options of SGLang and smg begin that make them speak TLS."""
FOREIGN_WORKERS: Final = {
    "prefill": {"regular": "unified"},
    "decode": {"regular": "unified"},
    "unified": {"prefill": "prefill", "decode": "decode"},
}
"""Servers beside which those of a role get no requests, by smg's names of them."""
GGUF_ON_HUB: Final = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+|/.+\.gguf)")
"""SGLang's names of GGUF files on the Hugging Face hub: OWNER/REPOSITORY:QUANTIZATION, and with the file's path."""
PLUGINS: Final = "sglang.srt.plugins"
"""The group of entry points in which SGLang looks for plugins."""
MODELSCOPE_VARIABLE: Final = "SGLANG_USE_MODELSCOPE"
SERVER_BYTES: Final = 3_000_000_000
"""Memory that an SGLang server's processes take without weights and KV cache."""


def prepare(config: ClusterConfig) -> Layout:
    """Check everything; returns what to start. From now on, this process asks the cluster without a proxy."""
    config = _spelled_out(config)
    _check_nodes(config)
    host = _reachable_host(config)
    ask_directly(host)
    if config.join is not None:
        ask_directly(urlsplit(config.join).hostname)
        role: Role = "unified" if config.unified else "prefill" if config.prefill else "decode"
        _check_gateway(Gateway(config.join, config.api_key), role, host)
    on_cpu = runs_on_cpu(config.server_args, is_embedded=config.model_path is None)
    servers = config.prefill + config.decode + config.unified
    model_path = _find_model(config) if servers else ""
    layout = Layout(config=config, model_path=model_path, ports=config.ports, cpus=None, host=host)
    ports = free_ports.choose_ports(
        config.host,
        config.ports,
        config.prefill,
        config.decode,
        config.worker_host,
        unified=0 if config.is_one_server else config.unified,
        joint=[role for role in ROLES if layout.is_joint(role)],
        live=config.live_port if config.has_live_page else None,
    )
    layout = dataclasses.replace(layout, ports=ports)
    if not on_cpu:
        _check_gpus(layout)
    elif servers:
        ranks = layout.ranks("unified" if config.unified else "prefill") if layout.prefilling else 0
        layout = dataclasses.replace(layout, cpus=machine.plan_cpus(machine.usable_cpus(), ranks, config.unified))
        if Path(model_path).is_dir():
            _check_memory(layout)
    if config.flowprefill and servers:
        _check_plugin(on_cpu)
    _check_options(layout)
    return layout


def _check_plugin(on_cpu: bool) -> None:
    """Raises StartError where SGLang would serve without FlowPrefill, and say nothing of it."""
    if not entry_points(group=PLUGINS, name=PLUGIN):
        raise StartError(
            f"SGLang finds no plugin {PLUGIN} (entry point of the group {PLUGINS}); run `pip install .` in the "
            f"folder of sgl-flowprefill, with the pip of {sys.executable}"
        )
    platform = os.environ.get(PLATFORM_VARIABLE)
    if platform and platform != CPU_PLATFORM and not on_cpu:
        raise StartError(
            f"{PLATFORM_VARIABLE}={platform} keeps SGLang from loading the plugins of packages with another platform, "
            "which sgl-flowprefill is; unset it, or serve without --flowprefill"
        )


def read_options(options: Sequence[str]) -> argparse.Namespace:
    """Read options the way that SGLang's command line does. Raises StartError."""
    parser = _sglang_parser()
    return parser.parse_args(_merged(parser, options))


def _sglang_parser() -> SGLangParser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.server_args import ServerArgs

    parser = SGLangParser(prog="SGLang", add_help=False)
    ServerArgs.add_cli_args(parser)
    return parser


def _merged(parser: SGLangParser, options: Sequence[str]) -> list[str]:
    """``options`` with those of a --config file, which come first, in place of its name. Raises StartError."""
    options = _apart(options)
    if CONFIG not in options:
        return options
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    # It logs what it raises.
    logging.getLogger("sglang.srt.utils.server_args_config_parser").setLevel(logging.CRITICAL)
    try:
        return list(ConfigArgumentMerger(parser).merge_config_with_args(options))
    except Exception as error:  # a wrong file leads to many kinds
        file = last_value(options, CONFIG)
        reason = " ".join(str(error).split())
        raise StartError(f"{CONFIG} {file}: {reason}; a server takes one YAML file of SGLang's options") from None


def _apart(options: Sequence[str]) -> list[str]:
    """``options`` with the name of a --config file by itself, as SGLang looks for it."""
    apart: list[str] = []
    for option in options:
        apart += option.split("=", 1) if option.startswith(f"{CONFIG}=") else [option]
    return apart


def _spelled_out(config: ClusterConfig) -> ClusterConfig:
    """``config`` with what the launcher goes by also under its full name where it is abbreviated or in a --config file.
    The servers read the files: no list of processes shows the rest of them. Raises StartError."""
    return dataclasses.replace(
        config,
        server_args=_with_full_names(config.server_args),
        prefill_args=_with_full_names(config.prefill_args),
        decode_args=_with_full_names(config.decode_args),
    )


def _with_full_names(args: Sequence[str]) -> list[str]:
    args = _apart(args)
    if not args:  # SGLang's parser takes seconds to import
        return args
    parser = _sglang_parser()
    given = argparse.Namespace(**dict.fromkeys([*GUIDING_OPTIONS, JOINT_ATTENTION]))
    parser.parse_known_args(["--model-path", "", *_merged(parser, args)], given)
    for field, names in GUIDING_OPTIONS.items():
        value = getattr(given, field)
        if value is not None and last_value(args, *names) != str(value):
            args.append(f"{names[0]}={value}")
    flag = f"--{JOINT_ATTENTION.replace('_', '-')}"
    return [*args, flag] if getattr(given, JOINT_ATTENTION) and flag not in args else args


def _check_nodes(config: ClusterConfig) -> None:
    for args in (config.server_args, config.prefill_args, config.decode_args):
        nodes = last_value(args, "--nnodes") or "1"
        if nodes != "1":
            raise StartError(
                f"--nnodes {nodes}: launch.py starts the servers of this machine alone, and none that spans several; "
                "on each node, run `FLOWPREFILL=1 sglang serve …`, and tell the gateway of node 0 with POST /workers"
            )


def runs_on_cpu(server_args: Sequence[str], is_embedded: bool = False) -> bool:
    """Whether servers with these options of SGLang run on the CPU. Attention kernels of GPUs serve no heads as small as
    the embedded model's.
    """
    device = last_value(server_args, "--device")
    if device:
        return device == "cpu"
    return is_embedded or os.environ.get(PLATFORM_VARIABLE) == CPU_PLATFORM or machine.gpu_count() == 0


def made_model(model: EmbeddedModel | None = None) -> str:
    """Directory of the embedded model, or of another one of its kind. Raises StartError."""
    try:
        return str(embedded_model_path(model))
    except (OSError, RuntimeError) as error:
        raise StartError(
            f"no model can be kept in the cache ({error}); set {CACHE_VARIABLE} to a directory that this user can "
            "write, or give --model-path"
        ) from None


def _find_model(config: ClusterConfig) -> str:
    model = config.model_path
    if model is None:
        return made_model()
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise StartError(f"model {model}: the directory has no config.json, so it is no Hugging Face model")
            return str(path)
        if path.suffix == ".gguf" and path.is_file():
            return str(path)
        exists = path.exists()
    except OSError as error:
        reason = f"{error.strerror}; let this user read it, or give another --model-path"
        raise StartError(f"model {model}: {reason}") from None
    if _is_found_by_sglang(str(model)):
        return str(model)
    if exists or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        raise StartError(f"model {model}: no such directory (give a model directory or a Hugging Face model id)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(str(model), "config.json", revision=last_value(config.server_args, "--revision"))
    except RemoteEntryNotFoundError:
        pass  # SGLang looks for a GGUF file there
    except GatedRepoError:
        raise StartError(
            f"model {model}: gated; accept its licence at https://huggingface.co/{model} and set HF_TOKEN to a token "
            "of that account"
        ) from None
    except RepositoryNotFoundError:
        raise StartError(
            f"model {model}: no such directory, and the Hugging Face hub shows no such model without the right token; "
            "check the name, or accept its licence on the hub and set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StartError(f"model {model}: no such directory, and not on the Hugging Face hub ({reason})") from None
    return str(model)


def _is_found_by_sglang(model: str) -> bool:
    """Whether a model is where only SGLang looks: at a URL, on ModelScope, or in a GGUF file on the hub."""
    uses_modelscope = os.environ.get(MODELSCOPE_VARIABLE, "").lower() in ("true", "1", "yes", "y")
    return uses_modelscope or "://" in model or bool(GGUF_ON_HUB.fullmatch(model))


def own_address(gateway: str) -> str:
    """This machine's address on the way to a gateway. Raises StartError when there is no such host."""
    host, port = urlsplit(gateway).hostname, urlsplit(gateway).port
    try:
        return machine.address_towards(host or "", port or 80)
    except (OSError, UnicodeError) as error:  # the second for what can be no name
        raise StartError(f"--join {gateway}: {getattr(error, 'strerror', None) or error}") from None


def check_gateway_url(url: str) -> str:
    """``url`` without a path. Raises StartError for anything but http://HOST[:PORT]."""
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query or parts.port == 0:
            raise ValueError
    except ValueError:
        raise StartError(f"--join {url}: expected a gateway's URL such as http://10.0.0.1:{GATEWAY_PORT}") from None
    return f"http://{parts.netloc}"


def _check_gateway(gateway: Gateway, role: Role, host: str) -> None:
    """Raises StartError for what is no gateway, and for one that has servers of another kind, or some that those of
    ``role`` at ``host`` are paired with and that cannot reach them, or be reached."""
    try:
        listed = [(str(worker["worker_type"]), str(worker.get("url", ""))) for worker in gateway.workers()]
    except (requests.HTTPError, requests.JSONDecodeError, LookupError, TypeError) as error:
        if isinstance(error, requests.HTTPError) and error.response is not None and error.response.status_code == 401:
            raise StartError(f"--join {gateway.url}: the gateway asks for the --api-key it was started with") from None
        raise StartError(
            f"--join {gateway.url}: what answers there is no gateway (GET /workers lists no workers)"
        ) from None
    except requests.RequestException:
        return  # it may be started later
    types = {worker_type for worker_type, _ in listed}
    foreign = sorted(name for worker_type, name in FOREIGN_WORKERS[role].items() if worker_type in types)
    if foreign:
        flag = " --unified" if role == "unified" else ""
        raise StartError(
            f"--join {gateway.url}: the gateway has {' and '.join(foreign)} servers and would send no request "
            f"here; join one that was started with --role gateway{flag}"
        )
    if role != "unified":
        other: Role = "decode" if role == "prefill" else "prefill"
        urls = [urlsplit(url) for worker_type, url in listed if worker_type == other]
        _check_pair(gateway, host, other, [url.hostname for url in urls if url.hostname])


def _check_pair(gateway: Gateway, host: str, other: Role, hosts: Sequence[str]) -> None:
    """Raises StartError where servers at ``host`` and the ``other`` ones of their gateway, at ``hosts``, cannot reach
    each other."""
    if _is_loopback(host):
        if not all(_is_loopback(there) or machine.is_here(there) for there in hosts):
            raise StartError(
                f"--join {gateway.url}: the gateway has {other} servers on other machines, which cannot reach those at "
                f"{host}; join with an address of the gateway's machine that others reach (--host)"
            )
    elif any(map(_is_loopback, hosts)) and not machine.is_here(urlsplit(gateway.url).hostname or ""):
        raise StartError(
            f"--join {gateway.url}: the gateway has {other} servers that listen on its own machine only, where those "
            f"at {host} cannot reach them; start that gateway with --role gateway, and servers with --join, or join "
            "with an address of the gateway's machine that others reach (--host)"
        )


def _reachable_host(config: ClusterConfig) -> str:
    if config.join is None:
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    towards = own_address(config.join)
    host = towards if config.host in ("0.0.0.0", "::") else config.host
    if _is_loopback(host) and not _is_loopback(towards):
        raise StartError(f"--host {host}: the gateway at {config.join} cannot reach that address; use {towards}")
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_gpus(layout: Layout) -> None:
    config, gpus, needed = layout.config, machine.gpu_count(), layout.gpus_needed()
    placing = (config.prefill_args, config.decode_args, config.server_args if config.unified > 1 else ())
    if gpus >= needed or any(last_value(args, "--base-gpu-id") for args in placing):
        return
    if config.unified > 1:
        raise StartError(
            f"{layout.in_words()} need {needed} GPUs and there {'is' if gpus == 1 else 'are'} {gpus}; start fewer "
            f"(--unified {max(1, gpus * config.unified // needed)}), let them share with --base-gpu-id 0 "
            "--mem-fraction-static 0.4, or serve with --device cpu"
        )
    if config.unified:
        raise StartError(
            f"the unified server needs {needed} GPU{'s' if needed > 1 else ''} and there {'is' if gpus == 1 else 'are'}"
            f" {gpus}; give a smaller --tp, or serve with --device cpu"
        )
    if layout.is_single and needed == 2:
        raise StartError(
            f"prefill and decode need {needed} GPUs and there {'is' if gpus == 1 else 'are'} {gpus}; let them share "
            "with --decode-args '--base-gpu-id 0' --mem-fraction-static 0.4, or serve with --device cpu"
        )
    raise StartError(
        f"{layout.in_words()} need {needed} GPUs and there {'is' if gpus == 1 else 'are'} {gpus}; start fewer, let "
        "them share with --prefill-args or --decode-args '--base-gpu-id N' and --mem-fraction-static, or serve with "
        "--device cpu"
    )


def _check_memory(layout: Layout) -> None:
    model = Path(layout.model_path)
    weights = sum(file.stat().st_size for file in _weights(model))
    config = _json_of(model / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")  # newer versions of transformers, older ones
    needed = 0
    for role, _ in layout.servers:
        doubles = dtype != "float32" and layout.dtype(role) == "float32"  # files of other types have half as many bytes
        needed += SERVER_BYTES + weights * (2 if doubles else 1)
    available = machine.available_memory_bytes()
    if needed > available:
        raise StartError(
            f"not enough memory: {layout.in_words()} of this model need about {needed / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB are available"
        )


def _weights(model: Path) -> list[Path]:
    """The files that SGLang loads: a repository may have the same weights in several."""
    index = model / "model.safetensors.index.json"
    if index.is_file():
        named = {model / name for name in _json_of(index).get("weight_map", {}).values()}
        return [file for file in sorted(named) if file.is_file()]
    return list(model.glob("*.safetensors")) or list(model.glob("*.bin"))


def _json_of(file: Path) -> dict[str, Any]:
    """Raises StartError for what is no JSON object."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(f"model {file.parent}: {file.name} cannot be read ({reason})") from None
    if not isinstance(found, dict):
        raise StartError(f"model {file.parent}: {file.name} has no options of a model")
    return found


def _check_options(layout: Layout) -> None:
    config = layout.config
    for option in (*config.server_args, *config.prefill_args, *config.decode_args):
        name = option.partition("=")[0]
        if name in OWN_OPTIONS:
            raise StartError(f"{name} cannot be passed on to a server: use {OWN_OPTIONS[name]}")
    for option in config.gateway_args:
        name = option.partition("=")[0]
        if name in OWN_GATEWAY_OPTIONS:
            raise StartError(f"{name} cannot be passed on to the gateway: use {OWN_GATEWAY_OPTIONS[name]}")
    for option in (*config.server_args, *config.prefill_args, *config.decode_args, *config.gateway_args):
        if option.startswith(TLS_OPTIONS):
            who, front = "servers and gateway speak", "the gateway"
            if config.is_one_server:
                who, front = "the server speaks", "it"
            raise StartError(
                f"{option.partition('=')[0]}: {who} plain HTTP here; use a proxy in front of {front} for TLS"
            )
    if not (config.server_args or config.prefill_args or config.decode_args):
        return  # SGLang's parser takes seconds to import
    for role in ROLES:
        if layout.count(role):
            options = read_options(layout.server_options(role))
            if options.api_key or options.ssl_certfile:
                raise StartError(
                    f"the {role} server's --config sets api-key or ssl-certfile: use --api-key of the launcher, and a "
                    f"proxy in front of the {'server' if config.is_one_server else 'gateway'} for TLS"
                )
            if role != "decode" and config.flowprefill:
                take_over(options, dict(os.environ))
                env = os.environ | config.options.to_env()
                problem = incompatible_option(options, env)
                if problem:
                    raise StartError(problem)
                for risk in risks(options, env):
                    say(f"launch.py: {risk}", "stderr")
            if role == "unified" and config.flowprefill:
                joint = getattr(options, JOINT_ATTENTION, False) or (getattr(options, "attn_dp_size", None) or 1) > 1
                problem = config.options.refusing_problem(decodes=True, is_joint=bool(joint))
                if problem:
                    raise StartError(problem)


class SGLangParser(argparse.ArgumentParser):
    """Raises StartError for options that SGLang does not take, where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise StartError(f"SGLang option: {message}")
