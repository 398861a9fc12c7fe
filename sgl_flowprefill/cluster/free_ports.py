"""The ports that servers listen on: those that were asked for, if they are free, and others that are."""

from __future__ import annotations

import dataclasses
import random
import socket
from collections.abc import Collection
from typing import Final

from sgl_flowprefill.cluster.base import LOOPBACK, MAX_PORT, Ports, StartError

FREE_PORTS: Final = range(20000, 30000)
"""Below the kernel's range for outgoing connections, which would otherwise take a port between check and use."""


def choose_ports(
    host: str,
    ports: Ports,
    prefill: int = 1,
    decode: int = 1,
    worker_host: str = LOOPBACK,
    *,
    unified: int = 0,
    live: int | None = None,
) -> Ports:
    """Check the given ports and replace each 0 by a free port, or by the first of as many as there are servers. What
    clients send their requests to listens on ``host``, all servers behind a gateway on ``worker_host``; ``unified`` are
    those behind one. ``live`` is where the launcher will listen on ``host``, if that is given."""
    another = "name another port, or 0 for any free one"
    if live and not is_free(host, live):
        raise StartError(f"--live-port {live} is in use; {another}")
    counts = {"gateway": 1, "prefill": prefill, "decode": decode, "unified": unified, "bootstrap": prefill}
    is_one = not prefill and not decode and not unified
    chosen: dict[str, int] = {}
    taken: set[int] = set()
    for name, count in counts.items():
        if not count:
            continue
        first, address = getattr(ports, name), host if name == "gateway" else worker_host
        if not first:
            first = free_port(address, {*taken, live or 0}, count)
        for port in range(first, first + count):
            if port in taken or port > MAX_PORT:
                raise StartError(
                    f"port {port} ({name}): {count} servers count up from {first}; choose ports further apart"
                )
            if port == live:
                raise StartError(f"--live-port {live} is a port of the servers ({name}), too; {another}")
            if not is_free(address, port):
                several = "GATEWAY,UNIFIED" if unified else "GATEWAY,PREFILL,…"
                whose, others = ("", "PORT") if is_one else (f" ({name})", several)
                raise StartError(f"port {port}{whose} is in use; choose another with --ports {others}")
        taken.update(range(first, first + count))
        chosen[name] = first
    return dataclasses.replace(ports, **chosen)


def free_port(host: str, taken: Collection[int] = (), count: int = 1) -> int:
    """The first of ``count`` consecutive ports that nothing listens on. Chosen by a generator of its own: processes
    that are seeded alike would choose alike.
    """
    for first in random.Random().sample(FREE_PORTS, len(FREE_PORTS)):
        if all(port not in taken and is_free(host, port) for port in range(first, first + count)):
            return first
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
        except (socket.gaierror, UnicodeError):
            raise StartError(f"--host {host}: no such address") from None
        except OSError as error:
            if error.errno == 99:  # EADDRNOTAVAIL
                raise StartError(f"--host {host}: this machine does not have that address") from None
            return False
    return True
