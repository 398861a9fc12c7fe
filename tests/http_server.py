"""An HTTP server that answers as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(answer: Callable[[str, Mapping[str, str]], tuple[int, str]]) -> Iterator[str]:
    """URL of a server that answers a request, given by path and headers, with the status and body of ``answer``."""
    with answering_bodies(lambda path, headers, _: answer(path, headers)) as url:
        yield url


@contextmanager
def answering_bodies(answer: Callable[[str, Mapping[str, str], bytes], tuple[int, str]]) -> Iterator[str]:
    """As ``answering``, where ``answer`` is given the request's body as well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answer(self.path, self.headers, request)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_DELETE = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
