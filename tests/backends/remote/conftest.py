"""A scripted server, and models that talk to it."""

import functools
import ssl

import pytest

from clvr_jax.backends.remote import RemoteConfig, RemoteVlm
from tests.backends.remote.chat_server import ChatServer

KEY = "sk-very-secret-0123456789"


_tls = functools.cache(ssl.create_default_context)  # reading certificates is half of a client


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("CLVR_TEST_KEY", KEY)
    monkeypatch.setattr(ssl, "create_default_context", _tls)
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def connect(server):
    """Make a model: `connect(field=value)`; its `delays` are the waits it would have made."""
    made = []

    def connect(pause=None, draw=lambda: 1.0, **fields):
        fields = {"base_url": server.url, "key_env": "CLVR_TEST_KEY", "timeout": 5.0, **fields}
        delays = []
        pause = pause or (lambda stop, seconds: delays.append(seconds))
        vlm = RemoteVlm(RemoteConfig("toy", **fields), pause=pause, draw=draw)
        vlm.delays = delays
        made.append(vlm)
        return vlm

    yield connect
    for vlm in made:
        vlm.close()
