"""Qwen3 as a language model: logits of the next token, with a cache for generation.

Reference: transformers `modeling_qwen3.py` and the text half of `modeling_qwen3_vl.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from clvr_jax.kernels import cross_entropy as kernel
from clvr_jax.models.layers import Linear, RMSNorm, stack
from clvr_jax.models.qwen3.cache import KV
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3.decoder import Context, Embedding, Layer, angles
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int, Params, Tokens


class LanguageModel(nn.Module):
    """Token ids, some of which stand for image features, to final hidden states.

    Attributes:
      cfg: sizes.
      remat: what the backward pass keeps of a layer.
      implementation: attention implementation, None to choose by device and shape.
      scan: stacked parameters and one traced layer (training), or unrolled layers (serving).
      fused: parameters as `serving.prepare` lays them out.
    """

    cfg: Qwen3Config
    remat: str = "none"
    implementation: str | None = None
    scan: int = 1
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b l"],
        positions: Int[Array, "rows l"] | Int[Array, "rows l 3"],
        *,
        lengths: Int[Array, "b"] | None = None,
        segments: Int[Array, "b l"] | None = None,
        features: Float[Array, "f parts d"] | Float[Array, "b f parts d"] | None = None,
        places: Int[Array, "b l"] | None = None,
        cache: tuple[KV, ...] | None = None,
        offset: Int[Array, "b"] | None = None,
        fresh: bool = False,
        capture: tuple[int, ...] = (),
    ) -> tuple[Tokens, tuple[KV, ...] | None, Float[Array, "n b l d"] | None]:
        """Return (hidden states after the final norm, the longer cache, captured states).

        Args:
          ids: token ids, right-padded.
          positions: of every token, or along three axes (M-RoPE); rows is b or 1.
          lengths: real tokens of each row, None where none is padding; without a cache only.
          segments: of packed rows, the sequence that each token belongs to, counted from 1, 0 for
            padding; without a cache only. `positions` begin anew with each sequence.
          features: image features; part 0 replaces embeddings, part i is added to the output of
            layer i (DeepStack). Of all rows together, or each row's own (b f parts d), which stay
            on the row's device.
          places: which of `features` a token stands for, -1 for text.
          cache: keys and values of earlier tokens with room for these; unrolled layers only.
          offset: number of earlier tokens of each row.
          fresh: promises that offset is 0, so that the cache need not be read.
          capture: layer counts after which to return the residual stream, without DeepStack's
            addition; 0 is the embedding.

        Raises:
          ValueError: a cache is given to scanned layers, or segments with a cache or lengths.
        """
        c = self.cfg
        if segments is not None and (cache is not None or lengths is not None):
            raise ValueError("segments are of packed rows: no lengths, no cache")
        if cache is not None and self.scan:
            raise ValueError("a cache needs unrolled layers: LanguageModel(cfg, scan=False)")
        x = Embedding(c.vocab, c.width, name="embed_tokens")(ids)
        deepstack = None
        if features is not None:
            rows = _rows(features, jnp.maximum(places, 0)).astype(x.dtype)
            image = (places >= 0)[..., None]
            x = jnp.where(image, rows[:, :, 0], x)
            if features.shape[-2] > 1:
                later = jnp.where(image[..., None], rows[:, :, 1:], 0)
                deepstack = jnp.moveaxis(later, 2, 0)
        x = constrain(x, "batch", "tokens", None)
        kept = jnp.zeros((len(capture), *x.shape), x.dtype)
        wanted = None
        if capture:
            wanted = jnp.asarray(capture)[:, None, None, None]
            kept = jnp.where(wanted == 0, x, kept)
        turns = angles(positions, c)
        context = Context(turns, lengths, offset, wanted, deepstack, segments, fresh)
        if cache is None:
            layers = stack(Layer, c.layers, (0, nn.broadcast), scan=self.scan, remat=self.remat)
            numbers = jnp.arange(1, c.layers + 1)
            fields = (c, self.implementation, self.fused)
            (x, kept), _ = layers("layers", *fields)((x, kept), (numbers, None), context)
        else:
            longer = []
            for i, past in enumerate(cache):
                layer = Layer(c, self.implementation, self.fused, name=f"layers_{i}")
                (x, kept), past = layer((x, kept), (i + 1, past), context)
                longer.append(past)
            cache = tuple(longer)
        x = RMSNorm(c.eps, name="norm")(x)
        if self.is_initializing() and not c.tied:
            Linear(c.vocab, name="lm_head")(x)  # applied by `logits`, to chosen rows only
        return x, cache, kept if capture else None


def _rows(features: Array, places: Int[Array, "b l"]) -> Float[Array, "b l parts d"]:
    if features.ndim == 3:
        return jnp.take(features, places, axis=0)
    return jax.vmap(lambda own, index: jnp.take(own, index, axis=0))(features, places)


def logits(params: Params, cfg: Qwen3Config, hidden: Float[Array, "*rows d"]):
    """Return the next token's scores (*rows, vocab) in float32 of final hidden states.

    Args:
      params: of a `LanguageModel`, in either layout.
      cfg: its sizes.
      hidden: chosen rows of its first result.
    """
    if cfg.tied:
        table = params["embed_tokens"]["embedding"].astype(hidden.dtype)
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    else:
        table = params["lm_head"]["kernel"].astype(hidden.dtype)
        contract = (((hidden.ndim - 1,), (0,)), ((), ()))
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    scores = jax.lax.dot_general(hidden, table, contract, preferred_element_type=wide)
    # where scores are wanted whole it is they that are gathered, not the weights
    return constrain(scores, *("batch", None, None)[: scores.ndim - 1], "vocab")


def cross_entropy(
    params: Params,
    cfg: Qwen3Config,
    hidden: Tokens,
    targets: Int[Array, "b l"],
    weights: Float[Array, "b l"],
    *,
    chunk: int = 512,
) -> Float[Array, ""]:
    """Return the sum of weight * -log p(target) over all positions, float32.

    The targets are the next tokens, shifted by the caller. Source: transformers'
    `ForCausalLMLoss`, whose logits are float32 as well; there a target of -100 is left out, here a
    weight of 0 does that.

    Args:
      params: of a `LanguageModel`, in either layout.
      cfg: its sizes.
      hidden: its first result.
      targets: the token that each position should predict; any number where the weight is 0.
      weights: positions of weight 0 add exactly 0 to the sum and to every gradient.
      chunk: positions of a row whose logits exist at once.

    Raises:
      ValueError: `chunk` is not positive.
    """
    head = params["embed_tokens"]["embedding"] if cfg.tied else params["lm_head"]["kernel"]
    vocab_axis = 0 if cfg.tied else 1
    return kernel.cross_entropy(head, hidden, targets, weights, vocab_axis=vocab_axis, chunk=chunk)


def abstract_params(cfg: Qwen3Config, dtype=jnp.float32, *, head: bool = True) -> Params:
    """Return the parameter tree as shapes; without `head`, no final norm and no output head."""

    def init():
        ids = jnp.zeros((1, 1), jnp.int32)
        return LanguageModel(cfg).init(jax.random.key(0), ids, ids)["params"]

    shapes = jax.eval_shape(init)
    if not head:
        shapes = {name: leaf for name, leaf in shapes.items() if name not in ("norm", "lm_head")}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
