"""A real server on a free port of this machine, for each module or test that asks."""

import contextlib
import http.client
import json
import socket
import threading
import time
from typing import Any, NamedTuple

import openai
import pytest

from clvr_jax.serving.app import make_app
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.server import make_server
from tests.serving.fake import FakeVlm


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


class Running(NamedTuple):
    vlm: FakeVlm
    port: int

    def client(self, kind=openai.OpenAI, **options):
        options = {"api_key": "none", "max_retries": 0, "timeout": 20.0} | options
        return kind(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def request(self, method, path, body=None, headers=None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            heads = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, heads, response.read())
        finally:
            connection.close()

    def post(self, body, **headers) -> Answer:
        """Post a body to chat completions; what is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        heads = {"content-type": "application/json"} | headers
        return self.request("POST", "/v1/chat/completions", data, heads)

    def say(self, *contents, **fields) -> Answer:
        """Post a conversation whose turns alternate, the user's first."""
        return self.post({"model": self.vlm.name, "messages": talk(*contents), **fields})

    def health(self) -> dict[str, Any]:
        return self.request("GET", "/health").json

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """Return a connection over which a request, or a part of it, has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        lines = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n"
        connection.sendall(lines.encode() + body)
        return connection

    def raw_say(self, text, **fields) -> socket.socket:
        body = {"model": self.vlm.name, "messages": talk(text), **fields}
        data = json.dumps(body).encode()
        head = f"Content-Type: application/json\r\nContent-Length: {len(data)}"
        return self.raw(head, data)


def answer_on(connection: socket.socket) -> bytes:
    """Return everything that arrives until the server closes the connection."""
    with connection:
        received = b""
        while data := connection.recv(65536):
            received += data
    return received


def talk(*contents) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def eventually(holds, seconds=5.0):
    """Wait until `holds()`; fail where it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(limits=None, api_key=None):
    """Serve a fake model; afterwards nothing may be left running, open, or used wrongly."""
    vlm = FakeVlm()
    server = make_server(make_app(vlm, limits or Limits(), api_key), grace_s=2)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    running = Running(vlm, listener.getsockname()[1])
    try:
        yield running
        eventually(lambda: len(vlm.open) == running.health()["kept_conversations"])
        state = running.health()
        assert (state["running"], state["waiting"]) == (0, 0)
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()
    assert not vlm.open, "the end of the application closes what it kept"
    assert not vlm.violations


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
