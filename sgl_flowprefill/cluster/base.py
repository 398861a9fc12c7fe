"""What a cluster is made from, and what can go wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sgl_flowprefill.config import FlowPrefillConfig

GATEWAY_PORT: Final = 30000
LIVE_PORT: Final = 30001
"""Where a launcher shows what its servers do, if nobody else is there."""
MAX_PORT: Final = 65535
LOOPBACK: Final = "127.0.0.1"
KEY_VARIABLE: Final = "FLOWPREFILL_API_KEY"
"""Environment variable with the API key: of launch.py, and of the servers that it starts."""
PAIR_PORTS: Final = ("gateway", "prefill", "decode", "bootstrap")
UNIFIED_PORTS: Final = ("gateway", "unified")
"""What the numbers after --ports are for."""
EXIT_FAILED: Final = 1
EXIT_CANNOT_START: Final = 2
"""Exit codes of the commands of launch.py: for what has gone wrong on the way, and for what cannot be as asked for."""


class ClusterError(RuntimeError):
    """A server ended, or does not answer; the message names it and shows the last lines of its log, or what it said."""


class StartError(ClusterError):
    """The cluster cannot be started as asked for; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Ports:
    """TCP ports; 0 stands for any free one. Several servers of a role count up from the port of the first, with DP
    attention by ``free_ports.JOINT_STEP``."""

    gateway: int = 0
    """Where clients send their requests; the unified server's own where there is no gateway."""
    prefill: int = 0
    decode: int = 0
    unified: int = 0
    """Of unified servers behind a gateway."""
    bootstrap: int = 0

    @classmethod
    def parse(cls, text: str, names: Sequence[str] = PAIR_PORTS) -> Ports:
        """``GATEWAY[,PREFILL[,DECODE[,BOOTSTRAP]]]``, or what else ``names`` has. Raises StartError."""
        parts = text.split(",")
        if len(parts) > len(names) or not all(part.strip().isdigit() and int(part) <= MAX_PORT for part in parts):
            expected = ",".join(name.upper() for name in names)
            raise StartError(f"--ports {text}: expected up to {len(names)} port numbers, {expected}")
        ports = cls(**{name: int(part) for name, part in zip(names, parts, strict=False)})
        given = [port for port in vars(ports).values() if port]
        if len(set(given)) < len(given):
            raise StartError(f"--ports {text}: each server needs a port of its own")
        return ports


@dataclass(frozen=True)
class ClusterConfig:
    """What to start here: with FlowPrefill, or with SGLang's own scheduler on otherwise equal settings.

    A whole cluster has a gateway in front of at least one prefill and one decode server or of unified servers, which
    prefill and decode, or is a single unified server, which needs no gateway. Of many machines, one has only the
    gateway, and the other machines have servers that ``join`` it.
    """

    flowprefill: bool
    model_path: str | Path | None = None
    """Directory of a model or Hugging Face model id; None for the embedded model."""
    host: str = LOOPBACK
    """Address that the gateway or the only unified server listens on, or that servers listen on which join a gateway on
    another machine."""
    ports: Ports = field(default_factory=Ports)
    prefill: int = 1
    """Prefill servers to start here."""
    decode: int = 1
    """Decode servers to start here."""
    unified: int = 0
    """Unified servers to start here, in place of prefill and decode servers."""
    unified_elsewhere: bool = False
    """Whether a gateway without servers here is for unified servers, which join it."""
    join: str | None = None
    """URL of the gateway that the servers join; None starts one here."""
    server_args: Sequence[str] = ()
    """SGLang options of all servers."""
    prefill_args: Sequence[str] = ()
    decode_args: Sequence[str] = ()
    gateway_args: Sequence[str] = ()
    """Options of smg."""
    api_key: str | None = field(default=None, repr=False)
    """What servers and gateway ask of their clients as a bearer token."""
    api_key_in_shell: str = "$" + KEY_VARIABLE
    """How a shell is told the key, without showing it."""
    live_port: int | None = None
    """Where the launcher shows what a cluster's servers do; 0 is any free port, None LIVE_PORT or any free one."""
    log_dir: Path = Path("out/logs")
    options: FlowPrefillConfig = field(default_factory=FlowPrefillConfig)
    startup_timeout_s: float = 1800.0
    """Longest that a server, the gateway or the first request may take to come up; a server started again, too."""
    drain_timeout_s: float = 120.0
    """How long requests have to end once the launcher is asked to, before what serves them is ended."""

    @property
    def is_one_server(self) -> bool:
        """Whether this is a unified server by itself, which clients send their requests to."""
        return self.join is None and self.unified == 1

    @property
    def has_gateway(self) -> bool:
        """Whether a gateway is started here."""
        return self.join is None and not self.is_one_server

    @property
    def has_live_page(self) -> bool:
        """Whether the launcher shows what its servers do; a server by itself does so on its own port."""
        prefilling = self.prefill + self.unified
        return self.flowprefill and bool(self.options.recent_events and prefilling) and not self.is_one_server

    def log(self, name: str) -> Path:
        """Log file of a server or of the gateway."""
        return self.log_dir / f"{name}.log"

    @property
    def worker_host(self) -> str:
        """Address that servers listen on. Only the gateway on the same machine needs to reach the servers behind it."""
        return LOOPBACK if self.has_gateway else self.host
