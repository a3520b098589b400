"""A model of two matrices, its loss by the trainer's contract, and its data."""

import jax
import jax.numpy as jnp
import numpy as np


def params(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (3, 4)) * 0.5, "bias": jnp.zeros(4)},
        "last": {"kernel": jax.random.normal(keys[1], (4, 2)) * 0.5},
    }


def loss(params, adapters, others, batch, key, static):
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    if adapters:
        hidden = hidden + batch["x"] @ adapters["first"]["a"] @ adapters["first"]["b"]
    out = hidden @ params["last"]["kernel"]
    noise = jax.random.normal(key, out.shape, jnp.float32) * others["noise"]
    each = jnp.mean((out.astype(jnp.float32) + noise - batch["y"]) ** 2, axis=-1)
    weights = batch["weight"]
    halves = (jnp.sum(each[:1]), jnp.sum(weights[:1]))
    return jnp.sum(each * weights), jnp.sum(weights), {"absolute": jnp.sum(each), "half": halves}


def batch(step: int, accumulation: int = 1, rows: int = 8):
    draw = np.random.default_rng(step)
    x = draw.normal(size=(accumulation * rows, 3)).astype(np.float32)
    y = np.stack([x.sum(-1), x[:, 0] * x[:, 1]], -1)
    weight = np.ones(len(x), np.float32)
    leaves = {"x": x, "y": y, "weight": weight}
    return {k: v.reshape(accumulation, rows, *v.shape[1:]) for k, v in leaves.items()}
