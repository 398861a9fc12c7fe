"""Options of ``bench replay``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from tyro.conf import arg

from sgl_flowprefill.bench.cli.options.base import Bound, Command
from sgl_flowprefill.bench.cli.options.trace import TraceOptions
from sgl_flowprefill.bench.cli.options.values import Folder, MaybeCount, Model, NewFile, Seconds, shown

Api = Literal["generate", "completions", "chat"]
PROMPT_SEED: Final = Bound("a whole number from 0 to 2**64 - 1", lambda value: 0 <= value < 1 << 64)


@dataclass(frozen=True)
class Replay(Command):
    """replay a trace against a running endpoint"""

    name = "replay"
    examples = ("--url http://127.0.0.1:30000 --trace mixed --duration 60",)
    url: Annotated[str, arg(metavar="URL")]
    """endpoint, e.g. the gateway's http://127.0.0.1:30000"""
    api: Api = "generate"
    """generate is SGLang's own with token ids; completions and chat are OpenAI's"""
    model: Model = None
    """model name for the OpenAI APIs (default: the first that the endpoint lists)"""
    label: Annotated[str, arg(metavar="NAME")] = "endpoint"
    """name of the system in the table"""
    timeout: Seconds = 600.0
    """longest silence of a stream, in seconds"""
    event_log: NewFile = None
    """FlowPrefill's event log, if the server is on this machine and has one: the file has to be there"""
    out: Folder = Path("out/replay")
    max_output_tokens: MaybeCount = None
    """cut longer answers"""
    prompt_seed: Annotated[int | None, PROMPT_SEED, arg(metavar="N", help_behavior_hint=shown)] = None
    """send the prompts of the run whose report has this settings.prompt_seed (default: others in each run, of the same
    lengths and with the same shared prefixes, as servers still have those of earlier runs in their caches)"""
    trace: TraceOptions = TraceOptions()
