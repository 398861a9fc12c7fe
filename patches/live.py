"""What a server does now, on its own port: ``/flowprefill`` and what belongs to it.

Targets: ``_setup_and_run_http_server`` of ``sglang.srt.entrypoints.http_server``, before which the routes are put into
SGLang's app; ``launch_server`` there, after which the timeline is written; and
``sglang.srt.utils.auth.decide_request_auth``, which asks for the API key at every route. The page is a file without any
data and asks for the key itself: a browser shows none when it opens a page.

The scheduler is asked by SGLang's request for its internal state, which ``/server_info`` sends as well: it is read at a
preemption checkpoint, and a prefill that runs goes on behind the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import EventLogError
from sgl_flowprefill.live import PAGE
from sgl_flowprefill.live.ask import KEY, Ask
from sgl_flowprefill.live.feed import SchedulerFeed
from sgl_flowprefill.live.routes import routes
from sgl_flowprefill.live.state import Answer, decode_answer
from sgl_flowprefill.patches.base import expect, resolve
from sgl_flowprefill.patches.http_server import APP, RUN, is_ending, tokenizer_manager
from sgl_flowprefill.timeline import write_timeline

logger = logging.getLogger(__name__)

SEAM: Final = "live"
LAUNCH: Final = "sglang.srt.entrypoints.http_server.launch_server"
REQUEST: Final = "sglang.srt.managers.io_struct.GetInternalStateReq"
DECIDE: Final = "sglang.srt.utils.auth.decide_request_auth"
ALLOWED: Final = "sglang.srt.utils.auth.AuthDecision"


def apply(config: FlowPrefillConfig) -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    if config.recent_events:
        HookRegistry.register(RUN, _with_routes, HookType.AROUND)
        HookRegistry.register(DECIDE, _let_the_page_through, HookType.AROUND)
    if config.timeline is not None and config.events_file is not None:
        HookRegistry.register(LAUNCH, writing_timeline(config), HookType.AROUND)


def writing_timeline(config: FlowPrefillConfig) -> Callable[..., Any]:
    """The hook of a server that writes its timeline when it has ended. A launcher's servers leave that to it."""
    log, file = Path(config.events_file or ""), Path(config.timeline or "")

    def with_timeline(launch_server: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
        if server_args.disaggregation_mode == "decode" or server_args.node_rank > 0:  # the first node writes the events
            return launch_server(server_args, *args, **kwargs)
        if config.event_log is None:
            log.unlink(missing_ok=True)  # of another run
        try:
            return launch_server(server_args, *args, **kwargs)
        finally:
            if log.exists():
                _write_timeline(log, file)

    return with_timeline


def _write_timeline(log: Path, file: Path) -> None:
    try:
        write_timeline([log], file)
    except (OSError, EventLogError) as error:
        logger.error("FlowPrefill: no timeline in %s: %s; its events are in %s", file, error, log)
    else:
        logger.info("FlowPrefill: a timeline is in %s: open it at https://ui.perfetto.dev", file)


def _with_routes(run_http_server: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    if server_args.disaggregation_mode != "decode":
        name = "prefill" if server_args.disaggregation_mode == "prefill" else "unified"

        @cache
        def feed() -> SchedulerFeed:
            """Made at the first request, in the server's event loop."""
            return SchedulerFeed(name, ask, is_ending=partial(is_ending, SEAM))

        resolve(SEAM, APP).router.routes[:0] = routes(feed)
    return run_http_server(server_args, *args, **kwargs)


async def ask(question: Ask) -> Answer:
    """The scheduler's answer."""
    manager = tokenizer_manager(SEAM)
    manager.auto_create_handle_loop()
    outputs = await manager.get_internal_state_communicator(resolve(SEAM, REQUEST)(rid=question.as_rid()))
    answers = [decode_answer(output.internal_state[KEY]) for output in outputs]
    # With data-parallel attention all ranks answer, and the one that decides knows something.
    return max(answers, key=lambda answer: (answer.state is not None, answer.written))


def _let_the_page_through(decide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("path") == PAGE:
        return resolve(SEAM, ALLOWED)(allowed=True)
    return decide(*args, **kwargs)
