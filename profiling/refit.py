"""What a server and the process that refits its TTFT model (``profiling.refit_process``) say to each other."""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sgl_flowprefill.profiling.learned import Learned
    from sgl_flowprefill.ttft.learning import Refit

LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class Question:
    """Is there a better model?"""

    known: Learned
    """What has been learned so far."""
    path: Path | None
    """Where to keep what is learned."""


@dataclass(frozen=True)
class Answer:
    """What came of a question."""

    refit: Refit | None
    """None without rows that the model in use has not seen, or where ``error`` says why there is none."""
    known: Learned
    """What is known now: with the model that is in use from now on."""
    error: str | None
    """Why nothing could be fitted or kept."""


def answer(question: Question) -> Answer:
    """Refit, judge, and keep the result."""
    from sgl_flowprefill.profiling.learned import write_learned
    from sgl_flowprefill.ttft.learning import refit

    known, found, problem = question.known, None, None
    try:
        found = refit(known.rows, known.fitted.model, known.history.trained_through)
    except Exception as error:  # whatever a library raises on odd rows, serving goes on with the model that it has
        problem = f"no model could be fitted ({type(error).__name__}: {error})"
    if found is not None:
        history = known.history.model_copy(
            update={
                "refits": known.history.refits + 1,
                "adopted": known.history.adopted + found.is_better,
                "trained_through": found.trained_through if found.is_better else known.history.trained_through,
                "refit_at": known.history.tasks,
                "judged": found.judged,
                "champion_error": found.champion_error,
                "challenger_error": found.challenger_error,
                "was_adopted": found.is_better,
                "slowness": found.slowness,
            }
        )
        update = {"history": history, "fitted": found.challenger if found.is_better else known.fitted}
        known = known.model_copy(update=update)
        try:
            if question.path is not None:
                write_learned(question.path, known)
        except OSError as error:
            problem = f"{question.path} cannot be written ({error.strerror or error})"
    return Answer(found, known, problem)


def write_frame(stream: IO[bytes], message: Any) -> None:
    """Send ``message``. Raises OSError where nobody reads."""
    body = pickle.dumps(message)
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """The next message; None at the end, or where the sender has ended in the middle of one."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    return pickle.loads(body) if len(body) == LENGTH.unpack(head)[0] else None
