"""Rows of the contract: options of a server."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.compat import READ_OPTIONS, REFUSED_ENVIRONMENT, ROWS, UNSET_ENVIRONMENT
from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import OPTIONS

SET: Final = sorted({option for row in ROWS if row.treatment == "set" for option in row.options})
REFUSED: Final = sorted({option for row in ROWS if row.treatment == "refused" for option in row.options} - {*SET})

PART: Final = Part(
    "options",
    "Options of a server",
    ("HTTP server",),
    (
        source(
            "hooks",
            "sglang.srt.server_args:ServerArgs.resolve_once",
            ["run_resolution_pipeline(self)", "_resolution_finished", "_resolution_failed"],
            "is where a prefill server gets the options that it needs, before SGLang derives others from them",
            "users have to set these options themselves",
            "(self)",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.engine:",
            "Engine._launch_subprocesses(cls, server_args, ...)",
            "is where all servers and engines pass before they start processes",
            "a server that cannot work is refused late, or runs without FlowPrefill",
        ),
        *rows(
            "calls",
            "sglang.srt.arg_groups.overrides:",
            "resolving_view(server_args)",
            "shows the options that SGLang has resolved so far",
            "options that cannot work are not seen",
        ),
        *attributes(
            OPTIONS,
            " ".join(SET),
            "is set by FlowPrefill",
            "the server runs with SGLang's own value, which cannot work",
        ),
        *attributes(
            OPTIONS,
            " ".join(REFUSED),
            "is refused with a reason",
            "the option is not refused, under whatever name it has now",
        ),
        *attributes(
            OPTIONS,
            " ".join(READ_OPTIONS),
            "says what kind of server this is, and whether FlowPrefill can work with it",
            "a server that cannot work is not refused",
        ),
        *attributes(
            "sglang.srt.environ:Envs",
            " ".join([*REFUSED_ENVIRONMENT, *UNSET_ENVIRONMENT]),
            "is refused with a reason, or unset",
            "the variable is not refused, under whatever name it has now",
        ),
    ),
)
