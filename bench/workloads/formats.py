"""Loaders of published traces: QwenTrace, Mooncake, Azure LLM inference 2023, BurstGPT.

A row that cannot be read is an error with file, line and field; no row is skipped. Arrival times are made to start at
0 s and to be in order.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.bench.workloads.trace import QWEN_SLOS, Slo, Trace, TraceRequest, share_prefixes

AUTO: Final = "auto"
QWEN_BLOCK_TOKENS: Final = 16
MOONCAKE_BLOCK_TOKENS: Final = 512
SHORT_PROMPT_TOKENS: Final = 2048
LENGTH_SLOS: Final[Mapping[str, Slo]] = {"short": Slo(0.5, 0.1), "long": Slo(4.0, 0.2)}
"""Classes of traces that name none: prompts of up to SHORT_PROMPT_TOKENS, and longer ones."""


class TraceFormatError(ValueError):
    """A trace file cannot be read; the message names file, line and field."""


@dataclass(frozen=True)
class Row:
    """One row of a trace file, with readers whose errors say where it stands."""

    path: Path
    line: int
    values: Mapping[str, Any]

    def number(self, field: str, *, least: float = 0.0) -> float:
        """The field as a finite number of at least ``least``."""
        value = self._value(field)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.error(field, f"{value!r} is not a number") from None
        if not math.isfinite(number) or number < least:
            raise self.error(field, f"{value!r} is not a number of at least {least:g}")
        return number

    def whole(self, field: str, *, least: int) -> int:
        """The field as a whole number of at least ``least``."""
        number = self.number(field, least=least)
        if number != int(number):
            raise self.error(field, f"{number} is not a whole number")
        return int(number)

    def text(self, field: str) -> str:
        """The field as text that is not empty."""
        value = self._value(field)
        if not isinstance(value, str) or not value:
            raise self.error(field, f"{value!r} is not a text")
        return value

    def ids(self, field: str) -> tuple[int, ...]:
        """The field as a list of whole numbers."""
        value = self._value(field)
        if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
            raise self.error(field, "it is not a list of whole numbers")
        return tuple(value)

    def time_s(self, field: str) -> float:
        """The field, a date and time, in seconds since some epoch."""
        value = self.text(field)
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            raise self.error(field, f"{value!r} is not a date and time") from None

    def error(self, field: str, problem: str) -> TraceFormatError:
        """The error that says where this row stands."""
        return TraceFormatError(f"{self.path}, line {self.line}, field {field!r}: {problem}")

    def _value(self, field: str) -> Any:
        value = self.values.get(field)
        if value is None:
            raise self.error(field, f"it is missing (found {', '.join(str(name) for name in self.values)})")
        return value


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
    full length and share the prefixes that their hash ids share. Raises TraceFormatError.
    """
    try:
        if format == AUTO:
            format = detect_format(path)
        if format not in FORMATS:
            raise TraceFormatError(f"unknown trace format {format!r} (known: {AUTO}, {', '.join(FORMATS)})")
        rows, read = FORMATS[format]
        requests = [read(row) for _, row in zip(range(limit) if limit else count(), rows(path), strict=False)]
        if new_tokens_only:
            if format != "qwen":
                raise TraceFormatError(f"{path}: only QwenTrace says which requests are next turns, this is {format}")
            requests = _without_parents(requests, path)
    except OSError as error:
        raise TraceFormatError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceFormatError(f"{path}: it is not a text file") from None
    if not requests:
        raise TraceFormatError(f"{path}: it holds no request")
    start_s = min(request.arrival_s for request in requests)
    requests.sort(key=lambda request: request.arrival_s)
    requests = [dataclasses.replace(request, arrival_s=request.arrival_s - start_s) for request in requests]
    return Trace(path.name, [_with_slo(request, slos or {}) for request in share_prefixes(requests)])


def detect_format(path: Path) -> str:
    """The format that a file's first line shows. Raises TraceFormatError if it shows none, OSError."""
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("{"):
        fields = set(next(_json_rows(path)).values)
    else:
        fields = set(next(csv.reader([first]), []))
    for name, wanted in SIGNATURES.items():
        if wanted <= fields:
            return name
    raise TraceFormatError(
        f"{path}, line 1: the fields {', '.join(sorted(fields)) or '(none)'} are those of no known trace format; "
        + "; ".join(f"{name} has {', '.join(sorted(wanted))}" for name, wanted in SIGNATURES.items())
    )


def _qwen(row: Row) -> TraceRequest:
    name = row.text("type")
    if name not in QWEN_SLOS:
        raise row.error("type", f"{name!r} is none of {', '.join(QWEN_SLOS)}")
    request = _request(
        row.number("timestamp"), row.whole("input_length", least=1), row.whole("output_length", least=0), name
    )
    return dataclasses.replace(request, hash_ids=row.ids("hash_ids"), block_tokens=QWEN_BLOCK_TOKENS)


def _mooncake(row: Row) -> TraceRequest:
    request = _request(
        row.number("timestamp") / 1e3, row.whole("input_length", least=1), row.whole("output_length", least=0)
    )
    return dataclasses.replace(request, hash_ids=row.ids("hash_ids"), block_tokens=MOONCAKE_BLOCK_TOKENS)


def _azure(row: Row) -> TraceRequest:
    return _request(row.time_s("TIMESTAMP"), row.whole("ContextTokens", least=1), row.whole("GeneratedTokens", least=0))


def _burstgpt(row: Row) -> TraceRequest:
    return _request(
        row.number("Timestamp"), row.whole("Request tokens", least=1), row.whole("Response tokens", least=0)
    )


def _request(arrival_s: float, prompt_tokens: int, output_tokens: int, name: str | None = None) -> TraceRequest:
    """A request with the SLO of its class; a trace's empty answers still ask for a first token."""
    name = name or ("short" if prompt_tokens <= SHORT_PROMPT_TOKENS else "long")
    slo = QWEN_SLOS.get(name) or LENGTH_SLOS[name]
    return TraceRequest(arrival_s, prompt_tokens, max(1, output_tokens), name, slo.ttft_s, slo.tbt_s)


def _with_slo(request: TraceRequest, slos: Mapping[str, Slo]) -> TraceRequest:
    slo = slos.get(request.request_class)
    return dataclasses.replace(request, ttft_slo_s=slo.ttft_s, tbt_slo_s=slo.tbt_s) if slo else request


def _without_parents(requests: list[TraceRequest], path: Path) -> list[TraceRequest]:
    """Cut text turns to what their parents' prompts did not have: (own blocks - parent's blocks) x 16 tokens.

    A turn whose parent is not in the file keeps its length.
    """
    blocks: dict[int, int] = {}
    cut = []
    for row, request in zip(_json_rows(path), requests, strict=False):
        blocks[row.whole("chat_id", least=0)] = len(request.hash_ids)
        parent_blocks = blocks.get(row.whole("parent_chat_id", least=-1), 0) if request.request_class == "text" else 0
        if 0 < parent_blocks < len(request.hash_ids):
            hash_ids = request.hash_ids[parent_blocks:]
            request = dataclasses.replace(request, prompt_tokens=len(hash_ids) * QWEN_BLOCK_TOKENS, hash_ids=hash_ids)
        cut.append(request)
    return cut


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise TraceFormatError(f"{path}, line {number}: it is not JSON ({error})") from None
            if not isinstance(values, dict):
                raise TraceFormatError(f"{path}, line {number}: it is not a JSON object")
            yield Row(path, number, values)


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for values in reader:
            if None in values:
                raise TraceFormatError(f"{path}, line {reader.line_num}: it has more fields than the header names")
            yield Row(path, reader.line_num, values)


RowReader = tuple[Callable[[Path], Iterator[Row]], Callable[[Row], TraceRequest]]
FORMATS: Final[Mapping[str, RowReader]] = {
    "qwen": (_json_rows, _qwen),
    "mooncake": (_json_rows, _mooncake),
    "azure": (_csv_rows, _azure),
    "burstgpt": (_csv_rows, _burstgpt),
}
SIGNATURES: Final[Mapping[str, frozenset[str]]] = {
    "qwen": frozenset({"chat_id", "timestamp", "input_length", "output_length", "type"}),
    "mooncake": frozenset({"timestamp", "input_length", "output_length", "hash_ids"}),
    "azure": frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}),
    "burstgpt": frozenset({"Timestamp", "Request tokens", "Response tokens"}),
}
"""Fields by which each format is known; the first that fits is taken."""
