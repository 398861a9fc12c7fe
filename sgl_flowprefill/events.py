"""The event log: every scheduling event as a JSON line, for figures that are computed and not asserted.

An event is an object of one of the types below; its line has the type's tag as ``event``. Times are seconds of
``time.monotonic()``, which all processes of one machine share and which goes on whatever the wall clock is set to.

Every arrival has one end: its rid is in one ``complete`` (its prefill has run), ``abort`` or ``fail``. What becomes of
a request after ``complete``, while its KV is sent or its tokens come, is not logged. SGLang's health checks have no
arrival.

``python -m sgl_flowprefill.events`` prints the table of docs/operations.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any, Final, ParamSpec, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

logger = logging.getLogger(__name__)

OPTION: Final = "--flowprefill-event-log"


class Event(Struct, tag_field="event", omit_defaults=True):
    """Something that happened at ``t_s``; written to the microsecond."""

    t_s: float

    def __post_init__(self) -> None:
        self.t_s = round(self.t_s, 6)

    @property
    def kind(self) -> str:
        """The tag: what its line has as ``event``."""
        return str(self.__struct_config__.tag)


class Arrival(Event, tag="arrival"):
    """a request has arrived at the scheduler"""

    rid: str
    prompt_tokens: int
    ttft_slo_s: float
    deadline_s: float
    received_s: Annotated[float, Meta(description="when the HTTP server's process had it")]


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
    """a task is unwound, because streams need its KV cache; its requests wait again"""

    task: int
    rids: list[str]
    checkpoint: int


class Step(Event, tag="step"):
    """a decode step is over: every stream has its next token"""

    streams: int
    begin_s: float
    due_s: Annotated[
        float | None,
        Meta(description="when it had to begin, with what it was predicted to take; null where it began before"),
    ]


Fields = ParamSpec("Fields")
AnyEvent = Arrival | Start | Suspend | Resume | Complete | Abort | Fail | GiveBack | Step


class EventLogError(ValueError):
    """A file is no event log; the message names the file, the line and the remedy."""


class EventLog:
    """Appends events to a file, or drops them when there is none. Lines reach the file at ``flush`` at the latest. A
    file that cannot be written any more, such as on a full disk, is given up: serving goes on.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._file: IO[bytes] | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=1 << 16)  # noqa: SIM115 - lives as long as the process

    @property
    def is_written(self) -> bool:
        """Whether events go anywhere."""
        return self._file is not None

    def write(self, kind: Callable[Fields, AnyEvent], *args: Fields.args, **kwargs: Fields.kwargs) -> None:
        """Append an event of this kind; where there is no file, none is made."""
        if self._file is not None:
            try:
                self._file.write(_line(kind(*args, **kwargs)))
            except OSError as error:
                self._give_up(self._file, error)

    def flush(self) -> None:
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(self._file, error)

    def _give_up(self, file: IO[bytes], error: OSError) -> None:
        self._file = None
        logger.error("No more events are written to %s: %s", file.name, error)
        with suppress(OSError):
            file.close()


def read_events(path: str | Path) -> Iterator[AnyEvent]:
    """Events of a log, in order. A last line that was cut off by a killed process is left out. Raises EventLogError
    for a line that is no event, OSError.
    """
    decode = msgspec.json.Decoder(AnyEvent).decode
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                try:
                    yield decode(line)
                except msgspec.DecodeError as error:
                    raise EventLogError(
                        f"{path} is no event log: line {number}: {error}; name the file of {OPTION}"
                    ) from None


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
