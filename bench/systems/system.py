"""What a system is: its name, why its users would run it so, how its servers are started, and how it is simulated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from sgl_flowprefill.bench.simulator.systems import Simulated, SimulatedFlowPrefill, SimulatedUnified
from sgl_flowprefill.config import FlowPrefillConfig, command_line
from sgl_flowprefill.policy import DecodeLimits

PRIORITY_OPTION: Final = "--enable-priority-scheduling"
Layout = Literal["pair", "unified"]
"""What requests are served by: a prefill and a decode server behind a gateway, or one server that does both."""
UNIFIED_OPTION: Final = "--unified"


@dataclass(frozen=True)
class System(ABC):
    """A system that can take part in a comparison."""

    name: str
    """Key on the command line, in results and in file names."""
    label: str
    """Name in tables and pages."""
    why: str
    """Why its users would run it so."""
    layout: Layout = field(default="pair", kw_only=True)

    is_stock = False
    """Whether SGLang's own scheduler runs on servers of ours."""
    orders_by_slo = False
    """Whether its order depends on the SLOs that requests carry."""

    @property
    @abstractmethod
    def settings(self) -> str:
        """What it is started with, as on a command line."""

    @property
    def is_unified(self) -> bool:
        return self.layout == "unified"

    @property
    def prefill_args(self) -> Sequence[str]:
        """SGLang options of its server that prefills."""
        return ()

    @property
    def wants_priority(self) -> bool:
        """Whether requests carry a priority: the tighter the TTFT SLO, the higher."""
        return PRIORITY_OPTION in self.prefill_args

    def config(self, options: FlowPrefillConfig) -> FlowPrefillConfig | None:
        """FlowPrefill's options, ``options`` where the system leaves them open; None without FlowPrefill."""
        return None

    @abstractmethod
    def simulated(self, options: FlowPrefillConfig) -> Simulated | None:
        """How it is simulated, run with ``options``; None for what cannot be simulated."""


@dataclass(frozen=True)
class FlowPrefillSystem(System):
    """FlowPrefill with ``options``, some fields of FlowPrefillConfig."""

    options: Mapping[str, Any] = field(default_factory=dict)

    orders_by_slo = True

    @property
    def settings(self) -> str:
        return _line("--flowprefill", *_layout_options(self), command_line(self.options))

    def config(self, options: FlowPrefillConfig) -> FlowPrefillConfig:
        return FlowPrefillConfig.parse(options.model_dump() | dict(self.options))

    def simulated(self, options: FlowPrefillConfig) -> Simulated:
        config = self.config(options)
        if self.is_unified:
            return SimulatedUnified(config.policy, config.granularity, DecodeLimits(max_share=config.max_decode_share))
        return SimulatedFlowPrefill(config.policy, config.granularity)


@dataclass(frozen=True)
class StockSystem(System):
    """SGLang's own scheduler, simulated as ``simulation``."""

    simulation: Simulated
    args: Sequence[str] = ()

    is_stock = True

    @property
    def prefill_args(self) -> Sequence[str]:
        return self.args

    @property
    def settings(self) -> str:
        return _line(*_layout_options(self), *self.args)

    def simulated(self, options: FlowPrefillConfig) -> Simulated:
        return self.simulation


@dataclass(frozen=True)
class SimulatedSystem(System):
    """What no option of a server asks for: it can be simulated, and not served."""

    simulation: Simulated

    @property
    def settings(self) -> str:
        return "simulated only"

    def simulated(self, options: FlowPrefillConfig) -> Simulated:
        return self.simulation


@dataclass(frozen=True)
class EndpointSystem(System):
    """Servers of somebody else behind an OpenAI-compatible API at ``url``: neither started, stopped nor simulated."""

    url: str
    """Without ``/v1``."""

    @property
    def settings(self) -> str:
        return self.url

    def simulated(self, options: FlowPrefillConfig) -> None:
        return None

    @classmethod
    def parse(cls, text: str) -> EndpointSystem:
        """The endpoint that ``NAME=URL`` names. Raises ValueError with the form that is wanted."""
        name, _, url = text.partition("=")
        split = urlsplit(url)
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or (
            split.scheme not in ("http", "https") or not split.hostname
        ):
            raise ValueError(
                f"--endpoint {text!r} is not of the form NAME=URL, for example vllm=http://127.0.0.1:8000/v1; a name "
                "has letters, digits and -_. only"
            )
        url = url.rstrip("/").removesuffix("/v1")
        return cls(name, f"{name} ({split.netloc})", "servers of somebody else, as they are", url)


def _layout_options(system: System) -> list[str]:
    return [UNIFIED_OPTION] if system.is_unified else []


def _line(*words: str) -> str:
    return " ".join(filter(None, words))
