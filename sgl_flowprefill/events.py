"""The event log: every scheduling event as a JSON line, for figures that are computed and not asserted.

An event is an object of one of the types below; its line has the type's tag as ``event``. Times are seconds of
``time.monotonic()``, which all processes of one machine share and which goes on whatever the wall clock is set to. The
first line, and one wherever the server was started again, says what server it is (``log``).

Every arrival has one end: its rid is in one ``complete`` (its prefill has run), ``abort`` or ``fail``. After a
``complete`` it has one ``leave``, when its KV cache has been sent or its answer is over. A decode server has a log of
its own, with one ``decoded`` for each request. SGLang's health checks have neither arrival nor ``leave`` nor
``decoded``.

``python -m sgl_flowprefill.events`` prints the table of docs/operations.md.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any, Final, ParamSpec, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from sgl_flowprefill import __version__

logger = logging.getLogger(__name__)

OPTION: Final = "--flowprefill-event-log"
LINE_BEGIN: Final = b'{"event":"'
LONGEST_LINE_BYTES: Final = 1 << 20
"""How far back from its end a log is searched for its last whole line."""
BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
"""Another one on each machine, and after each of its starts; the same in all containers of a machine."""


def rounded(time_s: float | None) -> float | None:
    """``time_s`` as it is written: to the microsecond."""
    return None if time_s is None else round(time_s, 6)


class Event(Struct, tag_field="event", omit_defaults=True):
    """Something that happened at ``t_s``; written to the microsecond."""

    t_s: float

    def __post_init__(self) -> None:
        self.t_s = round(self.t_s, 6)

    @property
    def kind(self) -> str:
        """The tag: what its line has as ``event``."""
        return str(self.__struct_config__.tag)


class Log(Event, tag="log"):
    """a server begins to write: the first line of its log, and of what it gives of it over HTTP"""

    version: Annotated[str, Meta(description="of FlowPrefill")]
    decodes: Annotated[bool, Meta(description="whether the server decodes")]
    prefills: Annotated[
        bool, Meta(description="false on a decode server, which writes `decoded` only; else absent")
    ] = True
    boot: Annotated[
        str, Meta(description="of the machine, since its last start: times of another one are by another clock")
    ] = ""


class Arrival(Event, tag="arrival"):
    """a request has arrived at the scheduler"""

    rid: str
    prompt_tokens: int
    ttft_slo_s: float
    deadline_s: float
    received_s: Annotated[float, Meta(description="when the HTTP server's process had it")]
    slo_class: Annotated[str, Meta(description="absent for `default`")] = "default"
    slo_source: Annotated[str, Meta(description="where `ttft_slo_s` came from; absent for `default`")] = "default"
    bootstrap_room: Annotated[
        int | None,
        Meta(description="by which its decode server knows it, and SGLang's traces; absent on a server that decodes"),
    ] = None


class Ready(Event, tag="ready"):
    """a request that has arrived can be run: its decode server has reserved KV cache for it. On a server that decodes,
    at once; again when its task was given back
    """

    rid: str
    readable_s: Annotated[float, Meta(description="when the scheduler process could first have read so")]
    new_tokens: int
    cached_tokens: int
    predicted_s: Annotated[float, Meta(description="by itself, with margin")]


class Start(Event, tag="start"):
    """a prefill of one request or of several, a task, runs for the first time"""

    task: int
    rids: list[str]
    new_tokens: int
    cached_tokens: int
    predicted_s: float


class Suspend(Event, tag="suspend"):
    """a running task waits for another. `readable_s` and `blocking_s` are null for a switch that no news led to: nobody
    was blocked, and it counts as no preemption
    """

    task: int
    rids: list[str]
    checkpoint: Annotated[int, Meta(description="modules passed")]
    for_rids: Annotated[list[str], Meta(description="who wins")]
    readable_s: Annotated[
        float | None, Meta(description="when the scheduler process could first have read that the winner can be run")
    ]
    stopped_s: Annotated[
        float,
        Meta(
            description="until then the task ran on; after it the scheduler read what had arrived, picked, and "
            "admitted the winner"
        ),
    ]
    blocking_s: Annotated[
        float | None, Meta(description="from `readable_s` to the winner's start: the paper's blocking time")
    ]
    after: Annotated[
        str, Meta(description="the module that its last preemption checkpoint follows; absent before the first")
    ] = ""
    tiles: Annotated[int, Meta(description="of what comes next, that have run; absent for none")] = 0


class Points(Event, tag="points"):
    """a task that runs has passed interruption points, since its start, its last `resume` or its last `points`. With
    `--flowprefill-event-points true`, and in the file only
    """

    task: int
    after: Annotated[
        list[str], Meta(description="the module that each follows; empty for a tile of the module that is named next")
    ]
    passed_s: Annotated[
        list[float], Meta(description="when; on a GPU, its operators are queued by then, and run a little later")
    ]


class Resume(Event, tag="resume"):
    """a suspended task runs again"""

    task: int
    rids: list[str]
    checkpoint: int


class Complete(Event, tag="complete"):
    """the prefill has run"""

    task: int
    rids: list[str]
    checkpoint: int
    forward_s: Annotated[float, Meta(description="time it executed, without the time it was suspended")]
    predicted_s: Annotated[float, Meta(description="with margin, at its start")]
    expected_s: Annotated[float, Meta(description="without, as corrected by now")]
    profiled_s: Annotated[float, Meta(description="without online correction either")]


class Leave(Event, tag="leave"):
    """the server is done with a request whose prefill has run: its KV cache has reached the decode server, or, on a
    server that decodes, its answer is over
    """

    rid: str
    reason: Annotated[str | UnsetType, Meta(description="what went wrong; absent where nothing did")] = UNSET
    aborted: Annotated[
        bool, Meta(description="true where it went wrong because somebody asked for that; else absent")
    ] = False


class Abort(Event, tag="abort"):
    """somebody asked for it: a client that has gone, `/abort_request`, a timeout. `task` and `checkpoint` are absent
    when no task was running the request
    """

    rids: list[str]
    task: int | UnsetType = UNSET
    checkpoint: int | UnsetType = UNSET


class Fail(Event, tag="fail"):
    """refused at the door (a prompt that is too long), lost on the way (a failed bootstrap, a decode server that has
    gone, a grammar that does not compile), or a forward pass that raised. `task` and `checkpoint` are absent when no
    task was running the request
    """

    rids: list[str]
    http_status: int | None
    reason: str
    task: int | UnsetType = UNSET
    checkpoint: int | UnsetType = UNSET


class GiveBack(Event, tag="give_back"):
    """a task is unwound, because streams need its KV cache or its device memory; its requests wait again"""

    task: int
    rids: list[str]
    checkpoint: int


class Shed(Event, tag="shed"):
    """a request that may be refused is about to be, as there is no time for it: a `fail` with status 429 follows"""

    rid: str
    predicted_s: Annotated[float, Meta(description="by itself, with margin")]
    backlog_s: Annotated[float, Meta(description="predicted prefills that are waiting or under way, without it")]
    retry_after_s: int


class Step(Event, tag="step"):
    """a decode step is over: every stream has its next token; on a GPU, from `begin_s` on it waits for the operators
    that are queued before it
    """

    streams: int
    begin_s: float
    due_s: Annotated[
        float | None,
        Meta(description="when it had to begin, with what it was predicted to take; null where it began before"),
    ]


class Decoded(Event, tag="decoded"):
    """a decode server is done with a request: the only event of it. Times of what did not happen are absent, and those
    of a retracted request that SGLang has replaced by later ones
    """

    rid: str
    bootstrap_room: Annotated[int | None, Meta(description="by which an `arrival` at a prefill server is the same one")]
    received_s: Annotated[
        float,
        Meta(description="when the HTTP server's process had it; on another node than that, when the scheduler had"),
    ]
    queued_s: Annotated[float | None, Meta(description="since when it waited for a place")] = None
    place_s: Annotated[float | None, Meta(description="when it had KV cache here, and its prefill could start")] = None
    kv_s: Annotated[float | None, Meta(description="when its KV cache had come")] = None
    first_token_s: Annotated[float | None, Meta(description="when the first token went on its way to the client")] = (
        None
    )
    tokens: Annotated[int, Meta(description="of its answer; absent for none")] = 0
    retractions: Annotated[int, Meta(description="how often it had to make room for others; absent for never")] = 0
    reason: Annotated[str | None, Meta(description="what went wrong; absent where nothing did")] = None


Fields = ParamSpec("Fields")
AnyEvent = (
    Log
    | Arrival
    | Ready
    | Start
    | Suspend
    | Points
    | Resume
    | Complete
    | Leave
    | Abort
    | Fail
    | Shed
    | GiveBack
    | Step
    | Decoded
)


class RecentEvents:
    """The last lines of an event log, in memory: as bytes, which Python's garbage collector does not look at."""

    def __init__(self, most: int) -> None:
        """``most``: lines that are kept at a time, at least 1."""
        self._lines: list[bytes] = [b""] * most
        self.head = b""
        """The first line of the log, which is kept beside the last ones and has no number."""
        self.written = 0
        """Lines so far: the number of the next one."""

    def add(self, line: bytes) -> None:
        self._lines[self.written % len(self._lines)] = line
        self.written += 1

    def since(self, number: int, most: int) -> tuple[int, int, bytes]:
        """The lines from ``number`` on, ``most`` of them at most: the numbers of the first and of the line that follows
        the last, and the lines. Where those from ``number`` on are not kept any more, they begin with the oldest kept;
        a ``number`` that no line has had yet, such as one of a server that was started again, stands for 0.
        """
        kept = len(self._lines)
        begin = max(0 if number > self.written else number, self.written - kept)
        end = min(begin + most, self.written)
        return begin, end, b"".join([self._lines[at % kept] for at in range(begin, end)])


class EventLogError(ValueError):
    """A file is no event log; the message names the file, the line and the remedy."""


class EventLog:
    """Appends events to a file, keeps the last ones in memory, and hands them to listeners, or drops them where nobody
    hears of them. ``points``, of which there are many with long lines, are not kept. Lines reach the file at ``flush``
    at the latest. A file that cannot be written any more, such as on a full disk, is given up: serving goes on. A last
    line that an earlier process left unfinished is removed.
    """

    def __init__(self, path: str | Path | None, recent: RecentEvents | None = None) -> None:
        """``recent``: where the last events are kept."""
        self.recent = recent
        self._listeners: list[Callable[[AnyEvent], object]] = []
        self._file: IO[bytes] | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _remove_cut_line(Path(path))
            self._file = open(path, "ab", buffering=1 << 16)  # noqa: SIM115 - lives as long as the process

    @property
    def is_written(self) -> bool:
        """Whether events go anywhere."""
        return self._file is not None or self.recent is not None or bool(self._listeners)

    def listen(self, listener: Callable[[AnyEvent], object]) -> None:
        """``listener(event)`` is called for each event from now on."""
        self._listeners.append(listener)

    def begin(self, decodes: bool, prefills: bool = True) -> None:
        """Say in the first line what server writes the log: whether it ``decodes``, and whether it ``prefills``."""
        line = _line(Log(time.monotonic(), __version__, decodes, prefills, _boot()))
        if self.recent is not None:
            self.recent.head = line
        self._append(line)

    def write(self, kind: Callable[Fields, AnyEvent], *args: Fields.args, **kwargs: Fields.kwargs) -> None:
        """Append an event of this kind; where nobody hears of it, none is made."""
        if not self.is_written:
            return
        event = kind(*args, **kwargs)
        for listener in self._listeners:
            listener(event)
        if self._file is None and self.recent is None:
            return
        line = _line(event)
        if self.recent is not None and not isinstance(event, Points):
            self.recent.add(line)
        self._append(line)

    def flush(self) -> None:
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(self._file, error)

    def _append(self, line: bytes) -> None:
        if self._file is not None:
            try:
                self._file.write(line)
            except OSError as error:
                self._give_up(self._file, error)

    def _give_up(self, file: IO[bytes], error: OSError) -> None:
        self._file = None
        logger.error("No more events are written to %s: %s", file.name, error)
        with suppress(OSError):
            file.close()


def of_decode_server(path: Path) -> Path:
    """Where a decode server writes its log that is to write it to ``path``: its prefill server may be told the same, so
    that the name of the file gets ``-decode``, unless it has that word. A device is what it is.
    """
    if "decode" in path.stem or (path.exists() and not path.is_file()):
        return path
    return path.with_stem(f"{path.stem}-decode")


def _boot() -> str:
    with suppress(OSError):
        return BOOT.read_text().strip()
    return ""


def _remove_cut_line(path: Path) -> None:
    """Cut the log at ``path`` back to its last whole line: the next one would be glued to what a killed process or a
    full disk has left of a line. What no line of an event log begins with stays.
    """
    if not path.is_file():  # there is none yet, or it is a device
        return
    with open(path, "r+b") as file:
        # Another rank may cut the same line, and append its own behind what is left.
        with suppress(OSError):  # not all file systems have locks
            fcntl.flock(file, fcntl.LOCK_EX)
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - LONGEST_LINE_BYTES))
        cut = file.read().rpartition(b"\n")[2]
        if cut and LINE_BEGIN.startswith(cut[: len(LINE_BEGIN)]):
            file.truncate(size_bytes - len(cut))


def read_events(path: str | Path) -> Iterator[AnyEvent]:
    """Events of a log or of a piece of one, in order. A last line that was cut off by a killed process is left out, and
    a first one of which the beginning is missing. Raises EventLogError for a line that is no event, OSError.
    """
    decode = _decoder.decode
    cut: EventLogError | None = None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                try:
                    event = decode(line)
                except msgspec.DecodeError as error:
                    wrong = EventLogError(f"{path} is no event log: line {number}: {error}; name the file of {OPTION}")
                    if number > 1 or (line.startswith(b"{") and isinstance(error, msgspec.ValidationError)):
                        raise wrong from None
                    cut = wrong  # no whole line: the end of one, if others follow
                else:
                    cut = None
                    yield event
    if cut is not None:
        raise cut


def table() -> str:
    """Every kind of event, its fields, and when it is written, as the table of docs/operations.md."""
    rows = ["| `event` | fields, after `t_s` | |", "| --- | --- | --- |"]
    for kind in get_args(AnyEvent):
        hints = get_type_hints(kind, include_extras=True)
        fields = ", ".join(f"`{name}`{_note(hints[name])}" for name in kind.__struct_fields__ if name != "t_s")
        rows.append(f"| `{kind.__struct_config__.tag}` | {fields} | {' '.join(kind.__doc__.split())} |")
    return "\n".join(rows)


def _note(hint: Any) -> str:
    notes = [item.description for item in getattr(hint, "__metadata__", ()) if isinstance(item, Meta)]
    return f" ({notes[0]})" if notes else ""


def _plain(value: Any) -> Any:
    """What JSON has for a scalar of numpy."""
    return value.item()


def decode_events(lines: bytes) -> list[AnyEvent]:
    """Events of whole lines of an event log, in order. Raises msgspec.DecodeError for a line that is no event."""
    return _decoder.decode_lines(lines)


_decoder: Final[msgspec.json.Decoder[AnyEvent]] = msgspec.json.Decoder(AnyEvent)
_encode: Final = msgspec.json.Encoder(enc_hook=_plain).encode


def _line(event: AnyEvent) -> bytes:
    try:
        return _encode(event) + b"\n"
    except UnicodeEncodeError:  # a client's request id with half a character, which JSON allows
        whole = {name: _printable(value) for name, value in msgspec.to_builtins(event, enc_hook=_plain).items()}
        return _encode(whole) + b"\n"


def _printable(value: Any) -> Any:
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


if __name__ == "__main__":
    print(table())
