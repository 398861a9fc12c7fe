"""The SLO policy file: what may be in it, how a mistake is told, and when a running server reads it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path

import pytest

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.slo.policy import PolicyError, SloClass, SloPolicy, parse
from sgl_flowprefill.slo.policy_file import PolicyFile, read_policy
from tests.waiting import until

ROOT = Path(__file__).parents[2]
GOOD = "classes:\n  a: {ttft_s: 1}\n"
OTHER = "classes:\n  a: {ttft_s: 22}\n"


def test_the_example_is_a_policy_with_every_setting() -> None:
    policy = read_policy(ROOT / "examples" / "slo-policy.yaml")
    used = {name for one in policy.classes.values() for name in one.model_fields_set}
    assert used == set(SloClass.model_fields)
    assert policy.model_fields_set == set(SloPolicy.model_fields)


def test_the_page_names_every_setting() -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    settings = [*SloPolicy.model_fields, *SloClass.model_fields, "model", "min_prompt_tokens", "max_prompt_tokens"]
    assert [name for name in settings if f"`{name}`" not in page] == []


def test_an_objective_may_grow_with_the_prompt() -> None:
    grows = SloClass(base_s=0.5, per_1k_tokens_s=2)
    assert [grows.objective_s(tokens) for tokens in (0, 500, 4000)] == [0.5, 1.5, 8.5]
    assert SloClass(ttft_s=3).objective_s(4000) == 3
    assert SloClass().objective_s(4000) is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "classes: {}"])
def test_a_file_may_say_nothing(text: str) -> None:
    assert parse(text, "f").classes == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("classes:\n  a:\n    ttft_s: -1\n", "f:3: classes.a.ttft_s: input should be greater than 0, got -1"),
        ("classes:\n  a:\n    ttft_s: .inf\n", "f:3: classes.a.ttft_s: "),
        ("classes:\n  a:\n    ttft_s: 1\n    tfft_s: 2\n", "f:4: classes.a.tfft_s: extra inputs are not permitted"),
        ("class:\n  a: {}\n", "f:1: class: extra inputs are not permitted"),
        ("classes:\n  a:\n    ttft_s: 1\n    base_s: 2\n", "f:2: classes.a: a class has ttft_s or base_s, not both"),
        ("classes:\n  a: {per_1k_tokens_s: 1}\n", "f:2: classes.a: per_1k_tokens_s goes with base_s"),
        ("classes:\n  a: {tight_per_minute: 1}\n", "f:2: classes.a: tight_per_minute goes with"),
        ("classes:\n  a:\n    named_per_minute: 0\n", "f:3: classes.a.named_per_minute: input should be greater"),
        ("classes:\n  a: {ttft_s: 1, min_ttft_s: 2}\n", "f:2: classes.a: min_ttft_s may not be above"),
        ("classes:\n  a: {tbt_s: 1, min_tbt_s: 2}\n", "f:2: classes.a: min_tbt_s may not be above"),
        ("classes:\n  a: {}\n  b: {}\n  a: {}\n", "f:4: classes.a: is there twice"),
        ("classes:\n  two words: {}\n", "f:2: classes.two words: the name of a class"),
        (GOOD + "priorities:\n  10: b\n", "f:4: priorities.10: no class is called 'b'; there are a"),
        (GOOD + "priorities: {10: a, 0: a, 5: a}\n", "f:3: priorities: the numbers have to fall"),
        (GOOD + "priorities:\n  high: a\n", "f:4: priorities.high"),
        (GOOD + "service_tiers:\n  flex: b\n", "f:4: service_tiers.flex: no class is called 'b'"),
        (GOOD + "rules:\n  - class: a\n  - class: b\n", "f:5: rules.1.class: no class is called 'b'"),
        (GOOD + "rules:\n  - {class: a, max_prompt_tokens: -1}\n", "f:4: rules.0.max_prompt_tokens: "),
        ("classes: [\n", "f:2: no YAML: "),
        ("- 1\n", "f:1: input should be"),
        ("a: &x\n  - *x\n", "f:1: "),
        ("classes: " + 5000 * "[", "f:1: "),
        ("classes: !!timestamp soon\n", "f:1: no YAML"),
        ("classes: !!bool soon\n", "f:1: no YAML"),
    ],
)
def test_a_mistake_is_told_with_file_and_line(text: str, expected: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse(text, "f")
    assert expected in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(PolicyError, match=r"f:2: .*; f:3: "):
        parse("classes:\n  a: {ttft_s: 0}\n  b: {weight: -1}\n", "f")


def test_a_server_with_a_wrong_file_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("classes:\n  a: {ttft_s: 0}\n")
    with pytest.raises(ConfigError, match=rf"^--flowprefill-slo-policy {path}: {path}:2: classes.a.ttft_s"):
        FlowPrefillConfig.parse({"slo_policy": str(path)})
    with pytest.raises(ConfigError, match="cannot be read"):
        FlowPrefillConfig.parse({"slo_policy": str(tmp_path / "none.yaml")})
    path.write_text(GOOD + "priorities: {0: a}\n")
    assert FlowPrefillConfig.parse({"slo_policy": str(path)}).slo_policy == str(path)
    with pytest.raises(ConfigError, match="keep one of them"):
        FlowPrefillConfig.parse({"slo_policy": str(path), "priority_ttft_slo": "1:1"})


class Watched:
    """A file, and the policies that came of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.policies: list[SloPolicy] = []
        path.write_text(GOOD)
        self.file = PolicyFile(str(path), self.policies.append)

    def seconds(self) -> list[float | None]:
        return [policy.classes["a"].ttft_s for policy in self.policies]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "policy.yaml")


def test_a_change_counts_once_the_file_has_come_to_rest(watched: Watched) -> None:
    watched.file.look()
    assert watched.seconds() == [1]
    watched.path.write_text("classes:\n  a: {ttft_s: 333}\n")
    watched.file.look()
    watched.path.write_text(OTHER)  # still being written at the first look
    watched.file.look()
    assert watched.seconds() == [1]
    watched.file.look()
    watched.file.look()
    assert watched.seconds() == [1, 22]


def test_a_file_with_a_mistake_keeps_the_policy_and_says_so_once(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.path.write_text("classes:\n  a: {ttft_s: zero}\n")
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            watched.file.look()
    assert watched.seconds() == [1]
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"{watched.path}:2: classes.a.ttft_s" in message
    watched.path.unlink()
    for _ in range(3):
        watched.file.look()
    assert watched.seconds() == [1]
    watched.path.write_text(OTHER)
    for _ in range(2):
        watched.file.look()
    assert watched.seconds() == [1, 22]


def test_a_file_that_was_emptied_keeps_the_policy(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("", "\n"):
        watched.path.write_text(text)
        watched.file.look()
        watched.file.look()
        watched.file.look(now=True)
    assert watched.seconds() == [1]
    assert f"{watched.path} is empty" in caplog.text
    watched.path.write_text("{}")
    watched.file.look(now=True)
    assert [list(policy.classes) for policy in watched.policies] == [["a"], []]


def test_a_file_that_is_replaced_is_seen_though_its_time_and_size_are_the_same(watched: Watched) -> None:
    other = watched.path.with_suffix(".new")
    other.write_text(GOOD.replace("1", "2"))
    found = watched.path.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(watched.path)
    watched.file.look()
    watched.file.look()
    assert watched.seconds() == [1, 2]


def test_sighup_reads_the_file_at_once_and_the_thread_sees_changes(watched: Watched) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGHUP)
    programs_own: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _frame: programs_own.append(number))
    try:
        watched.file.watch()
        for count in (2, 3):
            os.kill(os.getpid(), signal.SIGHUP)
            wait_for(watched, count)
        watched.path.write_text(OTHER)
        wait_for(watched, 4)
        assert watched.seconds() == [1, 1, 1, 22]
        assert programs_own == [signal.SIGHUP] * 2, "what the program does at a SIGHUP, it goes on doing"
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for(watched: Watched, policies: int) -> None:
    until(
        lambda: len(watched.policies) >= policies,
        60,
        say=lambda: f"{len(watched.policies)} policies, not {policies}",
    )
