"""Options of servers, and FlowPrefill's own."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from sgl_flowprefill.bench.cli.options.base import Options
from sgl_flowprefill.bench.cli.options.values import Arguments, Model, shown
from sgl_flowprefill.config import FlowPrefillConfig


class GivenOptions:
    """FlowPrefill's options that the command line names."""

    def config(self) -> FlowPrefillConfig:
        """These options, and for those that are not given the environment. Raises ConfigError."""
        return FlowPrefillConfig.from_namespace(argparse.Namespace(**vars(self)))


if TYPE_CHECKING:
    FlowPrefillOptions = GivenOptions
else:
    FlowPrefillOptions = dataclasses.make_dataclass(
        "FlowPrefillOptions",
        [
            (
                f"flowprefill_{name}",
                Annotated[
                    str | None,
                    arg(metavar="VALUE", help=field.description, help_behavior_hint=shown(str(field.default))),
                ],
                None,
            )
            for name, field in FlowPrefillConfig.model_fields.items()
        ],
        bases=(GivenOptions,),
    )
    FlowPrefillOptions.__doc__ = "A variable of the environment sets each as well: FLOWPREFILL_MAX_SUSPENDED=4."


@dataclass(frozen=True)
class ServerOptions(Options):
    """How the servers of every system are started."""

    model_path: Model = None
    """model to serve instead of the embedded one"""
    server_args: Arguments = ()
    """SGLang options for every SGLang server"""
    prefill_args: Arguments = ()
    """SGLang options for prefill servers"""
    decode_args: Arguments = ()
    """SGLang options for decode servers"""
    flowprefill: FlowPrefillOptions = dataclasses.field(default_factory=FlowPrefillOptions)
