"""A server that answers each request with one event: `python small_server.py PORT [ANSWERS]`.

With a number of answers it ends its parent with SIGTERM in the midst of the request after them; without one, it has a child and
never ends by itself. SIGTERM kills it without it caring for its child.
"""

import http.server
import os
import shlex
import signal
import socket
import subprocess
import sys

EVENT = b'data: {"choices": [{"delta": {"content": "Paris"}, "finish_reason": "stop"}]}\n\n'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(*arguments: object) -> str:
    """For a shell."""
    return shlex.join([sys.executable, __file__, *map(str, arguments)])


class Handler(http.server.BaseHTTPRequestHandler):
    left: int | None = None  # answers

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if Handler.left == 0:
            os.kill(os.getppid(), signal.SIGTERM)
            return
        if Handler.left is not None:
            Handler.left -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(EVENT)))
        self.end_headers()
        self.wfile.write(EVENT)


if __name__ == "__main__":
    port, *answers = map(int, sys.argv[1:])
    if answers:
        (Handler.left,) = answers
    else:
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
