"""An OTLP collector on a loopback socket, for a server in a process of its own."""

import gzip
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Attributes:
    url: of its server, without a path.
    requests: path, headers with names in lower case, and message of each export.
    """

    def __init__(self, status: int) -> None:
        collector = self
        self.requests: queue.Queue[tuple[str, dict[str, str], Any]] = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                headers = {name.lower(): value for name, value in self.headers.items()}
                collector.requests.put((self.path, headers, ExportTraceServiceRequest.FromString(body)))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"


@contextmanager
def collecting(*, status: int = 200) -> Iterator[Collector]:
    """A collector that answers with `status`."""
    collector = Collector(status)
    server = collector._server
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
