"""Events of an imagined server, for what reads them."""

from __future__ import annotations

from sgl_flowprefill.events import Arrival, Complete, Start, Suspend


def arrival(t_s: float, rid: str, deadline_s: float, tokens: int = 1000, room: int | None = None) -> Arrival:
    received_s = t_s - 0.01
    return Arrival(t_s, rid, tokens, deadline_s - received_s, deadline_s, received_s, bootstrap_room=room)


def start(t_s: float, task: int, *rids: str, predicted_s: float = 1.0) -> Start:
    return Start(t_s, task, list(rids), 1000, 0, predicted_s)


def suspend(t_s: float, task: int, rid: str, *winners: str, readable_s: float | None) -> Suspend:
    blocking_s = None if readable_s is None else t_s - readable_s
    return Suspend(t_s, task, [rid], 7, list(winners), readable_s, t_s - 0.005, blocking_s, "layers.3.self_attn", 2)


def complete(t_s: float, task: int, *rids: str, forward_s: float = 1.0) -> Complete:
    return Complete(t_s, task, list(rids), 9, forward_s, 1.0, 1.0, 1.0)
