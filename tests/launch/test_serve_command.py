"""`python -m launch.serve` with the real engine: the openai client and our own remote backend."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from clvr_jax.backends.protocol import Options, user
from clvr_jax.backends.remote import RemoteConfig, RemoteVlm, Replay
from tests import QUICK_COMPILE
from tests.backends import toy

ROOT = Path(__file__).parents[2]
KEY = "a-test-key"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    """Base URL and the process of a server over the toy model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.serve",
            f"--weights={toy.folder()}",
            "--name=toy",
            f"--port={port}",
            "--config.context=2048",
            "--config.cache_gib=0.1",
            "--config.dtype=float32",
        ],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_COMPILE, "CLVR_API_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    base = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{base}/health", timeout=1).read()
            break
        except OSError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    yield base, process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, process.stderr.read()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=120)


def shown(picture) -> dict:
    """A picture as a part of a message."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def ask(client, content, **fields):
    fields = {"model": "toy", "max_tokens": 16, "temperature": 0, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **fields)


def test_models_and_text(client):
    assert [model.id for model in client.models.list()] == ["toy"]
    reply = ask(client, "hello")
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 16 and reply.usage.prompt_tokens > 5


def test_it_says_what_the_engine_says(client):
    picture, model = toy.picture(3), toy.load()
    try:
        own = model.start().ask([user("look", picture)], Options(max_tokens=16)).text
    finally:
        model.close()
    content = [{"type": "text", "text": "look"}, shown(picture)]
    assert ask(client, content).choices[0].message.content == own
    chunks = list(ask(client, content, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == own
    other = [{"type": "text", "text": "look"}, shown(toy.picture(4))]
    assert ask(client, other).choices[0].message.content != own


def test_a_schema_and_logprobs(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    reply = ask(client, "json", response_format=form, max_tokens=200, temperature=1.0, seed=3)
    assert isinstance(json.loads(reply.choices[0].message.content)["ok"], bool)
    reply = ask(client, "x", logprobs=True, top_logprobs=2, max_tokens=4)
    tokens = reply.choices[0].logprobs.content
    assert tokens and all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in tokens)


def test_a_second_turn_reads_only_what_is_new(client):
    first = [{"role": "user", "content": [shown(toy.picture(1)), {"type": "text", "text": "a"}]}]
    fields = {"model": "toy", "max_tokens": 16, "temperature": 0}
    one = client.chat.completions.create(messages=first, **fields)
    said = {"role": "assistant", "content": one.choices[0].message.content}
    again = [*first, said, {"role": "user", "content": "b"}]
    two = client.chat.completions.create(messages=again, **fields)
    cached = two.usage.prompt_tokens_details.cached_tokens
    assert cached == one.usage.prompt_tokens + one.usage.completion_tokens


@pytest.mark.slow
def test_two_hundred_at_once(server):
    """Text and pictures, all answered, each as it is alone."""

    async def run():
        client = openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key=KEY, timeout=300)
        picture = shown(toy.picture(5, 64, 64))

        async def one(i):
            content = [{"type": "text", "text": f"number {i % 10}"}] + [picture] * (i % 2)
            reply = await client.chat.completions.create(
                model="toy",
                messages=[{"role": "user", "content": content}],
                max_tokens=8,
                temperature=0,
            )
            return i, reply.choices[0].message.content

        return await asyncio.gather(*map(one, range(200)))

    replies = asyncio.run(run())
    assert sorted(i for i, _ in replies) == list(range(200))
    assert all(text == dict(replies)[i % 10] for i, text in replies)


def test_what_is_wrong_is_said_and_the_server_goes_on(client, server):
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{server[0]}/v1", api_key="no", max_retries=0), "x")
    for content, fields, text in (
        ("x" * 5000, {}, "the context holds 2048"),
        ("<|image_pad|>", {}, "give pictures as pictures"),
        ("x", {"extra_body": {"temprature": 1}}, "temperature"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], {}, "image"),
    ):
        with pytest.raises(openai.BadRequestError, match=text):
            ask(client, content, **fields)
    assert ask(client, "still there?").choices


def test_the_remote_backend_is_its_client(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_KEY", KEY)
    config = RemoteConfig(
        model="toy",
        base_url=f"{server[0]}/v1",
        key_env="TOY_KEY",
        sampling_extensions=True,
        cache=tmp_path / "cache",
        transcript=tmp_path / "transcript.jsonl",
    )
    options = Options(max_tokens=16, temperature=1.0, top_k=20, seed=5)
    remote, local = RemoteVlm(config), toy.load()
    try:
        turns = [[user("a", toy.picture(1))], [user("b", toy.picture(2, 64, 64))]]
        far, near = remote.start(), local.start()
        said = []
        for turn in turns:
            pieces = []
            reply = far.ask(turn, options, pieces.append)
            assert reply.text == near.ask(turn, options).text == "".join(pieces)
            said.append(reply)
        assert said[1].usage.cached > 0, "the server read the first turn again"
        form = far.ask([user("json")], Options(max_tokens=200, schema=SCHEMA, seed=1))
        assert "ok" in json.loads(form.text)
    finally:
        remote.close()
        local.close()
    replay = Replay(tmp_path / "transcript.jsonl")
    again = replay.start()
    assert [again.ask(turn, options).text for turn in turns] == [reply.text for reply in said]
    replay.close()


def command(module, *flags, **environment):
    environment = os.environ | {"XLA_FLAGS": QUICK_COMPILE} | environment
    args = [sys.executable, "-m", f"launch.{module}", *flags]
    return subprocess.run(
        args, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.slow
def test_ask_here_and_there(server, tmp_path):
    toy.picture().save(tmp_path / "a.png")
    flags = [f"--image={tmp_path / 'a.png'}", "--prompt=look", "--prompt=and now?", "--seed=3"]
    flags += ["--config.max_tokens=12", "--config.context=2048", "--config.cache_gib=0.1"]
    here = command("ask", f"--weights={toy.folder()}", *flags)
    assert here.returncode == 0, here.stderr
    there = command(
        "ask", f"--server={server[0]}/v1", "--name=toy", "--key_env=TOY_KEY", *flags, TOY_KEY=KEY
    )
    assert there.returncode == 0, there.stderr
    assert here.stdout == there.stdout and here.stdout.strip()
    assert len(re.findall(r"tokens read, \d+ of them cached", here.stderr)) == 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--weights=/nowhere"], "does not exist"),
        (["--weights=/nowhere", "--host=0.0.0.0"], "holds no key"),
        (["--weights=TOY", "--config.context=100000000"], "the checkpoint's positions end at"),
        pytest.param(
            ["--weights=TOY", "--config.cache_gib=0.001"],
            "raise the budget or lower the context",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--weights=TOY", "--config.max_rows=3"], "power of two", marks=pytest.mark.slow
        ),
        (["--weights=TOY", "--config.dtype=int4"], "choose auto, bfloat16 or float32"),
        (["--weights=TOY", "--config.attention=flash"], "choose auto, reference"),
        (["--weights=TOY", "--max_queue=0"], "max_queue is 0"),
    ],
)
def test_serve_refuses(flags, text):
    flags = [flag.replace("TOY", str(toy.folder())) for flag in flags]
    done = command("serve", *flags, CLVR_API_KEY="")
    assert done.returncode == 1
    assert text in done.stderr and "Traceback" not in done.stderr


def test_dry_run_prints_sizes_and_sharding():
    done = command(
        "serve",
        f"--weights={toy.folder()}",
        "--dry_run",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
    )
    assert done.returncode == 0, done.stderr
    assert "vlm: 180,888 parameters" in done.stdout and "bytes a token" in done.stdout
    assert "language/layers/self_attn/q_proj/kernel (4, 32, 4, 16)" in done.stdout
