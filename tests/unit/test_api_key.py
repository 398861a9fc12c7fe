"""The API key of launch.py: where it is taken from, who gets it, and that nobody else sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_flowprefill.cluster import cli, preflight

pytestmark = pytest.mark.usefixtures("no_server_may_start")


def shown_by(layout):
    """Everything that other users can see, or that is printed."""
    commands = [layout.server_command("prefill"), layout.server_command("decode"), layout.gateway_command(29999)]
    return repr(commands) + layout.curl() + repr(layout.config)


def test_a_key_goes_to_every_server_and_the_gateway_and_is_shown_nowhere(tmp_path, monkeypatch):
    file = tmp_path / "key file"
    file.write_text("secret\n")
    for options, shell in (
        (["--api-key", "secret"], "$FLOWPREFILL_API_KEY"),
        (["--api-key-file", str(file)], f"$(cat '{file}')"),
        ([], "$FLOWPREFILL_API_KEY"),
    ):
        monkeypatch.setenv("FLOWPREFILL_API_KEY", "secret" if not options else "another")
        layout = preflight.prepare(cli.parse([*options, "--ports", "0"]))
        for env in (layout.server_env("prefill"), layout.server_env("decode"), layout.gateway_env()):
            assert env["FLOWPREFILL_API_KEY"] == "secret"
        assert "secret" not in shown_by(layout)
        assert layout.curl().endswith(f' -H "Authorization: Bearer {shell}"')
    shown = subprocess.run(["sh", "-c", f"printf %s \"$(cat '{file}')\""], capture_output=True, check=True)
    assert shown.stdout == b"secret"


def test_without_a_key_nothing_is_asked_for():
    layout = preflight.prepare(cli.parse(["--ports", "0"]))
    assert "FLOWPREFILL_API_KEY" not in layout.server_env("prefill")
    assert "Authorization" not in layout.curl()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("put your key here", "without spaces"),
        ("a\nb", "one line"),
        ("é", "ASCII"),
    ],
)
def test_a_key_that_is_none(refusal, monkeypatch, tmp_path, text, reason):
    file = tmp_path / "key"
    file.write_text(text)
    assert reason in refusal("--api-key", text)
    assert f"--api-key-file {file}" in refusal("--api-key-file", str(file))
    monkeypatch.setenv("FLOWPREFILL_API_KEY", text)
    line = refusal("--ports", "0")
    assert line.startswith("launch.py: FLOWPREFILL_API_KEY")
    assert not text.strip() or text not in line


def test_one_key_from_one_place(refusal, tmp_path):
    assert "give one of them" in refusal("--api-key", "secret", "--api-key-file", "key")
    assert "--api-key-file key: No such file or directory" in refusal("--api-key-file", "key")
    assert "--api-key cannot be passed on to the gateway" in refusal("--gateway-args", "--api-key secret")


KEYED = """
import logging, sys
if __name__ == "__main__":
    print(sys.argv[1:])
    logging.basicConfig(format="%(message)s", force=True)
    logging.warning("server_args=%s", {"api_key": "secret"})
    logging.warning("no format %d", "secret")
"""


def test_a_server_finds_the_key_in_its_arguments_and_masks_it_in_its_log(tmp_path):
    (tmp_path / "keyed.py").write_text(KEYED)
    command = [sys.executable, "-m", "sgl_flowprefill.cluster.serve", "keyed", "--port", "1"]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    env = os.environ | {"FLOWPREFILL_API_KEY": "secret", "PYTHONPATH": paths}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "launch.py: importing keyed\n['--port', '1', '--api-key=secret']\n"
    assert result.stderr.startswith("server_args={'api_key': '***'}\n")
    del env["FLOWPREFILL_API_KEY"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\n['--port', '1']\n")
