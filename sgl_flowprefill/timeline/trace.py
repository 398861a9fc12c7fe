"""Histories of servers as a trace in Perfetto's format (protobuf), for ui.perfetto.dev and its trace processor.

A server is a process of the trace. Its tracks: what runs; how many wait and run, and the least slack, as counters; a
track a task, with its modules and their tiles where the log has them; a track a request, with its deadline as a mark.
Perfetto puts tracks of one name into one row where they do not overlap. Arrows go from an arrival to the task that is
suspended for it, and on to the task that runs instead; and from where a prefill server sends a KV cache to where the
decode server decodes from it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain, count, groupby
from pathlib import Path
from typing import IO, Final

from msgspec import UNSET
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (
    CounterDescriptor,
    TracePacket,
    TrackDescriptor,
    TrackEvent,
)
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

from sgl_flowprefill.events import Complete, Fail, rounded
from sgl_flowprefill.timeline.history import (
    BESIDE_STEP,
    DECODING,
    FOR_KV,
    FOR_PLACE,
    NOT_READY,
    RUNNING,
    SENDING,
    WAITING,
    WITHOUT_PLACE,
    DecodedRequest,
    History,
    Part,
    Request,
    Task,
)
from sgl_flowprefill.timeline.pairs import Prefilled, by_room, clock_behind_s, later
from sgl_flowprefill.timeline.pieces import events_of_servers

Value = bool | int | float | str | None
Args = Mapping[str, Value]

SEQUENCE: Final = 1
"""One writer writes all packets."""
OTHER_CLOCK: Final = " (another machine's clock, set by KV caches)"
SEVERAL_CLOCKS: Final = " (its prefill servers have clocks of several machines)"
TILE: Final = "tile"
ARRIVAL: Final = "arrival"
DEADLINE: Final = "deadline"
MISSED, IN_TIME, OTHERS = "requests that missed their objective", "requests in time", "other requests"
FAILED, DECODED = "requests that failed", "requests that were decoded"


def write_timeline(logs: Sequence[Path], output: Path) -> list[tuple[str, History]]:
    """Write the timeline of servers, whose event logs are ``logs``: those that prefill are of one machine. Returns what
    it shows, with the names of the servers. Raises OSError, EventLogError.
    """
    servers = [(name, History.of(events)) for name, events in events_of_servers(logs)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "wb") as file:
        write_trace(servers, file)
    return servers


def write_trace(servers: Sequence[tuple[str, History]], file: IO[bytes]) -> None:
    """Write the histories of servers, each with its name. A request that is in several is joined by an arrow."""
    writer = _Writer(file)
    homes = Counter(chain.from_iterable({request.rid for request in history.requests} for _, history in servers))
    joins = {rid: writer.new_flow() for rid, servers_of_it in homes.items() if servers_of_it > 1}
    prefilled = by_room([history for _, history in servers])
    sent = {
        room: writer.new_flow()
        for _, history in servers
        for one in history.decoded
        if (room := one.event.bootstrap_room) is not None
        and room in prefilled
        and _does(one, DECODING)
        and _does(prefilled[room].request, SENDING)
    }
    for number, (name, history) in enumerate(servers, start=1):
        behind_s = clock_behind_s(history, prefilled)
        note = SEVERAL_CLOCKS if behind_s is None else OTHER_CLOCK if behind_s else ""
        process = writer.process(number, name + note)
        if history.requests or not history.decoded:
            _Server(writer, process, history, joins, sent).write()
        if history.decoded:
            decoded = [later(one, behind_s) for one in history.decoded] if behind_s else history.decoded
            _DecodeServer(writer, process, decoded, prefilled, sent).write()


class _Server:
    """Writes the tracks of a server that prefills."""

    def __init__(
        self, writer: _Writer, process: int, history: History, joins: Mapping[str, int], sent: Mapping[int, int]
    ) -> None:
        """``joins``: the arrows through a request at several servers, by rid. ``sent``: those of KV caches, by room."""
        self._writer = writer
        self._process = process
        self._history = history
        self._joins = joins
        self._sent = sent
        self._from_arrival: defaultdict[Request, list[int]] = defaultdict(list)
        """Arrows that begin at its arrival."""
        self._through: dict[int, int] = {}
        """The arrow that passes a suspension, by the event's id()."""
        self._to_start: dict[tuple[Task, float], int] = {}
        """The arrow that ends where the task begins to run."""
        for preemption in history.preemptions:
            flow = writer.new_flow()
            self._through[id(preemption.suspend)] = flow
            if preemption.winner is not None:
                self._from_arrival[preemption.winner].append(flow)
            if preemption.winner_task is not None:
                self._to_start[preemption.winner_task, preemption.suspend.t_s] = flow

    def write(self) -> None:
        ranks = count()
        self._engine(next(ranks))
        requests = self._history.requests
        waiting = [(part, request) for request in requests for part in request.parts if part.what == WAITING]
        for name, spans in (
            ("requests that are not ready", _spans(requests, WITHOUT_PLACE) + _spans(requests, NOT_READY)),
            ("requests that wait", [(part.begin_s, part.end_s) for part, _ in waiting]),
            ("tasks that run or are suspended", [(task.start.t_s, task.end_s) for task in self._history.tasks]),
            ("streams", _spans(requests, DECODING)),
        ):
            if spans:
                self._writer.counter(name, self._process, next(ranks), depths(spans))
        if waiting:
            latest = [(part.begin_s, part.end_s, _latest_start_s(request)) for part, request in waiting]
            name = "least slack of those that wait"
            self._writer.counter(name, self._process, next(ranks), least_slacks(latest), "s")
        self._tasks(next(ranks))
        for name in (MISSED, IN_TIME, OTHERS):
            members = [request for request in requests if _group(request) == name]
            if members:
                parent = self._writer.track(name, self._process, next(ranks))
                for request in members:
                    self._request(request, parent)

    def _engine(self, rank: int) -> None:
        """What ran when: at most one thing at a time."""
        track = self._writer.track("what runs", self._process, rank)
        runs: list[tuple[float, float, str, Args]] = [
            (part.begin_s, part.end_s, _name(task), {"task": task.start.task, "rids": _joined(task.start.rids)})
            for task in self._history.tasks
            for part in task.parts
            if part.what == RUNNING
        ]
        runs += [(step.begin_s, step.t_s, BESIDE_STEP, {"streams": step.streams}) for step in self._history.steps]
        over_s = -math.inf
        for begin_s, end_s, name, args in sorted(runs, key=lambda run: run[:2]):
            # On a GPU, a decode step that has begun waits for the operators that were queued before it.
            since_s = max(begin_s, over_s)
            if end_s > since_s:
                self._writer.begin(track, since_s, name, args)
                self._writer.end(track, end_s)
                over_s = end_s

    def _tasks(self, rank: int) -> None:
        parent = self._writer.track("tasks", self._process, rank)
        for task in self._history.tasks:
            start, end = task.start, task.end
            track = self._writer.track("task", parent)
            args: dict[str, Value] = {
                "task": start.task,
                "rids": _joined(start.rids),
                "requests": len(start.rids),
                "new_tokens": start.new_tokens,
                "cached_tokens": start.cached_tokens,
                "predicted_s": start.predicted_s,
                "ran_s": round(task.ran_s, 6),
                "suspensions": task.suspensions,
                "end": "under way" if end is None else end.kind,
            }
            if isinstance(end, Complete):
                args |= {"forward_s": end.forward_s, "expected_s": end.expected_s}
            if end is not None and end.checkpoint is not UNSET:
                args["checkpoint"] = end.checkpoint
            self._writer.begin(track, start.t_s, f"task {start.task}", args)
            for part in task.parts:
                self._part_of_task(track, task, part)
            self._writer.end(track, task.end_s)

    def _part_of_task(self, track: int, task: Task, part: Part) -> None:
        args: dict[str, Value] = {}
        arrives = self._to_start.get((task, part.begin_s)) if part.what == RUNNING else None
        passes = None
        if part.event is not None:
            suspend, passes = part.event, self._through.get(id(part.event))
            args = {
                "checkpoint": suspend.checkpoint,
                "after": suspend.after or None,
                "tiles": suspend.tiles,
                "for_rids": _joined(suspend.for_rids),
                "blocking_s": suspend.blocking_s,
                "stop_s": None if suspend.readable_s is None else max(0.0, suspend.stopped_s - suspend.readable_s),
            }
        self._writer.begin(track, part.begin_s, part.what, args, _present(passes), _present(arrives))
        if part.what == RUNNING:
            self._modules(track, task, part)
        self._writer.end(track, part.end_s)

    def _modules(self, track: int, task: Task, part: Part) -> None:
        since_s = part.begin_s
        for name, ends_s in task.modules(part):
            self._writer.begin(track, since_s, name)
            for end_s in ends_s if len(ends_s) > 1 else ():
                self._writer.begin(track, since_s, TILE)
                self._writer.end(track, end_s)
                since_s = end_s
            since_s = ends_s[-1]
            self._writer.end(track, since_s)

    def _request(self, request: Request, parent: int) -> None:
        writer, arrival, rid = self._writer, request.arrival, {"rid": request.rid}
        track, room = writer.track("request", parent), arrival.bootstrap_room
        joins = _present(self._joins.get(request.rid))
        writer.begin(track, arrival.received_s, _title(request), _args(request), joins, rid=request.rid)
        for part in request.parts:
            goes = None if room is None or part.what != SENDING else self._sent.get(room)
            writer.begin(track, part.begin_s, part.what, flows=_present(goes))
            writer.end(track, part.end_s)
        writer.end(track, request.parts[-1].end_s if request.parts else arrival.t_s)
        writer.mark(track, arrival.t_s, ARRIVAL, rid, self._from_arrival[request])
        writer.mark(track, arrival.deadline_s, DEADLINE, rid)


class _DecodeServer:
    """Writes the tracks of a decode server."""

    def __init__(
        self,
        writer: _Writer,
        process: int,
        decoded: Sequence[DecodedRequest],
        prefilled: Mapping[int, Prefilled],
        sent: Mapping[int, int],
    ) -> None:
        """``prefilled``: the requests of prefill servers, by room. ``sent``: the arrows of KV caches, by room."""
        self._writer = writer
        self._process = process
        self._decoded = decoded
        self._prefilled = prefilled
        self._sent = sent

    def write(self) -> None:
        ranks = count()
        for name, what in (
            ("requests that wait for a place", FOR_PLACE),
            ("requests that wait for their KV cache", FOR_KV),
            ("streams", DECODING),
        ):
            if spans := _spans(self._decoded, what):
                self._writer.counter(name, self._process, next(ranks), depths(spans))
        for name, failed in ((FAILED, True), (DECODED, False)):
            members = [one for one in self._decoded if (one.event.reason is not None) == failed]
            if members:
                parent = self._writer.track(name, self._process, next(ranks))
                for one in members:
                    self._request(one, parent)

    def _request(self, one: DecodedRequest, parent: int) -> None:
        writer, event, room = self._writer, one.event, one.event.bootstrap_room
        pair = None if room is None else self._prefilled.get(room)
        rid = event.rid if pair is None else pair.request.rid
        first_token_s = event.first_token_s
        args: Args = {
            "rid": rid,
            "rid_here": None if event.rid == rid else event.rid,
            "bootstrap_room": None if room is None else hex(room),
            "ttft_s": None if first_token_s is None else rounded(first_token_s - event.received_s),
            "tokens": event.tokens,
            "retractions": event.retractions,
            "reason": event.reason,
        }
        track = writer.track("request", parent)
        writer.begin(track, event.received_s, "decoded" if event.reason is None else "failed", args, rid=rid)
        for part in one.parts:
            comes = None if room is None or part.what != DECODING else self._sent.get(room)
            writer.begin(track, part.begin_s, part.what, ends=_present(comes))
            writer.end(track, part.end_s)
        writer.end(track, event.t_s)


class _Writer:
    """Writes tracks and what is on them. Of what has the same time on a track, the first written comes first."""

    def __init__(self, file: IO[bytes]) -> None:
        self._builder = StreamingTraceProtoBuilder(file)
        self._tracks, self._flows = count(1), count(1)

    def new_flow(self) -> int:
        """An arrow."""
        return next(self._flows)

    def process(self, number: int, name: str) -> int:
        packet, uuid = self._descriptor(name)
        packet.track_descriptor.process.pid = number
        packet.track_descriptor.process.process_name = name
        packet.track_descriptor.child_ordering = TrackDescriptor.EXPLICIT
        self._write(packet)
        return uuid

    def track(self, name: str, parent: int, rank: int = 0, counter: bool = False, unit: str | None = None) -> int:
        packet, uuid = self._descriptor(name)
        packet.track_descriptor.parent_uuid = parent
        packet.track_descriptor.sibling_order_rank = rank
        packet.track_descriptor.child_ordering = TrackDescriptor.CHRONOLOGICAL
        if counter:
            packet.track_descriptor.counter.unit = CounterDescriptor.UNIT_COUNT
            if unit is not None:
                packet.track_descriptor.counter.unit_name = unit
        self._write(packet)
        return uuid

    def begin(
        self,
        track: int,
        at_s: float,
        name: str,
        args: Args | None = None,
        flows: Sequence[int] = (),
        ends: Sequence[int] = (),
        rid: str | None = None,
    ) -> None:
        """A slice begins, through which the arrows ``flows`` go and at which the arrows ``ends`` end."""
        packet = self._event(track, at_s, TrackEvent.TYPE_SLICE_BEGIN)
        packet.track_event.name = name
        packet.track_event.flow_ids.extend(flows)
        packet.track_event.terminating_flow_ids.extend(ends)
        if rid is not None:
            packet.track_event.correlation_id_str = rid
        self._write(packet, args)

    def end(self, track: int, at_s: float) -> None:
        """The innermost slice ends."""
        self._write(self._event(track, at_s, TrackEvent.TYPE_SLICE_END))

    def mark(self, track: int, at_s: float, name: str, args: Args, flows: Sequence[int] = ()) -> None:
        packet = self._event(track, at_s, TrackEvent.TYPE_INSTANT)
        packet.track_event.name = name
        packet.track_event.flow_ids.extend(flows)
        self._write(packet, args)

    def counter(
        self, name: str, parent: int, rank: int, values: Iterable[tuple[float, float]], unit: str | None = None
    ) -> None:
        """A track of times and ``values``."""
        track = self.track(name, parent, rank, counter=True, unit=unit)
        for time_s, value in values:
            packet = self._event(track, time_s, TrackEvent.TYPE_COUNTER)
            packet.track_event.double_counter_value = value
            self._write(packet)

    def _descriptor(self, name: str) -> tuple[TracePacket, int]:
        packet, uuid = self._builder.create_packet(), next(self._tracks)
        packet.track_descriptor.uuid = uuid
        packet.track_descriptor.name = name
        return packet, uuid

    def _event(self, track: int, at_s: float, kind: TrackEvent.Type) -> TracePacket:
        packet = self._builder.create_packet()
        packet.timestamp = round(at_s * 1e9)
        packet.track_event.type = kind
        packet.track_event.track_uuid = track
        return packet

    def _write(self, packet: TracePacket, args: Args | None = None) -> None:
        packet.trusted_packet_sequence_id = SEQUENCE
        for name, value in (args or {}).items():
            if value is None:
                continue
            annotation = packet.track_event.debug_annotations.add()
            annotation.name = name
            if isinstance(value, bool):
                annotation.bool_value = value
            elif isinstance(value, int):
                annotation.int_value = value
            elif isinstance(value, float):
                annotation.double_value = value
            else:
                annotation.string_value = value
        self._builder.write_packet(packet)


def depths(spans: Iterable[tuple[float, float]]) -> Iterator[tuple[float, int]]:
    """How many of ``spans`` there are, whenever the number changes."""
    changes = sorted(chain.from_iterable(((begin_s, 1), (end_s, -1)) for begin_s, end_s in spans))
    depth = 0
    for time_s, at_once in groupby(changes, key=lambda change: change[0]):
        before, depth = depth, depth + sum(change for _, change in at_once)
        if depth != before:
            yield time_s, depth


def least_slacks(waits: Sequence[tuple[float, float, float]]) -> Iterator[tuple[float, float]]:
    """The least slack of requests that wait from the first to the second of three times and have to run at the third to
    be in time, whenever one comes or goes; 0 where none is left.
    """
    times_s = sorted({time_s for begin_s, end_s, _ in waits for time_s in (begin_s, end_s)})
    coming = sorted(waits, reverse=True)
    waiting: list[tuple[float, float]] = []
    for time_s in times_s:
        while coming and coming[-1][0] <= time_s:
            _, end_s, latest_s = coming.pop()
            heappush(waiting, (latest_s, end_s))
        while waiting and waiting[0][1] <= time_s:
            heappop(waiting)
        yield time_s, waiting[0][0] - time_s if waiting else 0.0


def _group(request: Request) -> str:
    return {True: IN_TIME, False: MISSED, None: OTHERS}[request.verdict.met]


def _title(request: Request) -> str:
    """What the picture says of a request; slices with the same words have the same colour."""
    met, cause = request.verdict
    if met:
        return "in time"
    if cause is None:
        return "under way"
    return f"missed: {cause}" if met is False else str(cause)


def _args(request: Request) -> Args:
    """What Perfetto shows of a request that is clicked on."""
    arrival, ready, end, leave = request.arrival, request.ready, request.end, request.leave
    reason = end.reason if isinstance(end, Fail) else None if leave is None or leave.reason is UNSET else leave.reason
    return {
        "rid": request.rid,
        "bootstrap_room": None if arrival.bootstrap_room is None else hex(arrival.bootstrap_room),
        "slo_class": arrival.slo_class,
        "prompt_tokens": arrival.prompt_tokens,
        "new_tokens": None if ready is None else ready.new_tokens,
        "cached_tokens": None if ready is None else ready.cached_tokens,
        "ttft_slo_s": arrival.ttft_slo_s,
        "deadline_s": arrival.deadline_s,
        "met": request.verdict.met,
        "cause": None if request.verdict.cause is None else str(request.verdict.cause),
        "late_s": rounded(request.late_s),
        "alone_s": None if ready is None else ready.predicted_s,
        "others_s": rounded(request.others_s),
        "steps_s": rounded(request.steps_s),
        "overrun_s": rounded(request.course.overrun_s),
        "tasks": ", ".join(str(task.start.task) for task in request.tasks) or None,
        "suspensions": request.suspensions,
        "end": None if end is None else end.kind,
        "http_status": end.http_status if isinstance(end, Fail) else None,
        "reason": reason,
    }


def _latest_start_s(request: Request) -> float:
    """When it has to run to be in time; its deadline where no prediction is known."""
    return request.arrival.deadline_s - (request.course.alone_s or 0.0)


def _spans(requests: Iterable[Request | DecodedRequest], what: str) -> list[tuple[float, float]]:
    return [(part.begin_s, part.end_s) for request in requests for part in request.parts if part.what == what]


def _does(request: Request | DecodedRequest, what: str) -> bool:
    return any(part.what == what for part in request.parts)


def _name(task: Task) -> str:
    """A task by the request that it was started for."""
    first, *others = task.start.rids
    return f"{first} and {len(others)} more" if others else first


def _joined(rids: Sequence[str]) -> str:
    return ", ".join(rids)


def _present(flow: int | None) -> Sequence[int]:
    return () if flow is None else (flow,)
