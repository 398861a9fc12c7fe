"""What can be known before a server is started: ports, model, devices, memory and options.

Every check raises StartError with one sentence that names what was found and the way out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import warnings
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

from sgl_flowprefill.cluster import machine
from sgl_flowprefill.cluster.base import ClusterConfig, Ports, StartError
from sgl_flowprefill.cluster.commands import CPU_PLATFORM, Layout
from sgl_flowprefill.compat import incompatible_option
from sgl_flowprefill.model import embedded_model_path

OWN_OPTIONS: Final = {
    "--model-path": "--model-path of the launcher",
    "--model": "--model-path of the launcher",
    "--host": "--host of the launcher",
    "--port": "--ports",
    "--disaggregation-bootstrap-port": "--ports",
    "--disaggregation-mode": "nothing: the launcher starts one server of each mode",
}
"""SGLang options that the launcher sets itself, and what to use instead."""
FREE_PORTS: Final = range(20000, 30000)
"""Below the kernel's range for outgoing connections, which would otherwise take a port between check and use."""
SERVER_BYTES: Final = 3_000_000_000
"""Memory that an SGLang server's processes take without weights and KV cache."""


def prepare(config: ClusterConfig) -> Layout:
    """Check everything; returns what to start."""
    on_cpu = _runs_on_cpu(config)
    prefill_ranks = _tp_size([*config.server_args, *config.prefill_args])
    decode_ranks = _tp_size([*config.server_args, *config.decode_args])
    model_path = _find_model(config.model_path)
    if not on_cpu:
        _check_gpus(config, prefill_ranks + decode_ranks)
    elif Path(model_path).is_dir():
        _check_memory(Path(model_path))
    layout = Layout(
        config=config,
        model_path=model_path,
        ports=choose_ports(config.host, config.ports),
        cpus=machine.plan_cpus(machine.usable_cpus(), prefill_ranks) if on_cpu else None,
        prefill_ranks=prefill_ranks,
        decode_ranks=decode_ranks,
    )
    _check_options(layout)
    return layout


def choose_ports(host: str, ports: Ports) -> Ports:
    """Check the given ports and replace each 0 by a free port."""
    chosen: dict[str, int] = {}
    for name in (field.name for field in fields(Ports)):
        port = getattr(ports, name)
        if port and not is_free(host, port):
            raise StartError(f"port {port} ({name}) is in use; choose another with --ports GATEWAY,PREFILL,…")
        chosen[name] = port or free_port(host, taken=chosen.values())
    return Ports(**chosen)


def free_port(host: str, taken: Any = ()) -> int:
    """A port that nothing listens on."""
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        if port not in taken and is_free(host, port):
            return port
    raise StartError(f"no port from {FREE_PORTS.start} to {FREE_PORTS.stop - 1} is free on {host}")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there. Raises StartError when this machine does not have the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise StartError(f"port {port} needs privileges that this process does not have") from None
        except socket.gaierror:
            raise StartError(f"--host {host}: no such address") from None
        except OSError as error:
            if error.errno == 99:  # EADDRNOTAVAIL
                raise StartError(f"--host {host}: this machine does not have that address") from None
            return False
    return True


def _runs_on_cpu(config: ClusterConfig) -> bool:
    device = _last_value(config.server_args, "--device")
    if device:
        return device == "cpu"
    return os.environ.get("SGLANG_PLATFORM") == CPU_PLATFORM or machine.gpu_count() == 0


def _find_model(model: str | Path | None) -> str:
    if model is None:
        return str(embedded_model_path())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartError(f"model {model}: the directory has no config.json, so it is no Hugging Face checkpoint")
        return str(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        raise StartError(f"model {model}: no such directory (give a checkpoint directory or a Hugging Face model id)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(str(model), "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StartError(f"model {model}: no such directory, and not on the Hugging Face hub ({reason})") from None
    return str(model)


def _check_gpus(config: ClusterConfig, needed: int) -> None:
    gpus = machine.gpu_count()
    placed = any(_last_value(args, "--base-gpu-id") for args in (config.prefill_args, config.decode_args))
    if gpus < needed and not placed:
        raise StartError(
            f"prefill and decode need {needed} GPUs and there {'is' if gpus == 1 else 'are'} {gpus}; let them share "
            "with --decode-args '--base-gpu-id 0' --mem-fraction-static 0.4, or serve with --device cpu"
        )


def _check_memory(model: Path) -> None:
    weights = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in model.glob(pattern))
    dtype = json.loads((model / "config.json").read_text()).get("torch_dtype")
    needed = 2 * (SERVER_BYTES + weights * (1 if dtype == "float32" else 2))  # the CPU serves in float32
    available = machine.available_memory_bytes()
    if needed > available:
        raise StartError(
            f"not enough memory: prefill and decode of this model need about {needed / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB are available"
        )


def _check_options(layout: Layout) -> None:
    config = layout.config
    for option in (*config.server_args, *config.prefill_args, *config.decode_args):
        name = option.partition("=")[0]
        if name in OWN_OPTIONS:
            raise StartError(f"{name} cannot be passed on to a server: use {OWN_OPTIONS[name]}")
    if not (config.server_args or config.prefill_args or config.decode_args):
        return  # SGLang's parser takes seconds to import
    prefill = _parse(layout.server_options("prefill"))
    _parse(layout.server_options("decode"))
    problem = incompatible_option(prefill) if config.flowprefill else None
    if problem:
        raise StartError(problem)


def _parse(options: Sequence[str]) -> argparse.Namespace:
    """Read options the way that SGLang's command line does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = _Parser(prog="SGLang", add_help=False)
    ServerArgs.add_cli_args(parser)
    if "--config" in options:
        options = ConfigArgumentMerger(parser).merge_config_with_args(list(options))
    return parser.parse_args(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(f"SGLang option: {message}")


def _tp_size(args: Sequence[str]) -> int:
    """Tensor-parallel size of a server; what is no number is for SGLang's parser to refuse."""
    values = [_last_value(args, option) for option in ("--tp", "--tp-size", "--tensor-parallel-size")]
    return max([1, *(int(value) for value in values if value is not None and value.isdigit())])


def _last_value(args: Sequence[str], option: str) -> str | None:
    """Value of ``option`` in a list of command line arguments."""
    value = None
    for argument, following in pairwise([*args, ""]):
        if argument == option:
            value = following
        elif argument.startswith(option + "="):
            value = argument.partition("=")[2]
    return value
