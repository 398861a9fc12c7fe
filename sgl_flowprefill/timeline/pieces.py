"""Event logs, whole or in pieces, told apart by the servers that wrote them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from sgl_flowprefill.events import AnyEvent, Log, read_events

BACK_S: Final = 1.0
"""Times of one server's events are in order, but for what an event costs. Where they go back by more, there is another
server, or the machine was started again."""


def events_of_servers(logs: Sequence[Path]) -> list[tuple[str, list[AnyEvent]]]:
    """The events of each server that ``logs`` tell of, with its name: the log's. Pieces with the same first line are of
    one server. Raises OSError, EventLogError.
    """
    stems = Counter(log.stem for log in logs)
    names: dict[object, str] = {}
    pieces: dict[object, list[list[AnyEvent]]] = {}
    for log in logs:
        name = log.stem if stems[log.stem] == 1 else str(log)
        for number, piece in enumerate(_pieces(read_events(log)), start=1):
            server = msgspec.structs.astuple(piece[0]) if piece and isinstance(piece[0], Log) else object()
            names.setdefault(server, name if number == 1 else f"{name} {number}")
            pieces.setdefault(server, []).append(piece)
    return [(names[server], _joined(of_server)) for server, of_server in pieces.items()]


def _pieces(events: Iterable[AnyEvent]) -> list[list[AnyEvent]]:
    """``events`` of a file, divided where their times go back."""
    pieces: list[list[AnyEvent]] = [[]]
    last_s = -math.inf
    for event in events:
        if event.t_s < last_s - BACK_S:
            pieces.append([])
        pieces[-1].append(event)
        last_s = event.t_s
    return pieces


def _joined(pieces: Sequence[list[AnyEvent]]) -> list[AnyEvent]:
    """The events of pieces of one log, in order, and each once."""
    first, *others = sorted(pieces, key=lambda piece: [event.t_s for event in piece[:2]])
    for piece in others:
        last_s = first[-1].t_s
        near = [event for event in first if event.t_s >= last_s - BACK_S]
        later = [event for event in piece[1:] if event.t_s >= last_s - BACK_S]
        first += [event for event in later if event.t_s > last_s or event not in near]
    return first
