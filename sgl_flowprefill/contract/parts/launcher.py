"""Rows of the contract: the launcher."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row, rows

PART: Final = Part(
    "launcher",
    "The launcher",
    ("launcher",),
    (
        Row(
            "sglang.launch_server:",
            "calls",
            "is the module that a server is started as",
            "no server starts",
            holds=('if __name__ == "__main__":',),
        ),
        *rows(
            "calls",
            "sglang.srt.server_args:",
            "ServerArgs ServerArgs.add_cli_args(parser)",
            "reads the options of a server before it starts",
            "options that cannot work are refused late",
        ),
        *rows(
            "calls",
            "sglang.srt.utils.server_args_config_parser:",
            "ConfigArgumentMerger ConfigArgumentMerger.merge_config_with_args(self, cli_args)",
            "reads a --config file",
            "options in a --config file are not seen",
        ),
    ),
)
