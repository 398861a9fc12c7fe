"""What the command line of the benchmark says: a typed object for each command, in a file for each.

tyro makes the command line of these classes: a field is an option, its docstring the help text, its default the
default. Values are checked here, so that an object made by a test is as valid as one of the command line. Whatever
takes long to import stays out of this folder: ``--help`` shall not wait for it.
"""

from sgl_flowprefill.bench.cli.options.base import Command, OptionError
from sgl_flowprefill.bench.cli.options.breakdown import Breakdown
from sgl_flowprefill.bench.cli.options.demo import Demo, UnifiedDemo
from sgl_flowprefill.bench.cli.options.events import Events
from sgl_flowprefill.bench.cli.options.fetch_trace import FetchTrace, PublishedTrace
from sgl_flowprefill.bench.cli.options.goodput import Goodput, UnifiedGoodput
from sgl_flowprefill.bench.cli.options.parser import COMMANDS, parse
from sgl_flowprefill.bench.cli.options.replay import Api, Replay
from sgl_flowprefill.bench.cli.options.servers import ServerOptions
from sgl_flowprefill.bench.cli.options.simulate import Router, Simulate
from sgl_flowprefill.bench.cli.options.trace import Format, TraceOptions
from sgl_flowprefill.bench.cli.options.uncontended import Uncontended
from sgl_flowprefill.bench.cli.options.validate import UnifiedValidate, Validate
from sgl_flowprefill.bench.workloads.formats import AUTO

__all__ = [
    "AUTO",
    "COMMANDS",
    "Api",
    "Breakdown",
    "Command",
    "Demo",
    "Events",
    "FetchTrace",
    "Format",
    "Goodput",
    "OptionError",
    "PublishedTrace",
    "Replay",
    "Router",
    "ServerOptions",
    "Simulate",
    "TraceOptions",
    "Uncontended",
    "UnifiedDemo",
    "UnifiedGoodput",
    "UnifiedValidate",
    "Validate",
    "parse",
]
