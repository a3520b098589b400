"""The composition root: weights, networks and meshes brought together."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from clvr_jax import parallel
from clvr_jax.data.conditioning import Policy
from clvr_jax.generate.image import ImageModel, Networks
from clvr_jax.kernels.attention import IMPLEMENTATIONS
from clvr_jax.models.flux2 import config as flux2
from clvr_jax.models.flux2 import transformer as flux2_transformer
from clvr_jax.models.flux2 import vae as flux2_vae
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.layers import unstack
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3 import decoder as qwen3_decoder
from clvr_jax.models.qwen3 import language
from clvr_jax.tree import count, flatten
from clvr_jax.typing import Params
from conversion import detect
from conversion.check import check_together
from conversion.load import load
from conversion.sources import fingerprint

COMPONENTS = ("transformer", "vae", "text_encoder")
STOCK_TEXTS = (512,)  # text lengths of the released weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """A klein folder that was looked at but not read.

    Attributes:
      found: components and shared files.
      distilled: whether the weights say that they are step-distilled.
      pattern: attention pattern they were trained with.
      texts: text lengths they were trained with, ascending; klein sees its padding.
    """

    found: detect.Found
    distilled: bool
    pattern: str
    texts: tuple[int, ...]


def inspect_weights(source: str, transformer: str | None = None) -> Weights:
    """Look at a pipeline folder, without reading tensors.

    Args:
      source: a diffusers folder, a converted folder, or a hub repository id.
      transformer: another checkpoint that the transformer comes from (a BFL single file, say).

    Raises:
      FileNotFoundError, ValueError: something is missing or is no klein checkpoint.
    """
    found = detect.find(source)
    if transformer:
        other = detect.find(transformer, ["transformer"], base=found)
        found = dataclasses.replace(found, components={**found.components, **other.components})
    missing = [name for name in COMPONENTS if name not in found.components]
    if missing or "tokenizer" not in found.shared:
        missing += [] if "tokenizer" in found.shared else ["tokenizer"]
        raise FileNotFoundError(
            f"{source} ({found.kind}) has no {', '.join(missing)}; sampling needs a whole pipeline "
            "folder. For a single transformer file give the pipeline folder as --weights and the "
            "file as --transformer"
        )
    check_together(found.components)
    text = found.components["text_encoder"].config
    if text.layers < text.features[-1]:
        raise ValueError(
            f"the text encoder has {text.layers} layers, klein reads after {text.features}"
        )
    index = {}
    if detect.INDEX in found.shared:
        index = json.loads(found.shared[detect.INDEX].read_text())
    kv = index.get("_class_name") == "Flux2KleinKVPipeline"
    distilled = bool(index.get("is_distilled", False)) or kv
    recorded = found.manifest.get("conditioning")
    texts = Policy.from_json(recorded).buckets if recorded else STOCK_TEXTS
    pattern = found.manifest.get("pattern", "kv" if kv else "full")
    return Weights(found, distilled, pattern, texts)


def side(weights: Weights) -> int:
    """Return the side of pictures that weights draw by default, in pixels."""
    from clvr_jax.miniature.render import SIDE

    return SIDE if weights.found.components["transformer"].variant == "miniature" else 1024


def networks(weights: Weights, attention: str = "auto", layers: str = "scan") -> Networks:
    """Return the networks of a folder; the text encoder stops after the last layer klein reads.

    Raises:
      ValueError: `layers` or `attention` is unknown.
    """
    implementation = resolve_attention(attention)
    if layers not in ("scan", "unrolled"):
        raise ValueError(f"layers is {layers!r}; choose scan or unrolled")
    configs = {name: c.config for name, c in weights.found.components.items()}
    text = configs["text_encoder"].as_text_encoder()
    fields = {"implementation": implementation, "scan": layers == "scan"}
    return Networks(
        flux2_transformer.Transformer(configs["transformer"], **fields),
        qwen3_decoder.Decoder(text, **fields),
        flux2_vae.Vae(configs["vae"]),
    )


def abstract(nets: Networks, dtype: Any) -> dict[str, Params]:
    """Return the parameters that sampling needs, as shapes."""
    return {
        "transformer": flux2_transformer.abstract_params(nets.transformer.cfg, dtype),
        "vae": flux2_vae.abstract_params(nets.vae.cfg, dtype),
        "text_encoder": language.abstract_params(nets.text_encoder.cfg, dtype, head=False),
    }


def make_mesh(sizes: Mapping[str, int], devices: Sequence[int] = ()) -> Mesh | None:
    """Return the mesh of a config, or None on a single device.

    Args:
      sizes: of its axes.
      devices: numbers of its devices; empty for all.

    Raises:
      ValueError: there is no such device, or the sizes do not multiply to the number of devices.
    """
    present = jax.devices()
    missing = [number for number in devices if not 0 <= number < len(present)]
    if missing:
        raise ValueError(f"devices are {list(devices)}; there are {len(present)}, numbered from 0")
    chosen = [present[number] for number in devices] or present
    if chosen == present[:1]:
        return None
    return parallel.make_mesh(dict(sizes), chosen)


def load_image_model(
    weights: Weights,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    attention: str = "auto",
    layers: str = "scan",
    loras: Sequence[tuple[str, float]] = (),
) -> ImageModel:
    """Read a folder's weights onto the devices and return what samples.

    Args:
      weights: from `inspect_weights`.
      dtype: of every parameter (`resolve_dtype`).
      mesh: where parameters are spread; None for one device.
      attention: attention implementation, or auto.
      layers: scan or unrolled.
      loras: LoRA files with scales, merged into the transformer in this order.

    Raises:
      ValueError: an option is unknown, or a file does not fit.
    """
    nets = networks(weights, attention, layers)
    params = {}
    with ThreadPoolExecutor(1) as beside:  # importing transformers takes as long as a small model
        tokenizer = beside.submit(load_tokenizer, weights.found.shared["tokenizer"])
        for name, tree in abstract(nets, dtype).items():
            component = weights.found.components[name]
            places = parallel.shardings(tree, mesh) if mesh is not None else None
            params[name] = load(component.open(), tree, component.stacked, places)
    if loras:
        params["transformer"] = _with_loras(params["transformer"], loras)
    if layers == "unrolled":
        params = unrolled(params)
    return ImageModel(nets, params, tokenizer.result())


def unrolled(params: dict[str, Params]) -> dict[str, Params]:
    """Return the parameters of networks with `scan=False`; the given arrays are freed."""
    roots = {"transformer": flux2.STACKED, "text_encoder": qwen3.STACKED, "vae": ()}
    return {name: unstack(tree, roots[name]) for name, tree in params.items()}


def resolve_attention(name: str) -> str | None:
    """Return the attention implementation of a config's name; None, for "auto", by the device.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"attention is {name!r}; choose auto, {', '.join(IMPLEMENTATIONS)}")
    return None if name == "auto" else name


def resolve_dtype(name: str) -> Any:
    """Return the dtype of a config's name; "auto" by the device.

    Raises:
      ValueError: the name is unknown.
    """
    known = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in known:
        raise ValueError(f"dtype is {name!r}; choose auto, bfloat16 or float32")
    return known[name]


def _with_loras(params: Params, loras: Sequence[tuple[str, float]]) -> Params:
    from clvr_jax import lora
    from conversion.lora import read

    for path, scale in loras:
        adapters = read(Path(path), params)
        params = lora.merge(params, lora.scaled(adapters, scale))
    return params


def load_tokenizer(folder: Path) -> Any:
    """Return the Hugging Face tokenizer of a folder.

    Raises:
      ValueError: the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers reads: {error}") from error


def weight_fingerprint(weights: Weights) -> str:
    """Return the fingerprint of the transformer: the same for one set of weights in any layout."""
    component = weights.found.components["transformer"]
    recorded = weights.found.manifest.get("components", {}).get("transformer", {})
    if "fingerprint" in recorded:
        return recorded["fingerprint"]
    return fingerprint(component.open(), component.abstract(), component.stacked)


def use_mesh(mesh: Mesh | None) -> Any:
    """Return a context in which activations are spread over a mesh; does nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def describe_tree(name: str, tree: Params, mesh: Mesh | None) -> int:
    """Print parameters of a tree and, on a mesh, each leaf's sharding; return bytes per device."""
    flat, size = flatten(tree), 0
    chosen, notes = ({}, {}) if mesh is None else parallel.specs(tree, mesh)
    for path, leaf in flat.items():
        shape = leaf.shape
        if mesh is not None:
            shape = NamedSharding(mesh, chosen[path]).shard_shape(shape)
            print(f"  {name}/{path} {leaf.shape} {chosen[path]}", *notes.get(path, []))
        size += math.prod(shape) * leaf.dtype.itemsize
    print(f"{name}: {count(tree):,} parameters, {size / 2**30:.2f} GiB per device")
    return size


def describe(nets: Networks, layout: Layout, dtype: Any, mesh: Mesh | None) -> None:
    """Print parameters, bytes per device and, on a mesh, the sharding of every leaf."""
    total = sum(describe_tree(name, tree, mesh) for name, tree in abstract(nets, dtype).items())
    print(f"weights: {total / 2**30:.2f} GiB per device")
    print(f"sequence: {layout.text} text + {layout.image_tokens} image tokens, {layout.pattern}")
