"""Servers of a cluster are asked straight, also where the environment names a proxy for the web."""

from __future__ import annotations

import os
from typing import Final

from sgl_flowprefill.cluster.base import LOOPBACK

VARIABLES: Final = ("NO_PROXY", "no_proxy")
"""Hosts that are asked without a proxy: some programs read the one, some the other."""
OWN_HOSTS: Final = (LOOPBACK, "localhost", "::1")
ALL_HOSTS: Final = "*"
"""What stands for all hosts, where it is alone."""


def ask_directly(*hosts: str | None) -> None:
    """Have this process, and those that it starts, ask ``hosts`` and this machine without a proxy."""
    given = [os.environ.get(name, "").strip() for name in VARIABLES]
    if ALL_HOSTS in given:
        return
    named = [host.strip() for text in given for host in text.split(",") if host.strip()]
    os.environ.update(dict.fromkeys(VARIABLES, ",".join(dict.fromkeys([*named, *OWN_HOSTS, *filter(None, hosts)]))))
