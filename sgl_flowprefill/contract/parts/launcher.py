"""Rows of the contract: the launcher."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row, attributes, rows, source

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
        *attributes(
            "sglang.srt.environ:Envs",
            "SGLANG_USE_MODELSCOPE",
            "has models looked for on ModelScope, where the launcher does not look",
            "the launcher refuses models of ModelScope",
        ),
        *attributes(
            "sglang.srt.environ:Envs",
            "SGLANG_PLUGINS",
            "names the plugins that are loaded, where it is set: the launcher adds FlowPrefill",
            "servers start without FlowPrefill",
        ),
        source(
            "assumes",
            "sglang.srt.plugins:load_plugins_by_group",
            ['allowed_str.split(",")'],
            "takes its names with commas between them",
            "servers start without FlowPrefill",
        ),
        source(
            "assumes",
            "sglang.srt.utils.common:is_remote_url",
            ['pattern = r"(.+)://(.*)"'],
            "takes every path with :// for a URL",
            "the launcher refuses models in object storage",
        ),
        source(
            "assumes",
            "sglang.srt.utils.hf_transformers.common:resolve_hf_gguf_reference",
            ['if ":" in model:', 'if len(parts) > 2 and model.endswith(".gguf"):'],
            "finds GGUF files on the hub by these names",
            "the launcher refuses GGUF files on the hub, or begins to serve a name that is none",
        ),
    ),
)
