"""Toy checkpoints in every layout, written by the safetensors library."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from clvr_jax.models.flux2.config import TransformerConfig, VaeConfig
from clvr_jax.models.qwen3.config import Qwen3Config
from conversion.components import Component
from conversion.rules import file_specs

TRANSFORMER = TransformerConfig(
    heads=2,
    head_width=16,
    double_blocks=2,
    single_blocks=3,
    text_width=72,  # three times the text encoder's 24
    channels=16,  # four times the VAE's latent channels
    rope_axes=(4, 4, 4, 4),
    time_width=32,
)
VAE = VaeConfig(widths=(4, 8, 12, 12), latent_channels=4, groups=4, layers_per_block=1)
TEXT_ENCODER = Qwen3Config(64, 24, 3, 4, 2, 8, 40, 1e6, 1e-6, tied=True)
UNTIED = dataclasses.replace(TEXT_ENCODER, tied=False)
CONFIGS = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT_ENCODER}

INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.37.0",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def component(name: str, config=None, layout: str = "diffusers", path: str = "none") -> Component:
    """A component without files."""
    return Component(name, layout, Path(path), config or CONFIGS[name])


def random_tensors(specs, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    """Normal numbers for every name; int64 zero for the counter."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(dtype) if shape else np.zeros((), np.int64)
        for name, shape in specs.items()
    }


def tensors(name: str, layout: str, dtype=np.float32, config=None, seed=0) -> dict[str, np.ndarray]:
    """Random tensors of a component in a file layout."""
    part = component(name, config)
    return random_tensors(file_specs(part.table(layout), part.abstract()), dtype, seed)


def save(path: Path, values: dict[str, np.ndarray], prefix: str = "") -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: np.array(value, order="C") for name, value in values.items()}
    save_file(named, path, metadata={"format": "pt"})
    return path


def save_sharded(folder: Path, values: dict[str, np.ndarray], stem: str, shards: int) -> None:
    """Write a sharded folder: tensors dealt round the files, the index in reverse order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(values)
    files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save(folder / file, {name: values[name] for name in names[i::shards]})
    weight_map = {name: files[i % shards] for i, name in reversed(list(enumerate(names)))}
    total = sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def pipeline(folder: Path, dtype=np.float32, shards: int = 0, **configs) -> dict[str, dict]:
    """Write a whole diffusers folder; return its tensors by component."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    written = {}
    for seed, name in enumerate(CONFIGS):
        part = component(name, configs.get(name))
        values = tensors(name, "diffusers", dtype, part.config, seed)
        written[name] = values
        place = folder / name
        if shards and name != "vae":
            save_sharded(place, values, part.kind.stem, shards)
        else:
            save(place / f"{part.kind.stem}.safetensors", values)
        # spaced in a way of its own, so that a copied text can be told from a rewritten one
        text = json.dumps(part.kind.to_json(part.config), indent=3)
        (place / "config.json").write_text(text)
    (folder / "text_encoder" / "generation_config.json").write_text('{"do_sample": true}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    return written


def parameters(values: dict[str, np.ndarray]) -> int:
    """Number of scalars, the counter left out."""
    return sum(math.prod(value.shape) for value in values.values() if value.dtype.kind != "i")
