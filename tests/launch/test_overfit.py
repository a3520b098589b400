"""Both stages learn by heart, through the real command and config: the whole chain is right."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from launch import toy_data as data
from tests.launch import training

LONG = 3600


def trained(folder, stage, workdir, *options):
    import subprocess

    done = subprocess.run(
        training.arguments(folder, stage, workdir, *options),
        cwd=training.ROOT,
        env=training.ENV,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from launch import toy

    place = tmp_path_factory.mktemp("overfit")
    toy.write(place / "klein")
    toy.write_vlm(place / "vlm")
    data.make(place / "data", count=4, steps=2, size=(64, 64))
    return place


@pytest.mark.slow
def test_a_toy_transformer_draws_each_of_eight_samples(folder, tmp_path):
    """30 dB against the picture as the VAE returns it: the VAE is random, and is not trained."""
    workdir = tmp_path / "run"
    trained(
        folder,
        "image",
        workdir,
        f"data.features={tmp_path}/features",
        "condition.text=instruction",
        "condition.buckets=(128,)",
        "batch.rows=4",
        "steps=4000",
        "log=500",
        "save.every=0",
        "optim.learning_rate=0.003",
        "optim.schedule=cosine",
        "optim.warmup=100",
        "optim.weight_decay=0.0",
    )
    from clvr_jax.data.conditioning import Policy, condition
    from clvr_jax.data.images import read_image
    from clvr_jax.data.sources import open_source
    from clvr_jax.generate import image as generation
    from clvr_jax.generate.references import prepare
    from launch import build

    policy = Policy(text="instruction", buckets=(128,))
    model = build.load_image_model(build.inspect_weights(str(workdir)), dtype=jnp.float32)
    nets, found = model.networks, []
    for trajectory in open_source(folder / "data" / "trajectories.jsonl"):
        pictures = [prepare(read_image(step.image), 16) for step in trajectory.steps]
        for index, target in enumerate(pictures):
            given = condition(trajectory, index, policy)
            settings = generation.Settings(64, 64, steps=40, text_tokens=128)
            references = [pictures[i] for i in given.references]
            drawn = generation.generate(model, [given.text], references, [7], settings)[0, 0]
            latents = generation.encode_image(nets, model.params["vae"], target[None], jnp.float32)
            best = np.asarray(generation.decode(nets, model.params["vae"], latents))[0]
            error = np.mean((drawn.astype(float) - best) ** 2)
            found.append(10 * np.log10(255**2 / error))
    print("PSNR", np.round(found, 1))
    assert min(found) >= 30


@pytest.mark.slow
def test_a_toy_vlm_says_eight_conversations_by_heart(tmp_path_factory, tmp_path):
    from clvr_jax.backends.protocol import Options, user
    from clvr_jax.data.sources import open_source
    from launch import build_vlm, toy

    place = tmp_path_factory.mktemp("vlm")
    toy.write_vlm(place / "vlm")
    data.make(place / "data", count=8, steps=(1, 2), size=(64, 64))
    workdir = tmp_path / "run"
    trained(
        place,
        "vlm",
        workdir,
        "steps=1500",
        "log=100",
        "save.every=0",
        "optim.learning_rate=0.003",
    )
    vlm = build_vlm.load_vlm(build_vlm.find(str(workdir)), dtype=jnp.float32, context=2048)
    try:
        for trajectory in open_source(place / "data" / "trajectories.jsonl"):
            session, waiting = vlm.start(), []
            for message in trajectory.messages():
                if message.role != "assistant":
                    waiting.append(message)
                    continue
                reply = session.ask(
                    [user(*spoken(m)) for m in waiting], Options(max_tokens=400, temperature=0.0)
                )
                waiting = []
                assert reply.text == "".join(message.parts)
    finally:
        vlm.close()


def spoken(message):
    from clvr_jax.data.images import read_image

    return [part if isinstance(part, str) else read_image(part.image) for part in message.parts]
