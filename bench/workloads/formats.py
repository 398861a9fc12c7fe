"""Loaders of published traces: QwenTrace, Mooncake, Azure LLM inference 2023, BurstGPT.

A row that cannot be read is an error with file, line and field; no row is skipped. Arrival times are made to start at
0 s and to be in order.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from sgl_flowprefill.bench.workloads.trace import QWEN_SLOS, Slo, Trace, TraceRequest, share_prefixes

AUTO: Final = "auto"
SHORT_PROMPT_TOKENS: Final = 2048
LENGTH_SLOS: Final[Mapping[str, Slo]] = {"short": Slo(0.5, 0.1), "long": Slo(4.0, 0.2)}
"""Classes of traces that name none: prompts of up to SHORT_PROMPT_TOKENS, and longer ones."""


class TraceFormatError(ValueError):
    """A trace file cannot be read; the message names file, line, field and value, and ``remedy`` what to do."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__("; ".join(part for part in (problem, remedy) if part))
        self.problem = problem


BlockIds = tuple[Annotated[int, Field(ge=0, strict=True)], ...]


class Row(BaseModel):
    """A row of a published trace: pydantic checks its fields, which have the names of the file as aliases."""

    model_config = ConfigDict(allow_inf_nan=False)

    block_tokens: ClassVar[int] = 16
    signature: ClassVar[frozenset[str]]
    """Fields by which the format is known."""

    prompt_tokens: int
    output_tokens: int
    hash_ids: BlockIds = ()

    @property
    @abstractmethod
    def time_s(self) -> float:
        """When the request arrived, since some epoch."""

    @property
    def class_name(self) -> str:
        """The request's class, by its length where the file names none."""
        return "short" if self.prompt_tokens <= SHORT_PROMPT_TOKENS else "long"


class QwenRow(Row):
    """A request of QwenTrace (alibaba-edu/qwen-bailian-usagetraces-anon); times in seconds, blocks of 16 tokens."""

    signature = frozenset({"chat_id", "timestamp", "input_length", "output_length", "type"})

    timestamp: float = Field(ge=0)
    prompt_tokens: int = Field(alias="input_length", ge=1)
    output_tokens: int = Field(alias="output_length", ge=0)
    request_class: Literal["text", "image", "search", "file"] = Field(alias="type")
    hash_ids: BlockIds
    chat_id: int | None = Field(None, ge=0)
    parent_chat_id: int | None = Field(None, ge=-1)

    @property
    def time_s(self) -> float:
        return self.timestamp

    @property
    def class_name(self) -> str:
        return self.request_class


class MooncakeRow(Row):
    """A request of Mooncake's traces; times in milliseconds, blocks of 512 tokens."""

    block_tokens = 512
    signature = frozenset({"timestamp", "input_length", "output_length", "hash_ids"})

    timestamp: float = Field(ge=0)
    prompt_tokens: int = Field(alias="input_length", ge=1)
    output_tokens: int = Field(alias="output_length", ge=0)
    hash_ids: BlockIds

    @property
    def time_s(self) -> float:
        return self.timestamp / 1e3


class AzureRow(Row):
    """A request of the Azure LLM inference traces of 2023; times are dates."""

    signature = frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"})

    timestamp: datetime = Field(alias="TIMESTAMP")
    prompt_tokens: int = Field(alias="ContextTokens", ge=1)
    output_tokens: int = Field(alias="GeneratedTokens", ge=0)

    @property
    def time_s(self) -> float:
        return self.timestamp.timestamp()


class BurstGptRow(Row):
    """A request of BurstGPT; times in seconds."""

    signature = frozenset({"Timestamp", "Request tokens", "Response tokens"})

    timestamp: float = Field(alias="Timestamp", ge=0)
    prompt_tokens: int = Field(alias="Request tokens", ge=1)
    output_tokens: int = Field(alias="Response tokens", ge=0)

    @property
    def time_s(self) -> float:
        return self.timestamp


def load_trace(
    path: Path,
    format: str = AUTO,
    *,
    slos: Mapping[str, Slo] | None = None,
    new_tokens_only: bool = False,
    limit: int | None = None,
) -> Trace:
    """Read a trace file, its first ``limit`` rows at most.

    ``slos`` replaces the objectives of classes by name. ``new_tokens_only`` is the paper's rule for QwenTrace with
    prefix caching off: a text turn counts only what its parent's prompt did not have. Without it prompts have their
    full length and share the prefixes that their hash ids share. Raises TraceFormatError, also where ``slos`` names a
    class of no request.
    """
    try:
        if format == AUTO:
            format = detect_format(path)
        if format not in FORMATS:
            raise TraceFormatError(f"unknown trace format {format!r} (known: {AUTO}, {', '.join(FORMATS)})")
        rows_of, kind = FORMATS[format]
        rows = list(islice(rows_of(path, kind), limit or None))
    except OSError as error:
        raise TraceFormatError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceFormatError(f"{path}: it is not a text file") from None
    if not rows:
        raise TraceFormatError(f"{path}: it holds no request")
    classes = sorted({row.class_name for row in rows})
    for name in slos or ():
        if name not in classes:
            raise TraceFormatError(f"{path}: no request is of class {name!r}", f"the classes are {', '.join(classes)}")
    start_s = min(row.time_s for row in rows)
    objectives = {**LENGTH_SLOS, **QWEN_SLOS, **(slos or {})}
    requests = [_request(row, start_s, objectives[row.class_name]) for row in rows]
    if new_tokens_only:
        requests = _without_parents(requests, rows, path)
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(path.name, share_prefixes(requests))


def detect_format(path: Path) -> str:
    """The format that a file's first line shows. Raises TraceFormatError if it shows none, OSError."""
    with path.open(encoding="utf-8-sig") as file:
        number, first = next(((number, line) for number, line in enumerate(file, 1) if line.strip()), (1, ""))
    if first.lstrip().startswith("{"):
        fields = set(_json_fields(path, number, first))
    else:
        fields = set(next(csv.reader([first]), []))
    for name, (_, kind) in FORMATS.items():
        if kind.signature <= fields:
            return name
    raise TraceFormatError(
        f"{path}, line {number}: the fields {', '.join(sorted(fields)) or '(none)'} are those of no known trace format",
        "; ".join(f"{name} has {', '.join(sorted(kind.signature))}" for name, (_, kind) in FORMATS.items()),
    )


def _request(row: Row, start_s: float, slo: Slo) -> TraceRequest:
    """What a row asks for; a trace's empty answers still ask for a first token."""
    return TraceRequest(
        row.time_s - start_s,
        row.prompt_tokens,
        max(1, row.output_tokens),
        row.class_name,
        slo.ttft_s,
        slo.tbt_s,
        row.hash_ids,
        row.block_tokens,
    )


def _without_parents(requests: list[TraceRequest], rows: list[Row], path: Path) -> list[TraceRequest]:
    """Cut text turns to what their parents' prompts did not have: (own blocks - parent's blocks) x 16 tokens.

    A turn whose parent is not in the file keeps its length.
    """
    blocks: dict[int, int] = {}
    cut = []
    for row, request in zip(rows, requests, strict=True):
        if not isinstance(row, QwenRow):
            raise TraceFormatError(f"{path}: only QwenTrace says which requests are next turns, this is another format")
        if row.chat_id is None or row.parent_chat_id is None:
            raise TraceFormatError(f"{path}: a row has no chat_id or no parent_chat_id", "leave out --new-tokens-only")
        blocks[row.chat_id] = len(row.hash_ids)
        parent_blocks = blocks.get(row.parent_chat_id, 0) if row.request_class == "text" else 0
        if 0 < parent_blocks < len(row.hash_ids):
            hash_ids = row.hash_ids[parent_blocks:]
            request = dataclasses.replace(request, prompt_tokens=len(hash_ids) * row.block_tokens, hash_ids=hash_ids)
        cut.append(request)
    return cut


def _json_rows(path: Path, kind: type[Row]) -> Iterator[Row]:
    validate = kind.__pydantic_validator__.validate_json
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield validate(line)
                except ValidationError as error:
                    raise _row_error(path, number, _json_fields(path, number, line), error) from None


def _json_fields(path: Path, number: int, line: str) -> list[str]:
    """The names in a line. Raises TraceFormatError where it is no JSON object."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise TraceFormatError(f"{path}, line {number}: it is not JSON ({error})", REMEDY) from None
    if not isinstance(values, dict):
        raise TraceFormatError(f"{path}, line {number}: it is not a JSON object", REMEDY)
    return list(values)


def _csv_rows(path: Path, kind: type[Row]) -> Iterator[Row]:
    validate = kind.__pydantic_validator__.validate_python
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for values in reader:
            if None in values:
                problem = f"{path}, line {reader.line_num}: it has more fields than the header names"
                raise TraceFormatError(problem, REMEDY)
            try:
                yield validate(values)
            except ValidationError as error:
                raise _row_error(path, reader.line_num, list(values), error) from None


def _row_error(path: Path, number: int, fields: list[str], error: ValidationError) -> TraceFormatError:
    """Where a row stands, and what its first problem is."""
    found = error.errors(include_url=False)[0]
    if not found["loc"]:  # no field's value: text that JSON allows and pydantic does not
        return TraceFormatError(f"{path}, line {number}: {found['msg']}", REMEDY)
    return TraceFormatError(f"{path}, line {number}, field {str(found['loc'][0])!r}: {_problem(found, fields)}", REMEDY)


def _problem(found: ErrorDetails, fields: list[str]) -> str:
    value, kind = found["input"], found["type"]
    if kind == "missing" or value is None:
        return f"it is missing (found {', '.join(fields)})"
    if found["loc"][0] == "hash_ids":
        return "it is not a list of whole numbers"
    if kind == "greater_than_equal":
        return f"{value!r} is not a number of at least {found['ctx']['ge']:g}"
    if kind == "literal_error":
        return f"{value!r} is none of {', '.join(QWEN_SLOS)}"
    if kind.startswith("datetime"):
        return f"{value!r} is not a date and time"
    if kind == "int_from_float" or (kind == "int_parsing" and str(value).replace(".", "", 1).isdecimal()):
        return f"{value} is not a whole number"
    return f"{value!r} is not a number"


REMEDY: Final = "correct the line, or leave it out"
Rows = Callable[[Path, type[Row]], Iterator[Row]]
FORMATS: Final[Mapping[str, tuple[Rows, type[Row]]]] = {
    "qwen": (_json_rows, QwenRow),
    "mooncake": (_json_rows, MooncakeRow),
    "azure": (_csv_rows, AzureRow),
    "burstgpt": (_csv_rows, BurstGptRow),
}
"""How each format is read; the first whose signature fits a file is taken."""
