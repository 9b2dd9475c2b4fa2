"""An OpenAI-compatible endpoint on loopback that answers as a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body
USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


class Server(ThreadingHTTPServer):
    """Answers the nth request with `answer(n, body)`, and keeps what it was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = []  # what it says that it serves
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append({"path": self.path, **body})
            self.server.headers.append(dict(self.headers))
            self.server.busy += 1
            self.server.busiest = max(self.server.busy, self.server.busiest)
        status, headers, content = self.server.answer(number, body)
        with self.server.lock:
            self.server.busy -= 1
        self.send_response(status)
        # "close", lest the client sends its next request into a connection that is about to be gone
        for name, value in {"Content-Length": str(len(content)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        content = json.dumps({"data": self.server.models}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        """Nothing."""


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Server]:
    server = Server(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ok(text: str = "FINE", **more: Any) -> Reply:
    """A reply whose choice holds more than its text."""
    choice = {"message": {"content": text}, "finish_reason": "stop", **more}
    return 200, {}, json.dumps({"choices": [choice], "usage": USAGE}).encode()


def likeliest(*tokens: tuple[str, float]) -> Reply:
    """A reply with the likeliest first tokens."""
    told = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    return ok(logprobs={"content": [{"token": "x", "logprob": -1.0, "top_logprobs": told}]})
