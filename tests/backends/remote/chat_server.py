"""A real HTTP server with /chat/completions that says, and spoils, what a test scripts."""

import contextlib
import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers each request with the next step of `script`, then with `default`.

    Attributes:
      bodies, headers, times: of the requests so far.
      most_at_once: most requests that were being answered at the same time.
      gate: steps made by `wait_for_gate` go on when it is set.
      gone: set when a client has closed its connection during a stream.
    """

    def __init__(self):
        self.script = deque()
        self.default = say("ok")
        self.bodies, self.headers, self.times = [], [], []
        self.most_at_once = self._at_once = 0
        self.gate, self.gone, self.closing = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.answering(self, body) as step:
                    step(self, body, server)

            def end_headers(self):
                self.send_header("connection", "close")
                super().end_headers()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # five, the default, makes bursts wait a second for a resend

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # clients that leave are part of the tests
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    @contextlib.contextmanager
    def answering(self, handler, body):
        with self._lock:
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append((handler.path, handler.headers))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            step = self.script.popleft() if self.script else self.default
        try:
            yield step
        finally:
            with self._lock:
                self._at_once -= 1

    def close(self):
        self.closing.set()
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def usage_of(prompt, completion, cached=0):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def say(text, finish="stop", usage=(10, 5), logprobs=None, seconds=0.0, **message):
    """A good answer, streamed word by word where that is asked for."""

    def step(handler, body, server):
        time.sleep(seconds)
        counts = usage_of(*usage) if usage else None
        probs = {"content": logprobs} if logprobs else None
        if not body.get("stream"):
            said = {"role": "assistant", "content": text, **message}
            choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": probs}
            reply(handler, 200, completion("chat.completion", [choice], counts))
            return
        begin_stream(handler)
        for i, word in enumerate(words(text)):
            chunk(handler, word, logprobs=probs if i == 0 else None)
        chunk(handler, None, finish)
        if counts:
            event(handler, completion("chat.completion.chunk", [], counts))
        send(handler, b"data: [DONE]\n\n")
        send(handler, b"")

    return step


def fail(status, message="broken", headers=(), **error):
    def step(handler, body, server):
        reply(handler, status, {"error": {"message": message, **error}}, dict(headers))

    return step


def answer_with(data, kind="application/json"):
    """A success whose body is `data`, whatever it is."""

    def step(handler, body, server):
        handler.send_response(200)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return step


def hang(handler, body, server):
    server.closing.wait(10)


def drop(handler, body, server):
    """Half of a body, then the connection is gone."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "x", "choi')


def broken_stream(text, clean, last=b""):
    """Some words of a stream and no end; `clean` closes it as HTTP wants, without a finish."""

    def step(handler, body, server):
        begin_stream(handler)
        for word in words(text):
            chunk(handler, word)
        if last:
            send(handler, last)
        if clean:
            send(handler, b"")

    return step


def gated_stream(first, rest):
    """`first`, then words of `rest` for as long as the client listens, once the gate opens."""

    def step(handler, body, server):
        begin_stream(handler)
        chunk(handler, first)
        server.gate.wait(10)
        try:
            while not server.closing.is_set():
                chunk(handler, rest)
                time.sleep(0.005)
        except OSError:
            server.gone.set()

    return step


def wait_for_gate(text):
    def step(handler, body, server):
        server.gate.wait(10)
        say(text)(handler, body, server)

    return step


def words(text):
    return [word + " " for word in text.split(" ")[:-1]] + [text.split(" ")[-1]]


def completion(kind, choices, usage):
    return {
        "id": "x",
        "object": kind,
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }


def reply(handler, status, body, headers=None):
    data = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"content-type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def begin_stream(handler):
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()


def chunk(handler, text, finish=None, logprobs=None):
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    event(handler, completion("chat.completion.chunk", [choice], None))


def event(handler, data):
    send(handler, b"data: " + json.dumps(data).encode() + b"\n\n")


def send(handler, data):
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()
