"""The ports that servers listen on: those that were asked for, if they are free, and others that are.

An SGLang server of one node, 0.5.22 or 0.5.23, listens on these, if it is told nothing else:

* its own port, for HTTP;
* its bootstrap port, if it is a prefill server (``--disaggregation-bootstrap-port``);
* one of SGLANG_RANDOM for the store of ``torch.distributed``, drawn when it starts, bound when its scheduler does;
* with DP attention also those at JOINT_OFFSETS above its own (``PortArgs.init_new``, ``DataParallelController``), where
  others have Unix sockets: the server ends at once when 13 above is taken, and when another of them stays so for 30 s;
* ports that the kernel gives it, which are bound at once: of ranks, for KV transfer and requests.

What the launcher chooses keeps clear of all of these, for all servers that it starts, and is drawn at random: another
launcher on the machine, whose servers do not listen yet, hardly draws the same.
"""

from __future__ import annotations

import dataclasses
import random
import socket
from collections.abc import Collection
from typing import Final

from sgl_flowprefill.cluster.base import LOOPBACK, MAX_PORT, Ports, StartError

SGLANG_RANDOM: Final = range(22000, 30000)
"""Where SGLang draws a port by itself (``get_free_port_below_ephemeral``)."""
FREE_PORTS: Final = range(10000, SGLANG_RANDOM.start)
"""Below what SGLang draws from, and the kernel for outgoing connections: either could otherwise take a port between
check and use."""
JOINT_OFFSETS: Final = (13, *range(233, 240))
"""What a server with DP attention takes above its own port: one for the handshake of its ranks and seven for its
processes, of which the first is only looked at."""
JOINT_STEP: Final = 10
"""Between the ports of servers of a role with DP attention: no two of 22 take the same."""
JOINT_NEEDS: Final = (
    f"with DP attention servers count up by {JOINT_STEP}, and each takes the ports 13 and 233 to 239 above its own, too"
)
ANY: Final = "0.0.0.0"
"""SGLang wants the ports beside a server's own to be free at all addresses."""


def choose_ports(
    host: str,
    ports: Ports,
    prefill: int = 1,
    decode: int = 1,
    worker_host: str = LOOPBACK,
    *,
    unified: int = 0,
    joint: Collection[str] = (),
    live: int | None = None,
) -> Ports:
    """Check the given ports and replace each 0 by a free port, or by the first of as many as there are servers. What
    clients send their requests to listens on ``host``, all servers behind a gateway on ``worker_host``; ``unified`` are
    those behind one. Servers of the roles ``joint`` have DP attention; a server by itself is "unified". ``live`` is
    where the launcher will listen on ``host``, if that is given."""
    another = "name another port, or 0 for any free one"
    if live and not is_free(host, live):
        raise StartError(f"--live-port {live} is in use; {another}")
    counts = {"gateway": 1, "prefill": prefill, "decode": decode, "unified": unified, "bootstrap": prefill}
    is_one = not prefill and not decode and not unified
    chosen: dict[str, int] = {}
    taken: set[int] = set()
    for name in sorted(counts, key=lambda name: not getattr(ports, name)):  # the given ones first
        count = counts[name]
        if not count:
            continue
        address = host if name == "gateway" else worker_host
        is_joint = ("unified" if is_one else name) in joint
        first = getattr(ports, name) or free_port(address, {*taken, live or 0}, count, is_joint)
        why = JOINT_NEEDS if is_joint else f"{count} servers count up from {first}"
        for at, port in needed(address, first, count, is_joint):
            if port > MAX_PORT:
                raise StartError(f"port {port} ({name}) is above {MAX_PORT}, the last one: {why}; choose a lower one")
            if port in taken:
                raise StartError(f"port {port} ({name}): {why}; choose ports further apart")
            if port == live:
                raise StartError(f"--live-port {live} is a port of the servers ({name}), too; {another}")
            if not is_free(at, port):
                several = "GATEWAY,UNIFIED" if unified else "GATEWAY,PREFILL,…"
                whose, others = ("", "PORT") if is_one else (f" ({name})", several)
                too = f" ({JOINT_NEEDS})" if is_joint else ""
                raise StartError(f"port {port}{whose} is in use{too}; choose another with --ports {others}")
            taken.add(port)
        chosen[name] = first
    return dataclasses.replace(ports, **chosen)


def free_port(host: str, taken: Collection[int] = (), count: int = 1, is_joint: bool = False) -> int:
    """A port from which ``count`` servers can count up, with DP attention or without: nothing listens where they will.
    Chosen by a generator of its own: processes that are seeded alike would choose alike.
    """
    for first in random.Random().sample(FREE_PORTS, len(FREE_PORTS)):
        wanted = needed(host, first, count, is_joint)
        if all(port in FREE_PORTS and port not in taken and is_free(at, port) for at, port in wanted):
            return first
    raise StartError(f"no port from {FREE_PORTS.start} to {FREE_PORTS.stop - 1} is free on {host}")


def own_ports(first: int, count: int, is_joint: bool) -> range:
    """The ports of ``count`` servers of a role, with DP attention or without, that count up from ``first``."""
    step = JOINT_STEP if is_joint else 1
    return range(first, first + count * step, step)


def needed(host: str, first: int, count: int, is_joint: bool) -> list[tuple[str, int]]:
    """Addresses and ports that have to be free for servers at ``own_ports`` of ``host``."""
    own = own_ports(first, count, is_joint)
    beside = [(ANY, port + offset) for port in own for offset in JOINT_OFFSETS] if is_joint else []
    return [*((host, port) for port in own), *beside]


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there. Raises StartError when this machine does not have the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise StartError(f"port {port} needs privileges that this process does not have") from None
        except (socket.gaierror, UnicodeError):
            raise StartError(f"--host {host}: no such address") from None
        except OSError as error:
            if error.errno == 99:  # EADDRNOTAVAIL
                raise StartError(f"--host {host}: this machine does not have that address") from None
            return False
    return True
