"""The loss of conversations: cross-entropy of what the assistant says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp

from clvr_jax.data.packing import Shape
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl.vision import Places, Vision
from clvr_jax.parallel import constrain
from clvr_jax.sft.vlm.batches import PLACES
from clvr_jax.tree import flatten
from clvr_jax.typing import Array, Float, Params, PRNGKey

# kernels that are not used as a `Linear` layer: an adapter there would train nothing
_WITHOUT_ADAPTER = ("language/lm_head", "visual/patch_embed")


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks, without parameters: what a program is specialised to.

    Attributes:
      language: with stacked layers.
      vision: the vision tower; None for conversations without pictures.
      train_vision: whether gradients flow into the tower; else its features are constants.
      chunk: tokens of a row whose scores over the vocabulary exist at once.
    """

    language: LanguageModel
    vision: Vision | None = None
    train_vision: bool = True
    chunk: int = 512


def loss(
    params: Params,
    adapters: Params,
    frozen: Mapping[str, Any],
    batch: Mapping[str, Any],
    key: PRNGKey,
    static: Shape,
    *,
    networks: Networks,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """Return (sum of -log p over the trained tokens, their number, nothing else to report).

    Args:
      params: `{"language": ..., "visual": ...}` in the type to compute in.
      adapters: of either half, under the same names, or {}.
      frozen: `levels`, (channel, 256): what each grey level is to the tower (`Processor.levels`).
      batch: rows of `batches.make`.
      key: not used; nothing here is random.
      static: room of a row.
      networks: bound before training.

    Raises:
      ValueError: there are pictures and no tower, or an adapter that has no effect.
    """
    idle = [path for path in flatten(adapters) if path.startswith(_WITHOUT_ADAPTER)]
    if idle:
        raise ValueError(
            f"adapters of {', '.join(idle)} have no effect; leave {', '.join(_WITHOUT_ADAPTER)} "
            "out of the adapters' pattern"
        )
    inputs = {}
    if static.images:
        inputs = {
            "features": look(params, adapters, frozen["levels"], batch, networks),
            "places": batch["places"],
        }
    hidden, _, _ = networks.language.apply(
        _variables(params, adapters, "language"),
        batch["ids"],
        batch["positions"],
        segments=batch["segments"],
        **inputs,
    )
    total = language.cross_entropy(
        params["language"],
        networks.language.cfg,
        hidden,
        batch["targets"],
        batch["weights"],
        chunk=networks.chunk,
    )
    return total, jnp.sum(batch["weights"]), {}


def look(
    params: Params,
    adapters: Params,
    levels: Float[Array, "c 256"],
    batch: Mapping[str, Any],
    networks: Networks,
) -> Float[Array, "b f parts d"]:
    """Return features of the cells of all images of each row, padding included.

    Raises:
      ValueError: the networks have no vision tower.
    """
    if networks.vision is None:
        raise ValueError("the batch has pictures, and the networks have no vision tower")
    rows = batch["pixels"].shape[0]
    images = lambda x: einops.rearrange(x, "b f ... -> (b f) ...")  # each attends to itself alone
    pixels = images(batch["pixels"])
    grey = pixels.reshape(*pixels.shape[:2], len(levels), -1)
    x = jnp.take_along_axis(levels[None, None], grey.astype(jnp.int32), axis=-1)
    x = x.reshape(pixels.shape).astype(jax.tree.leaves(params["visual"])[0].dtype)
    places = Places(*(images(batch[name]) for name in PLACES))
    variables = _variables(params, adapters, "visual")
    if not networks.train_vision:
        variables = jax.lax.stop_gradient(variables)
    features = networks.vision.apply(variables, x, places)
    features = einops.rearrange(features, "(b f) n parts d -> b (f n) parts d", b=rows)
    return constrain(features, "batch", None, None, None)


def _variables(params: Params, adapters: Params, half: str) -> dict[str, Params]:
    both = {"params": params[half]}
    return {**both, "lora": adapters[half]} if half in adapters else both
