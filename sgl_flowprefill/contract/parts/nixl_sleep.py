"""Rows of the contract: NIXL's progress thread."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

PART: Final = Part(
    "nixl_sleep",
    "NIXL's progress thread",
    ("scheduler",),
    (
        *rows(
            "hooks",
            "nixl._bindings:",
            "nixlAgent",
            "is made with a progress thread that never sleeps",
            "NIXL takes a whole core of every server",
        ),
        source(
            "assumes",
            "nixl._api:nixl_agent.__init__",
            ["agent_config.pthrDelay = 0", "nixlBind.nixlAgent(agent_name, agent_config)"],
            "makes it, by that name",
            "NIXL takes a whole core of every server",
        ),
    ),
)
