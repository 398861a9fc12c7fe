"""What the command line of the benchmark says: a typed object for each command.

tyro makes the command line of these classes: a field is an option, its docstring the help text, its default the
default. Values are checked here, so that an object made by a test is as valid as one of the command line. Whatever
takes long to import stays out of this file: ``--help`` shall not wait for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Union, cast, get_type_hints

import tyro
from tyro.conf import (
    DisallowNone,
    FlagCreatePairsOff,
    OmitArgPrefixes,
    Positional,
    UseAppendAction,
    arg,
    create_mutex_group,
    subcommand,
)
from tyro.constructors import PrimitiveConstructorSpec

from sgl_flowprefill.bench.workloads.formats import load_trace
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import QWEN_RATE_RPS, WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Slo, Trace
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.policy import POLICIES

PROGRAM: Final = "python -m sgl_flowprefill.bench"
AUTO: Final = "auto"
TOKEN_IDS: Final = (1000, 4000)
"""Token ids of prompts: ordinary tokens of the embedded model, and of any model with a larger vocabulary."""
SUMMARY: Final = "Traces, replay, comparison of systems. `COMMAND --help` shows the options of a command."

Format = Literal["auto", "qwen", "mooncake", "azure", "burstgpt"]
Api = Literal["generate", "completions", "chat"]
Router = Literal["round-robin", "least-work"]
PublishedTrace = Literal["qwen-a", "qwen-b"]


class OptionError(Exception):
    """An option has a value that cannot work; the message names both, and what is wanted. Not a ValueError, which tyro
    would print itself.
    """


@dataclass(frozen=True)
class Bound:
    """What the values of an option have to be."""

    wanted: str
    holds: Callable[[Any], bool]


POSITIVE: Final = Bound("a positive number", lambda value: value > 0 and math.isfinite(value))
SHARE: Final = Bound("a share between 0 and 1, like 0.9", lambda value: 0 < value < 1)
SEVERAL: Final = Bound("at least 2: only the prompts after a turn's first count for throughput", lambda n: n >= 2)


class Options:
    """Options whose values meet their bounds."""

    def __post_init__(self) -> None:
        """Raises OptionError."""
        for one in dataclasses.fields(cast(Any, self)):  # all that derive from this are dataclasses
            value, default = getattr(self, one.name), cast(Any, one.default)
            flag = f"--{one.name.replace('_', '-')}"
            if value == () and default:
                raise OptionError(f"{flag}: name at least one (default {' '.join(str(item) for item in default)})")
            for bound in _bounds(type(self)).get(one.name, ()):
                for item in value if isinstance(value, tuple) else (value,):
                    if item not in (None, AUTO, default) and not bound.holds(item):
                        raise OptionError(f"{flag} {item}: it has to be {bound.wanted}")


class Command(Options):
    """The options of a command."""

    name: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    """For the help text: options that are worth a look."""


def _bounds(options: type[Options]) -> dict[str, list[Bound]]:
    hints = get_type_hints(options, include_extras=True)
    return {
        name: [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Bound)]
        for name, hint in hints.items()
    }


def _class_slo(values: Sequence[str]) -> tuple[str, Slo]:
    name, _, objectives = values[0].partition("=")
    ttft_s, _, tbt_s = objectives.partition("/")
    try:
        slo = Slo(float(ttft_s), float(tbt_s) if tbt_s else math.inf)
    except ValueError:
        slo = Slo(0.0, 0.0)
    if not (POSITIVE.holds(slo.ttft_s) and slo.tbt_s > 0):
        raise OptionError(f"--slo {values[0]}: it has to be CLASS=TTFT[/TBT] in seconds, like text=0.5/0.1")
    return name, slo


ClassSlo = Annotated[
    tuple[str, Slo],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="CLASS=TTFT[/TBT]",
        instance_from_str=_class_slo,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [f"{value[0]}={value[1].ttft_s}/{value[1].tbt_s}"],
    ),
]
Arguments = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="'ARGS'",
        instance_from_str=lambda values: tuple(shlex.split(values[0])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [shlex.join(value)],
    ),
]


def _shown(default: str) -> str:
    """What the help says of a default; the text of an option says what having none means."""
    return "" if default in ("None", "inf", "''") else f"(default: {default})"


Whole = Annotated[int, arg(metavar="N")]
Count = Annotated[int, POSITIVE, arg(metavar="N")]
Counts = Annotated[tuple[int, ...], POSITIVE, arg(metavar="N...")]
MaybeCount = Annotated[int | None, POSITIVE, arg(metavar="N", help_behavior_hint=_shown)]
Seconds = Annotated[float, POSITIVE, arg(metavar="S", help_behavior_hint=_shown)]
Factor = Annotated[float, POSITIVE, arg(metavar="X")]
FactorOrAuto = Annotated[float | Literal["auto"], POSITIVE, arg(metavar="X|auto")]
Share = Annotated[float, SHARE, arg(metavar="SHARE")]
Model = Annotated[str | None, arg(metavar="M", help_behavior_hint=_shown)]
NewFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=_shown)]


class GivenOptions:
    """FlowPrefill's options that the command line names."""

    def config(self) -> FlowPrefillConfig:
        """They, and the environment for the others. Raises ConfigError."""
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
                    arg(metavar="VALUE", help=field.description, help_behavior_hint=_shown(str(field.default))),
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


@dataclass(frozen=True)
class TraceOptions(Options):
    """What is replayed."""

    trace: Annotated[
        str,
        arg(metavar="NAME|FILE", help=f"built-in workload ({', '.join(WORKLOADS)}) or a trace file"),
    ] = "qwen-like"
    format: Format = "auto"
    """format of the trace file; auto goes by its fields"""
    new_tokens_only: bool = False
    """QwenTrace: a text turn counts only tokens that its parent's prompt did not have, as in the paper"""
    slo: UseAppendAction[tuple[ClassSlo, ...]] = ()
    """objectives (s) of a class of a trace file, instead of its defaults; can be repeated"""
    seed: Whole = 0
    """seed of the workload and of the prompts"""
    rate_scale: Factor = 1.0
    """multiple of the trace's own rate, which is 2.75 req/s for built-in workloads"""
    time_scale: FactorOrAuto = "auto"
    """factor for arrivals and SLOs; auto: how many times longer an isolated request takes than on the paper's A800"""
    duration: Seconds = 60.0
    """replay what arrives in this many seconds of wall clock"""
    requests: MaybeCount = None
    """replay at most this many requests"""
    max_prompt_tokens: MaybeCount = None
    """cut longer prompts"""


Systems = Annotated[
    tuple[str, ...],
    arg(metavar="NAME...", help="systems to run, in order: names or globs of --list-systems, or all"),
]
MaxAnswer = Annotated[
    int | None,
    POSITIVE,
    arg(
        metavar="N",
        help="keep the lengths of answers and cut those that are longer, for example 8",
        help_behavior_hint="(default: all are shortened by one factor, so that they take half of what the decode "
        "server carries, which is measured)",
    ),
]
Endpoints = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        metavar="NAME=URL",
        help="a running server with OpenAI's completions API (vLLM, TensorRT-LLM, SGLang, ...) that takes part as it "
        "is, for example vllm=http://127.0.0.1:8000/v1; can be repeated",
        help_behavior_hint="",
    ),
]
Workload = Annotated[str, arg(metavar="NAME|FILE", help=f"{', '.join(WORKLOADS)}, or a trace file")]
ListSystems = Annotated[bool, arg(help="show every system's settings, and end", help_behavior_hint="")]
Seeds = Annotated[int, POSITIVE, arg(metavar="K", help="as many runs, with seeds 0 to K-1")]
Picture = Annotated[bool, arg(help="also write the top of the report as a picture, by an installed Chromium")]
Folder = Annotated[Path, arg(metavar="FOLDER", help="folder of results")]


@dataclass(frozen=True)
class Demo(Command):
    """compare FlowPrefill with SGLang's stock scheduler on this machine"""

    name = "demo"
    examples = ("--out out/mine --duration 60 --systems flowprefill sglang stock-spf-2048",)
    out: Folder = Path("out/demo")
    systems: Systems = ("flowprefill", "sglang")
    list_systems: ListSystems = False
    endpoint: Endpoints = ()
    max_output_tokens: MaxAnswer = None
    png: Picture = False
    trace: TraceOptions = TraceOptions(rate_scale=2.0, duration=140.0)
    servers: ServerOptions = ServerOptions()


@dataclass(frozen=True)
class Goodput(Command):
    """the highest rate at which each system keeps its SLOs, on this machine, side by side"""

    name = "goodput"
    examples = (
        "--systems flowprefill 'stock-*' --race",
        "--workload mixed --systems flowprefill 'stock-spf-*' --attainment 0.9",
    )
    systems: Systems = (
        "flowprefill", "flowprefill-s-edf", "flowprefill-layer",
        "stock-fcfs", "stock-spf-512", "stock-spf-2048", "stock-priority-512", "stock-priority-2048",
    )  # fmt: skip
    # FlowPrefill's variants, the DistServe stand-in, and the stock systems that come first in simulations.
    list_systems: ListSystems = False
    endpoint: Endpoints = ()
    workload: Workload = "qwen-like"
    attainment: Annotated[UseAppendAction[tuple[float, ...]], SHARE, arg(metavar="SHARE", help_behavior_hint="")] = ()
    """share of requests that shall meet their TTFT SLO; can be repeated (default: 0.9 and 0.99)"""
    """share of requests that shall meet their TTFT SLO; can be repeated"""
    seeds: Seeds = 3
    budget_s: Seconds = math.inf
    """end after about this long; the same command goes on (default: when all is found)"""
    prefilter: MaybeCount = None
    """measure only the N stock systems that the simulator has first at each attainment, and unchunked fcfs"""
    race: bool = False
    """find the best stock system: one that does not keep the attainment at another's rate is measured no further"""
    compare: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """systems that only take part in the comparison at one rate, which is much quicker than a search"""
    side_by_side: bool = False
    """all servers stay up, and those not measured are stopped, so that turns are seconds apart; some 7 GB a system"""
    duration: Seconds = 60.0
    """seconds in which the requests of a probe arrive"""
    precision: Annotated[float, POSITIVE, arg(metavar="SHARE")] = 0.08
    """a search ends when its rate is known to within this share"""
    time_scale: FactorOrAuto = "auto"
    """factor for the workload's times and SLOs; auto measures it as bench demo does"""
    max_output_tokens: MaxAnswer = None
    out: Folder = Path("out/goodput")
    png: Picture = False
    servers: ServerOptions = ServerOptions()


@dataclass(frozen=True)
class Uncontended(Command):
    """what FlowPrefill costs when nobody waits, in pairs with stock SGLang unchunked"""

    name = "uncontended"
    examples = ("--tokens 2048 8192 --pairs 13",)
    tokens: Counts = (512, 2048, 8192, 16384)
    """prompt lengths"""
    pairs: Count = 11
    """pairs of each length"""
    per_turn: Annotated[int, SEVERAL, arg(metavar="N")] = 3
    """prompts of a turn, one after the other; at least 2"""
    seed: Whole = 0
    """seed of the prompts"""
    model_path: Model = None
    """model to serve instead of the embedded one"""
    out: Folder = Path("out/uncontended")


@dataclass(frozen=True)
class Breakdown(Command):
    """where the time of an isolated request goes, from client to first token"""

    name = "breakdown"
    examples = ("--tokens 64 1024 --repeats 5",)
    tokens: Counts = (64, 256, 1024, 4096, 8192)
    """prompt lengths"""
    repeats: Count = 15
    """requests of each length"""
    seed: Whole = 0
    """seed of the prompts"""
    out: Folder = Path("out/breakdown")
    servers: ServerOptions = ServerOptions()


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
    """FlowPrefill's event log, if the server on this machine has one"""
    out: Folder = Path("out/replay")
    max_output_tokens: MaybeCount = None
    """cut longer answers"""
    trace: TraceOptions = TraceOptions()


@dataclass(frozen=True)
class Validate(Command):
    """simulated against measured attainment, on the same traces with the engine's profile"""

    name = "validate"
    examples = ("--systems flowprefill stock-fcfs --loads 0.5 1.0",)
    systems: Systems = ("flowprefill", "stock-fcfs", "stock-spf-2048")
    list_systems: ListSystems = False
    workload: Workload = "qwen-like"
    loads: Annotated[tuple[float, ...], POSITIVE, arg(metavar="X...")] = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5)
    """rates as multiples of saturation"""
    seeds: Seeds = 2
    duration: Seconds = 60.0
    """seconds in which the requests of a run arrive"""
    time_scale: FactorOrAuto = "auto"
    """factor for the workload's times and SLOs; auto measures it as bench demo does"""
    max_output_tokens: MaxAnswer = None
    out: Folder = Path("out/validate")
    servers: ServerOptions = ServerOptions()


_MODE: Final = create_mutex_group(required=False, title="instead of a comparison at one rate")


@dataclass(frozen=True)
class Simulate(Command):
    """policies on a model of the machine: attainment, goodput, capacity, and the limit"""

    name = "simulate"
    examples = (
        "--goodput --trace qwen-like mixed",
        "--plan --rate 100",
        "--unified --goodput --trace qwen-like mixed --policy feasible",
    )
    unified: bool = False
    """servers that prefill and decode, judged by TTFT and time between tokens together"""
    goodput: Annotated[bool, _MODE] = False
    """search each policy's highest rate at 90% and 99%"""
    plan: Annotated[bool, _MODE] = False
    """search the fewest instances that keep --attainment"""
    speed: Annotated[bool, _MODE] = False
    """measure how fast the policy is by itself"""
    policy: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME...",
            help=f"{', '.join(POLICIES)}, with /layer or /chunk for coarser preemption, or a system of "
            "docs/systems.md, e.g. stock-spf-2048; with --unified also stock-spf-768-mixed, stock-spf-512-interval-1",
            help_behavior_hint="(default: a comparison of them)",
        ),
    ] = ()
    cost: Annotated[str, arg(metavar="NAME|FILE")] = "llama-3.1-8b-a800"
    """llama-3.1-8b-a800, qwen2.5-14b-a800-tp2, qwen3-30b-a3b-a800, or the file of a TTFT profile"""
    layers: Count = 32
    """layers of a profile's model"""
    trace: Annotated[tuple[str, ...], arg(metavar="NAME|FILE...", help=f"{', '.join(WORKLOADS)}, or trace files")] = (
        "qwen-like",
    )
    rate: Annotated[float | None, POSITIVE, arg(metavar="RPS", help_behavior_hint=_shown)] = None
    """arrival rate, in requests a second (default: the trace's own)"""
    time_scale: Factor = 1.0
    """factor of arrivals and SLOs"""
    requests: Count = 4000
    """requests of a run"""
    seeds: Seeds = 3
    instances: Count = 1
    """prefill instances"""
    router: Router = "least-work"
    """how requests are spread over the instances"""
    attainment: Share = 0.99
    """share of requests that --plan keeps in time"""
    max_suspended: Count = 16
    """suspended prefills at a time"""
    max_batch_tokens: Count = 2048
    """new tokens of a batch of several requests; 1: no batches"""
    max_starvation_s: Seconds = 60.0
    """late requests that have waited this long take turns before all others"""
    max_blocking_ms: Annotated[float, POSITIVE, arg(metavar="MS")] = 5.0
    """tiles of long operators"""
    lookahead: Whole = 0
    """operators queued on the device"""
    hub_us: Annotated[float, arg(metavar="US")] = 0.0
    """time of a visit to the scheduler"""
    bootstrap_ms: Annotated[float, arg(metavar="MS")] = 0.0
    """time before a request can start"""
    kv_tokens: MaybeCount = None
    """KV cache of an instance (default: the cost model's)"""
    link_gbps: Annotated[float, POSITIVE, arg(metavar="GBPS", help_behavior_hint=_shown)] = math.inf
    """KV transfer, Gbit/s (default: no time)"""
    prediction_error: Annotated[float, arg(metavar="SD")] = 0.0
    """standard deviation of the logarithm of predictions"""
    prediction_bias: Factor = 1.0
    """factor of all predictions"""
    forward_error: Annotated[float, arg(metavar="SD")] = 0.0
    """standard deviation of the logarithm of the times of FlowPrefill's forwards around the predicted ones"""
    learned: bool = False
    """predict as a server does: by a profile of its first start, corrected and refitted while it serves"""
    step_ms: Annotated[float | None, POSITIVE, arg(metavar="MS", help_behavior_hint=_shown)] = None
    """--unified: fixed time of a decode step (default: the cost model's; 8 for a profile)"""
    step_ms_per_stream: Annotated[float | None, POSITIVE, arg(metavar="MS", help_behavior_hint=_shown)] = None
    """--unified: time of a decode step for each stream (default: the cost model's; 1.9 for a profile)"""
    step_error: Annotated[float, arg(metavar="SD")] = 0.0
    """--unified: standard deviation of the logarithm of the times of steps"""
    no_prefix_cache: bool = False
    """compute every prompt whole"""
    no_limit: bool = False
    """leave out the clairvoyant limit (slow beyond 10,000)"""
    out: NewFile = None
    """write the figures as JSON"""


@dataclass(frozen=True)
class Events(Command):
    """what an event log says: how busy the server was, blocking, prediction errors"""

    name = "events"
    examples = ("events.jsonl --json",)
    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """what --flowprefill-event-log names"""
    json: bool = False
    """print the figures as JSON"""


@dataclass(frozen=True)
class FetchTrace(Command):
    """download a published trace"""

    name = "fetch-trace"
    examples = ("qwen-a",)
    trace: Positional[PublishedTrace]
    """which trace; qwen-a is the paper's"""
    out: NewFile = None
    """where to put it (default: in the cache)"""


COMMANDS: Final[tuple[type[Command], ...]] = (
    Demo, Goodput, Uncontended, Breakdown, Replay, Validate, Simulate, Events, FetchTrace,
)  # fmt: skip
FORMER_NAMES: Final = {"anatomy": Breakdown.name}
WITH_ARGUMENTS: Final = ("--server-args", "--prefill-args", "--decode-args")


def parse(arguments: Sequence[str]) -> Command:
    """The options of the command that ``arguments`` name. Raises OptionError, and SystemExit where tyro has printed
    the help, or what it does not know.
    """
    first, *rest = [*arguments[:1], *_joined(arguments[1:])] or [""]
    name = FORMER_NAMES.get(first, first)
    kind: Any = next((command for command in COMMANDS if command.name == name), None)
    if kind is not None:
        program, about, given = f"{PROGRAM} {name}", _about(kind), rest
    else:  # the list of commands, or that this is none
        kind = Union[tuple(Annotated[command, subcommand(command.name)] for command in COMMANDS)]  # noqa: UP007
        program, about, given = PROGRAM, SUMMARY, list(arguments)
    parsed: Command = tyro.cli(
        kind,
        prog=program,
        description=about,
        args=given,
        config=(OmitArgPrefixes, FlagCreatePairsOff, DisallowNone),
    )
    return parsed


def _about(command: type[Command]) -> str:
    lines = [f"  {PROGRAM} {command.name} {options}" for options in command.examples]
    return "\n".join([f"{command.__doc__}", "", "Examples:", *lines])


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--prefill-args VALUE`` as ``--prefill-args=VALUE``: a value like --tp would be taken for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in WITH_ARGUMENTS:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def requested_trace(options: TraceOptions, time_scale: float) -> Trace:
    """The trace that the options ask for, scaled and cut, with its own answers.

    Raises ValueError with a sentence for a trace that cannot be read or comes out empty.
    """
    if options.trace in WORKLOADS:
        expected = options.duration * options.rate_scale / time_scale * QWEN_RATE_RPS
        enough = math.ceil(expected + 6 * math.sqrt(expected) + 10)
        trace = WORKLOADS[options.trace](enough, options.seed, QWEN_RATE_RPS)
    elif Path(options.trace).exists():
        slos = dict(options.slo)
        trace = load_trace(Path(options.trace), options.format, slos=slos, new_tokens_only=options.new_tokens_only)
    else:
        raise ValueError(f"trace {options.trace!r} is no file and no built-in workload ({', '.join(WORKLOADS)})")
    trace = trace.scaled(rate_scale=options.rate_scale, time_scale=time_scale).until(options.duration)
    trace = trace.limited(requests=options.requests, max_prompt_tokens=options.max_prompt_tokens)
    if not trace.requests:
        raise ValueError(f"no request of {trace.name} arrives within {options.duration:g} s; give a longer --duration")
    return trace


def prompt_builder(seed: int) -> PromptBuilder:
    """Prompts for a seed."""
    return PromptBuilder(seed, *TOKEN_IDS)
