"""What processes of ranks (``tests.ranks``) note of what happens in them, for the test to compare."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from zlib import crc32

from sgl_flowprefill.hub.task import STEP

ALONE = "alone"
OFFER_TASKS = 1


def notes_path(event_log: str | Path, what: str, rank: int) -> Path:
    """Where ``rank`` notes ``what`` happens: beside the event log."""
    return Path(event_log).with_name(f"{what}-{rank}.jsonl")


def noting(what: str, rank: int) -> TextIO:
    """Where the process of ``rank``, this one, writes lines of ``what`` happens, for as long as it lives."""
    return open(notes_path(os.environ["FLOWPREFILL_EVENT_LOG"], what, rank), "w", buffering=1)


def offer_models(scheduler: Any, rank: int) -> None:
    """Let the ranks learn from a made-up profile. When OFFER_TASKS have started and one is suspended, the learner of
    rank 0 has a better model: one that says more than the last. Each rank writes a line for each
    adoption: the tasks that had started by then, where live ones were, and what it predicts from then on.
    """
    from sgl_flowprefill.profiling import Profile, Row, make_design
    from sgl_flowprefill.profiling.fitted import fit
    from sgl_flowprefill.profiling.learned import begin
    from sgl_flowprefill.profiling.refit import Answer
    from sgl_flowprefill.runtime.learner import FollowingTTFT, Learner, LearningTTFT
    from sgl_flowprefill.runtime.profile import current_setting
    from sgl_flowprefill.ttft import PrefillShape

    rows = [Row(shape, 1e-4 * sum(map(sum, shape)), 0.0, 1, 0.0) for shape in make_design(4096)]
    profile = Profile(current_setting(scheduler), 4096, rows, complete=True)
    known = begin(profile, fit(profile))
    hub, broadcast = scheduler.hub, scheduler.tp_group.broadcast_object
    tasks = hub.work.tasks

    class Offering(Learner):
        """Answers what nobody has asked."""

        offered = offers = 0

        def ask(self, question: Any) -> None:
            pass

        def take(self) -> Answer | None:
            if tasks.started < OFFER_TASKS * (self.offered + 1) or not any(t.operators_passed for t in tasks.live):
                return None
            self.offered, self.offers = tasks.started // OFFER_TASKS, self.offers + 1
            model = known.fitted.model
            physics = replace(model.physics, weights=model.physics.weights * (2 + self.offers))
            fitted = replace(known.fitted, model=replace(model, physics=physics))
            refit: Any = SimpleNamespace(is_better=True)
            return Answer(refit, known.model_copy(update={"fitted": fitted}), None)

    ttft: Any = (
        FollowingTTFT(known, 0.75, broadcast) if rank else LearningTTFT(known, 0.75, Offering(None, set()), broadcast)
    )
    hub.work.ttft = hub.learning = ttft
    notes = noting("adoptions", rank)
    adopt = ttft.adopt

    def noted_adopt() -> None:
        adopt()
        note = {
            "started": tasks.started,
            "live": [(task.id, task.operators_passed) for task in tasks.live],
            "finishing": [task.id for task in tasks.finishing],
            "predicts_s": ttft.model.predict_s([PrefillShape(1000)]),
        }
        notes.write(json.dumps(note) + "\n")

    ttft.adopt = noted_adopt


def explore_often(scheduler: Any, rank: int) -> None:
    """Let the ranks explore whenever nothing can run. Each writes a line for each batch that nobody asked for, when it
    has been freed: its prompts, the interruption points that this rank has passed, KV cache and rows that are free and
    tokens in the radix cache, and the shapes that ran to their ends or were given up before.
    """
    from sgl_flowprefill.hub import loop as hub_module
    from sgl_flowprefill.runtime.exploration import Explorer
    from tests.exploring import ShortPrompts, held
    from tests.unit.test_ttft_learning import FITTED, PROFILE, LearnsAtOnce

    hub_module.IDLE_CHECK_S = 0.02  # type: ignore[misc]
    hub, engine = scheduler.hub, ShortPrompts(scheduler.role)
    free = engine.free
    notes = noting("explored", rank)
    explorer = hub.exploration = Explorer(
        engine,
        hub.executor,
        hub.slots,
        hub.device,
        None if rank else LearnsAtOnce(False, FITTED, PROFILE),
        hub.recorder,
        hub.agreement,
        hub.has_news,
        share=0.5,
        quiet_s=0.0,
        rest_s=0.0,
    )

    def noted_free(batch: Any, keep: bool = False) -> None:
        free(batch, keep)
        state = explorer.state()
        note = {
            "prompts": [crc32(repr(list(req.origin_input_ids)).encode()) for req in batch.reqs],
            "points": hub.executor.points_passed,
            "held": held(SimpleNamespace(scheduler=scheduler))[:4],  # type: ignore[arg-type]
            "explored": state["explored"],
            "given_up": state["given_up"],
        }
        notes.write(json.dumps(note) + "\n")

    engine.free = noted_free  # type: ignore[method-assign]


def note_matches(scheduler: Any, rank: int) -> None:
    """Write a line for each prompt that is matched with the radix cache, with whether its request was about to start,
    and for each batch that is started. Requests that only wait are not matched again, and nothing starts beside a task
    of requests that begin with ALONE.
    """
    from sgl_flowprefill.hub import loop as hub_module

    hub_module.MATCHES = 0  # type: ignore[misc]
    hub, role = scheduler.hub, scheduler.role
    match, make_batch, choose = role.match, role.make_batch, hub.choose
    notes = noting("matches", rank)
    choosing = False

    def noted_choose() -> Any:
        nonlocal choosing
        choosing = True
        choice = choose()
        choosing = False
        return choice

    def noted_match(req: Any) -> Any:
        notes.write(json.dumps({"match": req.rid, "about to start": choosing}) + "\n")
        return match(req)

    def noted_make_batch(reqs: Any) -> Any:
        notes.write(json.dumps({"start": [req.rid for req in reqs]}) + "\n")
        return make_batch(reqs)

    hub.choose, role.match, role.make_batch = noted_choose, noted_match, noted_make_batch
    policy = hub.work.policy
    pick = policy.pick

    def pick_alone(now_s: float, running: Any, admit: bool = True) -> Any:
        is_alone = any(rid.startswith(ALONE) for job in policy.started for rid in job.item.rids)
        return pick(now_s, running, admit and not is_alone)

    policy.pick = pick_alone


def note_finishes(scheduler: Any, rank: int) -> None:
    """Write a line for each task and each decode step whose result is processed: its requests, the preemption
    checkpoints that live tasks have passed by then, whether the result had arrived, whether that had to be waited for,
    and operators queued behind it.
    """
    role, device = scheduler.role, scheduler.hub.device
    finish, wait = role.finish, device.wait
    notes = noting("finishes", rank)
    waited_for = None

    def noted_wait(event: Any, interrupted: Any) -> bool:
        nonlocal waited_for
        if not event.query():
            waited_for = event
        return bool(wait(event, interrupted))

    def note(done: Any, reqs: Any) -> None:
        copy_done = done.result.copy_done
        line = {
            "step": done.id == STEP,
            "rids": [req.rid for req in reqs],
            "live": [(live.id, live.operators_passed) for live in scheduler.hub.work.tasks.live],
            "arrived": copy_done.place <= device.passed,
            "waited": waited_for is copy_done,
            "behind": device.recorded - copy_done.place - 1,
        }
        notes.write(json.dumps(line) + "\n")

    def noted_finish(task: Any) -> None:
        note(task, task.reqs)
        finish(task)

    role.finish, device.wait = noted_finish, noted_wait
    if hasattr(role, "finish_step"):
        finish_step = role.finish_step

        def noted_finish_step(step: Any) -> None:
            note(step, step.batch.reqs)
            finish_step(step)

        role.finish_step = noted_finish_step
