"""Layers that every network here is made of."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.tree import flatten, unflatten
from clvr_jax.typing import Array, Float, Params


def fan_in_init(key, shape, dtype=jnp.float32):
    """Normal with variance 1/fan-in; the first axis is the input, all others the output."""
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5


class Linear(nn.Module):
    """A product over the last axis, kernel (i, *features), plus the adapter of this path if any.

    An adapter is a pair in the `lora` collection: a (i, r) and b (r, *features); its scale is
    folded into b. Neither rank nor presence is an option of the model.
    """

    features: int | tuple[int, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        kernel = self.param("kernel", fan_in_init, (x.shape[-1], *features))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, features)
            y = biased_product(x, kernel.astype(x.dtype), bias)
        else:
            y = product(x, kernel.astype(x.dtype))
        if self.has_variable("lora", "a"):
            a = self.get_variable("lora", "a").astype(x.dtype)
            b = self.get_variable("lora", "b").astype(x.dtype)
            y += product(product(x, a), b)
        return y


def product(x: Float[Array, "*batch i"], kernel: Array, wide: Any = None) -> Array:
    """Return the product over the last axis of `x` and the first of `kernel`, in type `wide`.

    On a CPU rows are put on one axis first. With more axes XLA transposes activations to get the
    kernel's gradient, and trains at half the speed. On a mesh this would mix the axes that it
    spreads, and other devices do not need it.
    """
    if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty:
        flat, columns = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
        y = jnp.dot(flat, columns, preferred_element_type=wide)
        return y.reshape(*x.shape[:-1], *kernel.shape[1:])
    return jnp.tensordot(x, kernel, axes=1, preferred_element_type=wide)


def biased_product(x: Float[Array, "*batch i"], kernel: Array, bias: Array) -> Array:
    """Return x @ kernel + bias in x's dtype, the bias added before the result is rounded to it.

    On GPUs this is left to the product's own epilogue, which adds before rounding as well.
    """
    gpu = jax.default_backend() == "gpu"
    wide = x.dtype if gpu else jnp.promote_types(x.dtype, jnp.float32)
    y = product(x, kernel, wide)
    return (y + bias.astype(wide)).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, rounded to x's dtype, then times the scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + self.eps)
        return h.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Normalisation over the last axis with scale and bias, in float32, back to x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32)
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


class GroupNorm(nn.Module):
    """Normalisation over space and channel groups, then scale and bias; float32, channels last."""

    groups: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        b, c = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,)).astype(jnp.float32)
        h = x.astype(jnp.float32).reshape(b, -1, c)

        def grouped(values):  # channel means first: reductions over places keep channels last
            means = jnp.mean(values, axis=1).reshape(b, self.groups, -1).mean(axis=-1)
            return jnp.repeat(means, c // self.groups, axis=-1)[:, None]

        h = h - grouped(h)
        h = h * jax.lax.rsqrt(grouped(h**2) + self.eps)
        return (h * scale + bias).reshape(x.shape).astype(x.dtype)


class Conv(nn.Module):
    """A square convolution, channels last, kernel (kh, kw, i, o)."""

    features: int
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: Float[Array, "b height width i"]) -> Float[Array, "b _ _ o"]:
        shape = (3, 3, x.shape[-1], self.features)
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", init, shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # add the bias before rounding to bfloat16; cuDNN's fused bias does so by itself
        wide = None if jax.default_backend() == "gpu" else jnp.promote_types(x.dtype, jnp.float32)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=wide,
        )
        return (y + bias.astype(y.dtype)).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """LayerNorm without scale and bias, in float32; the result stays float32."""
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + eps)


def rotary_frequencies(width: int, theta: float) -> np.ndarray:
    """Return theta^(-2j / width) for j < width / 2, float32.

    The power is rounded once from float64, as torch's nearly always is: at position 30,000 the last
    bit of a frequency is 7e-5 of the logits.
    """
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    power = np.float64(theta) ** exponent.astype(np.float64)
    return np.float32(1) / power.astype(np.float32)


def sinusoid(t: Float[Array, "b"], width: int, period: float = 10000.0) -> Float[Array, "b width"]:
    """[cos | sin] of t times `width / 2` geometric frequencies from 1 down to 1/period, float32."""
    half = width // 2
    # the reference's own float32 arithmetic: at t = 1000 the last bit of a frequency shows, as
    # 6e-6 of a toy model's output
    exponent = np.float32(-np.log(period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    if (width, period) == (256, 10000.0):
        # near ties (0.52 ulp) that torch's exp rounds up
        frequencies[[12, 106]] = np.nextafter(frequencies[[12, 106]], np.float32(1))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def stack(block, length: int, in_axes, *, scan: int, remat: str = "none"):
    """Return a function that runs `length` layers of `block` on (carry, per-layer, *shared).

    Args:
      block: a module class whose call takes (carry, x, *shared) and returns (carry, y).
      length: number of layers.
      in_axes: `nn.scan`'s in_axes for (x, *shared): 0 or nn.broadcast each.
      scan: trace so many layers, over parameters stacked on a leading axis under `name`: one, or
        several where compiling takes no time and small layers do not pay for a loop; or 0 for none,
        with the parameters of layer i under `name_i` (serving: weights are read where they lie).
      remat: what the backward pass keeps of a layer, a key of `REMAT`.

    Raises:
      ValueError: `remat` is unknown.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; choose from {', '.join(REMAT)}")
    if remat != "none":
        block = nn.remat(block, prevent_cse=not scan, policy=REMAT[remat])
    if scan:
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=length,
            unroll=min(scan, length),
        )

        def run(name, *fields):
            return layers(*fields, name=name)

        return run

    def unrolled(name, *fields):
        blocks = [block(*fields, name=f"{name}_{i}") for i in range(length)]

        def call(carry, x, *shared):
            ys = []
            for i, one in enumerate(blocks):
                carry, y = one(carry, jax.tree.map(lambda leaf, i=i: leaf[i], x), *shared)
                ys.append(y)
            return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

        return call

    return unrolled


# what the backward pass keeps of a layer besides its input
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def unstack(params: Params, roots: Sequence[str]) -> Params:
    """Return a tree in which the layers under each root lie apart, for `stack(..., scan=False)`.

    The subtree of `blocks` with leaves (layer, ...) becomes `blocks_0`, `blocks_1`, ...; each leaf
    is freed as soon as it is cut, so that no second copy of the whole tree ever exists.
    """
    split = jax.jit(lambda leaf: list(leaf))
    apart: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        root, _, rest = path.partition("/")
        if root not in roots:
            apart[path] = leaf
            continue
        for i, layer in enumerate(split(leaf)):
            apart[f"{root}_{i}/{rest}"] = layer
        leaf.delete()
    return unflatten(apart)
