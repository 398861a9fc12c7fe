"""The SLO policy file: classes of objectives, and which requests belong to them. A mistake has its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sgl_flowprefill.slo.objective import CLASS_NAME, DEFAULT, LONGEST_SLO_S, MOST_WEIGHT, shortened
from sgl_flowprefill.slo.priorities import is_order, place

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SLO_S)]
Location = tuple[int | str, ...]
STRICT: Final = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=False)


class PolicyError(ValueError):
    """The file cannot be used; the message names the file, the line and what is expected there."""


class SloClass(BaseModel):
    """What the requests of one class are promised, and what their clients may ask for."""

    model_config = STRICT

    ttft_s: Seconds | None = Field(default=None, description="objective (s) for the first token")
    base_s: Seconds | None = Field(
        default=None, description="in place of `ttft_s`: the part of the objective that does not depend on the prompt"
    )
    per_1k_tokens_s: Annotated[float, Field(ge=0, le=LONGEST_SLO_S)] = Field(
        default=0.0, description="with `base_s`: seconds for every 1,000 tokens of the prompt"
    )
    tbt_s: Seconds | None = Field(default=None, description="objective (s) for the time between two tokens")
    weight: Annotated[float, Field(gt=0, le=MOST_WEIGHT)] = Field(
        default=1.0, description="how much a request counts beside those of other classes"
    )
    sheddable: bool = Field(default=False, description="whether a request may be refused when the server is overloaded")
    min_ttft_s: Seconds | None = Field(
        default=None, description="the tightest objective that a client may ask for; a tighter one is raised to it"
    )
    min_tbt_s: Seconds | None = Field(default=None, description="the same for the time between two tokens")
    tight_per_minute: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="how many requests a minute may ask for less than the class's own objective; further ones get "
        "the class's own",
    )
    named_per_minute: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="how many requests a minute may belong to the class because a client names it; further ones go by "
        "`rules` and `default`",
    )
    tight_by: Literal["class", "api_key"] = Field(
        default="class", description="whether the whole class or each API key has so many of both"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> SloClass:
        if self.ttft_s is not None and self.base_s is not None:
            raise PydanticCustomError("slo", "a class has ttft_s or base_s, not both")
        if self.per_1k_tokens_s and self.base_s is None:
            raise PydanticCustomError("slo", "per_1k_tokens_s goes with base_s")
        own_s = self.objective_s(0)
        if self.tight_per_minute is not None and own_s is None:
            raise PydanticCustomError("slo", "tight_per_minute goes with ttft_s or base_s, which further requests get")
        if self.min_ttft_s is not None and own_s is not None and self.min_ttft_s > own_s:
            raise PydanticCustomError("slo", "min_ttft_s may not be above the class's own objective")
        if self.min_tbt_s is not None and self.tbt_s is not None and self.min_tbt_s > self.tbt_s:
            raise PydanticCustomError("slo", "min_tbt_s may not be above the class's own objective")
        return self

    @property
    def has_bounds(self) -> bool:
        """Whether it says what clients may ask for; where it does not, the class ``default`` does."""
        return any(bound is not None for bound in (self.min_ttft_s, self.min_tbt_s, self.tight_per_minute))

    def objective_s(self, prompt_tokens: int) -> float | None:
        """For the first token of a request of ``prompt_tokens``."""
        if self.base_s is None:
            return self.ttft_s
        return self.base_s + self.per_1k_tokens_s * prompt_tokens / 1000


class Rule(BaseModel):
    """Requests that belong to a class although nobody says so."""

    model_config = STRICT

    slo_class: str = Field(alias="class", description="the class that they belong to")
    model: str = Field(default="*", description="pattern of the model's name, such as `*-8B*`")
    min_prompt_tokens: Annotated[int, Field(ge=0)] = Field(default=0, description="shortest prompt")
    max_prompt_tokens: Annotated[int, Field(ge=0)] | None = Field(default=None, description="longest prompt")

    def fits(self, model: str, prompt_tokens: int) -> bool:
        longest = prompt_tokens if self.max_prompt_tokens is None else self.max_prompt_tokens
        return self.min_prompt_tokens <= prompt_tokens <= longest and fnmatchcase(model, self.model)


class SloPolicy(BaseModel):
    """A whole file."""

    model_config = STRICT

    classes: dict[str, SloClass] = Field(
        default_factory=dict,
        description="by their names. The class `default` has the requests that belong to no other",
    )
    priorities: dict[int, str] = Field(
        default_factory=dict,
        description="class by SGLang's `priority`, the most urgent first: each has the priorities from its number on, "
        "up to the one before; the last has all others. Rising numbers: small ones are urgent",
    )
    service_tiers: dict[str, str] = Field(default_factory=dict, description="class by the body's `service_tier`")
    smg_priorities: dict[str, str] = Field(
        default_factory=dict,
        description="class by the header `X-SMG-Priority` (`system`, `interactive`, `default`, `bulk`); a class of "
        "the same name needs no entry",
    )
    rules: list[Rule] = Field(
        default_factory=list, description="classes by model and prompt length; the first rule that fits counts"
    )

    def of_priority(self, priority: int) -> str | None:
        """The class that ``priority`` stands for."""
        numbers = tuple(self.priorities)
        return self.priorities[numbers[place(numbers, priority)]] if numbers else None

    def of_smg_priority(self, name: str) -> str | None:
        """The class that smg's ``name`` of a priority stands for; None where the policy does not know it."""
        return self.smg_priorities.get(name) or (name if name in self.classes else None)

    def of_rules(self, model: str, prompt_tokens: int) -> str | None:
        """The class that a request without one belongs to."""
        for rule in self.rules:
            if rule.fits(model, prompt_tokens):
                return rule.slo_class
        return DEFAULT if DEFAULT in self.classes else None


EMPTY: Final = SloPolicy()
"""The policy of a server without a file."""


def parse(text: str, name: str) -> SloPolicy:
    """The policy that ``text`` of the file ``name`` says. Raises PolicyError with all mistakes, each with its line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        problems = list(_twice(root))
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise PolicyError(f"{name}:{line}: no YAML: {error.problem}") from None
    except RecursionError:
        raise PolicyError(f"{name}:1: a part of the file contains itself, or is nested too deep") from None
    except Exception as error:  # PyYAML raises all sorts, such as AttributeError for ``!!timestamp x``
        raise PolicyError(f"{name}:1: no YAML: {error!r}") from None
    try:
        policy = SloPolicy.model_validate({} if values is None else values)
        problems += _not_there(policy)
    except ValidationError as error:
        problems += [(item["loc"], _sentence(item)) for item in error.errors()]
    if problems:
        raise PolicyError("; ".join(f"{name}:{_line(root, loc)}: {_path(loc)}{what}" for loc, what in problems))
    return policy


def _sentence(item: Any) -> str:
    message = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    if item["type"] in ("slo", "extra_forbidden"):
        return message
    return f"{message}, got {shortened(item['input'])}"


def _not_there(policy: SloPolicy) -> Iterator[tuple[Location, str]]:
    """Names of classes that are none, and classes that the file names but does not have."""
    for name in policy.classes:
        if not CLASS_NAME.fullmatch(name):
            yield ("classes", name), "the name of a class has letters, digits, _, . and -, at most 64"
    tables: dict[str, Mapping[Any, str]] = {
        "priorities": policy.priorities,
        "service_tiers": policy.service_tiers,
        "smg_priorities": policy.smg_priorities,
    }
    named: list[tuple[Location, str]] = [((table, key), one) for table, of in tables.items() for key, one in of.items()]
    named += [(("rules", index, "class"), rule.slo_class) for index, rule in enumerate(policy.rules)]
    for location, one in named:
        if one not in policy.classes:
            yield location, f"no class is called {shortened(one)}; there are {', '.join(policy.classes) or 'none'}"
    if not is_order(tuple(policy.priorities)):
        yield ("priorities",), "the numbers have to fall from one to the next, or to rise"


def _twice(node: yaml.Node | None, path: Location = ()) -> Iterator[tuple[Location, str]]:
    """Keys that a mapping has twice, of which YAML would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _twice(item, (*path, index))
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield (*path, str(key.value)), "is there twice"
            seen.add(str(key.value))
            yield from _twice(value, (*path, str(key.value)))


def _line(node: yaml.Node | None, location: Location) -> int:
    """Line of what is at ``location``, or of what would hold it; a key's line, for the last one of that name."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            key, node = found[-1]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _path(location: Location) -> str:
    return f"{'.'.join(map(str, location))}: " if location else ""
