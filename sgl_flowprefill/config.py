"""Options of FlowPrefill: one table for the command line, the environment and the processes that read them.

SGLang spawns its scheduler as a new process, so the options travel in the environment: the option
``--flowprefill-max-suspended 4`` is ``FLOWPREFILL_MAX_SUSPENDED=4`` there. ``FLOWPREFILL=1`` turns FlowPrefill
on; without it the plugin leaves SGLang's scheduler alone.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from sgl_flowprefill.policy.registry import POLICIES, described
from sgl_flowprefill.slo import DEFAULT, PriorityClasses

ENV_PREFIX: Final = "FLOWPREFILL_"
ENV_SWITCH: Final = "FLOWPREFILL"
ENV_DECODE_SLEEP: Final = ENV_PREFIX + "DECODE_SLEEP"
"""Set to 1 by the launcher: a decode scheduler with nothing to compute sleeps."""
ENV_SCHEDULER_CPUS: Final = ENV_PREFIX + "SCHEDULER_CPUS"
"""Set by the launcher: the CPUs of the scheduler process, those of each rank behind a bar."""
FLAG_PREFIX: Final = "--flowprefill-"
Granularity = Literal["operator", "layer", "chunk"]
Overload = Literal["serve", "demote", "shed"]
SERVES_ALL: Final = "edf"
"""The policy that puts no request behind others because it cannot be met."""
GRANULARITIES: Final[tuple[Granularity, ...]] = get_args(Granularity)
"""How finely a prefill can be suspended, finest first."""
NO_SHEDDING: Final = (
    "--flowprefill-overload shed and --flowprefill-max-queued-tokens are for servers that prefill and decode "
    "(--unified): the clients of this prefill server are answered by a decode server, which would say 500; leave the "
    "options out"
)
NO_JOINT_SHEDDING: Final = (
    "--flowprefill-overload shed and --flowprefill-max-queued-tokens cannot work with data-parallel attention yet: the "
    "rank that decides knows why a request is refused, and does not answer those of the others; leave the options out"
)


class ConfigError(ValueError):
    """An option has a value that cannot work; the message names the option, the value and the remedy."""


class FlowPrefillConfig(BaseModel):
    """Validated options. Field names are option names: ``max_suspended`` is ``--flowprefill-max-suspended``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_ttft_slo: float = Field(
        default=5.0, gt=0, description="TTFT objective in seconds of a request that names none"
    )
    priority_ttft_slo: str | None = Field(
        default=None,
        description="TTFT objectives that priorities of requests stand for, such as 10:0.5,0:2,-10:30 (0.5 s from "
        "priority 10 on); a request's own objective counts before",
    )
    slo_policy: str | None = Field(
        default=None,
        description="YAML file of classes of objectives, and of the requests that belong to them; read again when it "
        "changes and on SIGHUP (docs/clients.md)",
    )
    default_tbt_slo: float = Field(
        default=0.1,
        gt=0,
        description="objective in seconds for the time between two tokens of a request that names none; only on "
        "servers that prefill and decode",
    )
    max_decode_share: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="most of the time that decode steps take while prefills wait, whatever objectives streams have; "
        "only on servers that prefill and decode",
    )
    max_suspended: int = Field(
        default=16,
        ge=0,
        le=512,
        description="most tasks that may be suspended at a time; each holds its KV cache and activations",
    )
    lookahead: int = Field(
        default=2,
        ge=0,
        le=64,
        description="operators queued on the GPU behind the one that runs: a preemption waits for them, and with none "
        "the GPU idles at every preemption checkpoint",
    )
    step_ahead: bool = Field(
        default=True,
        description="while no prefill can run, the next decode step is queued on the GPU before the tokens of the one "
        "that runs are there; false waits for these, and so does --flowprefill-lookahead 0 (only on servers that "
        "prefill and decode)",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="most new tokens of a batch of several requests; a longer request runs alone (default: where the "
        "profile's throughput stops growing)",
    )
    max_starvation_s: float = Field(
        default=60.0,
        gt=0,
        description="requests that can no longer meet their objective and have waited this many seconds take turns "
        "before all others, in a fiftieth of the time; only with the policies feasible and s-edf",
    )
    granularity: Granularity = Field(
        default="operator",
        description="where a running prefill can be suspended: after each attention and MLP (operator), after each "
        "layer (layer), or only between forwards (chunk)",
    )
    policy: str = Field(
        default="feasible", description=f"order of requests: {described()}; docs/simulator.md compares them"
    )
    overload: Overload = Field(
        default="demote",
        description="what happens to requests that cannot be met: they run behind those that can (demote), by deadline "
        "like all others (serve), or, where class or body says sheddable, they are refused with 429 before any of "
        "their prefill runs (shed; only on servers that prefill and decode); docs/overload.md",
    )
    max_queued_tokens: str | None = Field(
        default=None,
        description="most new tokens of prompts that wait, by class, such as default:100000,batch:20000; a request "
        "beyond gets 429 (only on servers that prefill and decode)",
    )
    max_blocking_ms: float = Field(
        default=5.0,
        gt=0,
        description="an operator that would run longer than this many milliseconds is split into tiles between which a "
        "prefill can be suspended",
    )
    event_log: str | None = Field(
        default=None,
        description="file that receives every scheduling event as a JSON line: about 1 kB a request, never rotated; a "
        "decode server's has -decode in its name",
    )
    event_points: bool = Field(
        default=False,
        description="the file of events, and timelines made of it, have each operator and each tile of prefills, too: "
        "about 45 bytes for each operator, 20 for each tile",
    )
    timeline: str | None = Field(
        default=None,
        description="file that receives a timeline for Perfetto when the server ends, or the launcher; its events are "
        "written to a file beside it, which ends in .jsonl, if --flowprefill-event-log names none",
    )
    recent_events: int = Field(
        default=20_000,
        ge=0,
        description="last scheduling events that a server keeps in memory, about 200 bytes each, for /flowprefill; 0 "
        "turns that off",
    )
    answer_report: bool = Field(
        default=True,
        description="answers say what happened to their request: objective, whether it was met, and why not "
        "(docs/answers.md); false leaves SGLang's answers as they are",
    )
    uncompared: bool = Field(
        default=False,
        description="start with features of SGLang that have not been compared together under suspensions; answers may "
        "be wrong (docs/compatibility.md)",
    )
    profile: str | None = Field(
        default=None,
        description="profile of `launch.py profile` to predict TTFT with; without it, the one in the cache, which the "
        "first start measures in at most 20 s (5 s on a GPU)",
    )
    learning: bool = Field(
        default=True,
        description="refit the TTFT model to the prefills that complete, in a process of low priority, and the model "
        "of decode steps to those that run; false keeps the profile's",
    )
    exploration_share: float = Field(
        default=0.003,
        ge=0,
        le=0.5,
        description="share of the time in which a server that has nothing to do runs prefills whose times are least "
        "known; 0 turns it off",
    )
    slack_quantile: float = Field(
        default=0.75,
        gt=0,
        lt=1,
        description="slack is computed with a time that this share of prefills stays within; 0.5 is no margin",
    )

    @property
    def events_file(self) -> str | None:
        """File that receives every scheduling event; None where nobody has asked for one."""
        return self.event_log or (None if self.timeline is None else f"{self.timeline}.jsonl")

    @field_validator("policy")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in POLICIES:
            raise PydanticCustomError("policy", "input should be one of {names}", {"names": ", ".join(POLICIES)})
        return name

    @field_validator("priority_ttft_slo")
    @classmethod
    def _has_classes(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                PriorityClasses.parse(text)
        except ValueError as error:
            raise PydanticCustomError("classes", "{reason}", {"reason": str(error)}) from None
        return text

    @field_validator("slo_policy")
    @classmethod
    def _is_policy(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None:
            return None
        from sgl_flowprefill.slo.policy import PolicyError
        from sgl_flowprefill.slo.policy_file import read_policy

        try:
            read_policy(path, info.data.get("priority_ttft_slo") is not None)
        except PolicyError as error:
            raise PydanticCustomError("policy", "{reason}", {"reason": str(error)}) from None
        return os.path.abspath(path)

    @field_validator("overload")
    @classmethod
    def _goes_with_policy(cls, overload: Overload, info: ValidationInfo) -> Overload:
        policy = info.data.get("policy", SERVES_ALL)
        if overload == "serve" and policy not in (SERVES_ALL, cls.model_fields["policy"].default):
            message = "serve is the policy {edf}: leave the option out with --flowprefill-policy {policy}"
            raise PydanticCustomError("overload", message, {"edf": SERVES_ALL, "policy": policy})
        return overload

    @property
    def order(self) -> str:
        """The policy that orders requests."""
        return SERVES_ALL if self.overload == "serve" else self.policy

    @field_validator("max_queued_tokens")
    @classmethod
    def _has_limits(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None or "slo_policy" not in info.data:  # a wrong one, which is told by itself
            return text
        from sgl_flowprefill.slo.policy_file import read_policy

        path = info.data["slo_policy"]
        classes = dict.fromkeys([*(read_policy(path).classes if path else ()), DEFAULT])
        try:
            unknown = next((name for name in parse_limits(text) if name not in classes), None)
        except ValueError as error:
            raise PydanticCustomError("limits", "{reason}", {"reason": str(error)}) from None
        if unknown is not None:
            message = "no class is called {name}; there are {classes}, by --flowprefill-slo-policy"
            raise PydanticCustomError("limits", message, {"name": unknown, "classes": ", ".join(classes)})
        return text

    @property
    def queue_limits(self) -> dict[str, int]:
        """``max_queued_tokens`` by class."""
        return {} if self.max_queued_tokens is None else parse_limits(self.max_queued_tokens)

    @property
    def refuses(self) -> bool:
        """Whether the server refuses requests when it is overloaded."""
        return self.overload == "shed" or self.max_queued_tokens is not None

    def refusing_problem(self, *, decodes: bool, is_joint: bool) -> str | None:
        """Why a server cannot refuse requests although it is to, as one that ``decodes`` or not and has data-parallel
        attention or not; None where it can, or is not to."""
        if not self.refuses or (decodes and not is_joint):
            return None
        return NO_JOINT_SHEDDING if decodes else NO_SHEDDING

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> FlowPrefillConfig:
        """Read the options from the environment. Raises ConfigError with one sentence per wrong value or name."""
        return cls.parse(cls._values_of(os.environ if env is None else env))

    @classmethod
    def _values_of(cls, env: Mapping[str, str]) -> dict[str, str]:
        """What ``env`` says. Raises ConfigError for a misspelt option; a Kubernetes service called flowprefill has
        variables with the same prefix, so only names that are close to an option's count."""
        options = {_env_name(name): name for name in cls.model_fields}
        for name in env:
            stem = name.removeprefix(ENV_PREFIX)
            if stem == name or name in options:
                continue
            meant = difflib.get_close_matches(stem, [one.upper() for one in cls.model_fields], n=1, cutoff=0.8)
            if meant:
                raise ConfigError(f"{name}={env[name]} in the environment is no option; {ENV_PREFIX}{meant[0]} is")
        return {options[name]: value for name, value in env.items() if name in options}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> FlowPrefillConfig:
        """Validate ``values`` (strings are converted). Raises ConfigError that names the option and its value."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [
                f"{_flag_name(str(item['loc'][0]))} {item['input']}: {item['msg'][0].lower()}{item['msg'][1:]}"
                for item in error.errors()
            ]
            raise ConfigError("; ".join(problems)) from None

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add every option as ``--flowprefill-…`` to ``parser``; absent options stay None in the namespace."""
        group = parser.add_argument_group("FlowPrefill")
        for name, field in cls.model_fields.items():
            default = "" if field.default is None else f" (default {field.default})"
            group.add_argument(
                _flag_name(name), dest=_dest(name), metavar="VALUE", help=f"{field.description}{default}"
            )

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> FlowPrefillConfig:
        """Options that ``add_cli_args`` parsed; what the command line does not name comes from the environment."""
        values = cls._values_of(os.environ)
        given = {name: getattr(namespace, _dest(name), None) for name in cls.model_fields}
        return cls.parse(values | {name: value for name, value in given.items() if value is not None})

    def to_env(self) -> dict[str, str]:
        """Environment variables that make ``from_env`` return this configuration."""
        return {_env_name(name): str(value) for name, value in self.model_dump().items() if value is not None}


def parse_limits(text: str) -> dict[str, int]:
    """Of ``default:100000,batch:20000``. Raises ValueError with what is expected."""
    limits = {}
    for item in text.split(","):
        name, _, tokens = item.strip().partition(":")
        if not name or name in limits or not tokens.isascii() or not tokens.isdecimal():
            raise ValueError("expected CLASS:TOKENS,CLASS:TOKENS,… such as default:100000,batch:20000, each class once")
        limits[name] = int(tokens)
    return limits


def command_line(values: Mapping[str, Any]) -> str:
    """Options by field name, as they are given to a launcher."""
    return " ".join(f"{_flag_name(name)} {value}" for name, value in values.items())


def attach_values(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """Write ``--option VALUE`` as ``--option=VALUE`` for all of ``options``: a value like --tp would be taken for an
    option.
    """
    attached: list[str] = []
    for argument in argv:
        if attached and attached[-1] in options:
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached


def is_enabled(env: Mapping[str, str] | None = None) -> bool:
    """Whether the environment asks for FlowPrefill (``FLOWPREFILL=1``)."""
    env = os.environ if env is None else env
    return env.get(ENV_SWITCH, "0").lower() in ("1", "true", "yes", "on")


def _env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


def _flag_name(field: str) -> str:
    return FLAG_PREFIX + field.replace("_", "-")


def _dest(field: str) -> str:
    return f"flowprefill_{field}"
