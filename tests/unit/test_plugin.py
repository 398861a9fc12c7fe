"""Which seams a process takes that another one has started: by what SGLang says that it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.config import ENV_SWITCH
from sgl_flowprefill.model import embedded_model_path
from tests import warm


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The policy file of what is started, with FlowPrefill."""
    path = tmp_path / "policy.yaml"
    path.write_text("classes: {interactive: {ttft_s: 0.75}}")
    monkeypatch.setenv(ENV_SWITCH, "1")
    monkeypatch.setenv("FLOWPREFILL_SLO_POLICY", str(path))
    return path


def started_as(role: str) -> tuple[list[bool], int]:
    """Whether two targets in the HTTP server have hooks, before and after a process has said that this is its role; and
    the chunks of a server that it would start.
    """
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    def hooked() -> list[bool]:
        targets = (TokenizerManager.generate_request, http_server._setup_and_run_http_server)
        return [hasattr(target, "__wrapped__") for target in targets]

    load_plugins()
    server_args = ServerArgs(model_path=str(embedded_model_path()), chunked_prefill_size=4096)
    server_args.resolve_once()
    before = hooked()
    runtime_context.publish(server_args, role=role)
    return [*before, *hooked()], int(resolving_view(server_args).chunked_prefill_size)


@pytest.mark.parametrize(("role", "serves"), [("tokenizer", True), ("detokenizer", False)])
def test_a_process_that_another_one_has_started_serves_http_where_sglang_says_so(
    role: str, serves: bool, policy: Path
) -> None:
    hooked, chunk_tokens = warm.call(started_as, role)
    assert hooked == [False, False, serves, serves]
    assert chunk_tokens == -1, "the options of a server that it starts are not FlowPrefill's"


def ended_without(policy: Path) -> str:
    """What a process says whose policy has been damaged since it has loaded plugins."""
    from sglang.srt import runtime_context
    from sglang.srt.entrypoints import http_server  # noqa: F401 - what tells the plugin that this process may serve
    from sglang.srt.plugins import load_plugins

    load_plugins()
    policy.write_text("classes: []")
    with pytest.raises(SystemExit) as end:
        runtime_context.publish(None, role="tokenizer")
    return str(end.value)


def test_it_ends_with_one_line_where_its_policy_cannot_be_read(policy: Path) -> None:
    [line] = warm.call(ended_without, policy).splitlines()
    assert line.startswith(f"sgl-flowprefill: --flowprefill-slo-policy: {policy}")
