"""Write a random toy klein in diffusers' layout, to try every command without weights.

  python -m launch.toy OUT [--seed=0]

The folder has the shape of a released one (transformer, VAE, text encoder, tokenizer, scheduler)
at toy width, and diffusers loads it. Its weights are random: its pictures are noise by nature.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from absl import app, flags

from launch.runtime import run

_SEED = flags.DEFINE_integer("seed", 0, "seed of the weights")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.42.1",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def main(argv) -> None:
    """Write the folder that the command line names."""
    if len(argv) != 2:
        raise app.UsageError("give one folder to write: python -m launch.toy OUT")
    write(Path(argv[1]), _SEED.value)
    print(argv[1])


def write(out: Path, seed: int = 0) -> None:
    """Write the toy folder, aside and then renamed.

    Raises:
      FileExistsError: `out` exists.
    """
    from conversion.components import KINDS, Component
    from conversion.sinks import write_mapped
    from conversion.sources import TreeSource

    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, (config, tree) in random_weights(seed).items():
        component = Component(name, "diffusers", partial / name, config)
        (partial / name).mkdir(parents=True)
        (partial / name / "config.json").write_text(component.config_text())
        write_mapped(
            partial / name,
            TreeSource(tree),
            component.table("diffusers"),
            component.abstract(),
            stem=KINDS[name].stem,
        )
    (partial / "scheduler").mkdir()
    (partial / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    (partial / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    byte_tokenizer().save_pretrained(partial / "tokenizer")
    os.replace(partial, out)


def random_weights(seed: int) -> dict[str, tuple[Any, Any]]:
    """Return (config, parameter tree of numpy arrays) of each component at toy width."""
    import numpy as np

    from clvr_jax.models.flux2 import config as flux2
    from clvr_jax.models.flux2 import transformer, vae
    from clvr_jax.models.qwen3 import config as qwen3
    from clvr_jax.models.qwen3 import decoder
    from clvr_jax.tree import flatten, unflatten

    rng = np.random.default_rng(seed)
    text = dataclasses.replace(qwen3.VARIANTS["tiny"], layers=28)
    dit, autoencoder = flux2.TRANSFORMER_VARIANTS["tiny"], flux2.VAE_VARIANTS["tiny"]
    stacked = {"transformer": flux2.STACKED, "vae": (), "text_encoder": qwen3.STACKED}

    def draw(path: str, shape: tuple[int, ...], layered: bool):
        own = shape[1:] if layered else shape
        if path.endswith(("scale", "var")):
            return rng.uniform(0.8, 1.2, shape).astype(np.float32)
        if len(own) < 2:
            return (0.1 * rng.standard_normal(shape)).astype(np.float32)
        fan_in = np.prod(own[:-1]) if len(own) == 4 and "blocks" not in path else own[0]
        if path.endswith("embedding"):
            fan_in = 1
        return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def fill(name: str, abstract):
        flat = flatten(abstract)
        return unflatten(
            {
                path: draw(path, leaf.shape, path.startswith(tuple(r + "/" for r in stacked[name])))
                for path, leaf in flat.items()
            }
        )

    return {
        "transformer": (dit, fill("transformer", transformer.abstract_params(dit))),
        "vae": (autoencoder, fill("vae", vae.abstract_params(autoencoder))),
        "text_encoder": (text, fill("text_encoder", decoder.abstract_params(text))),
    }


def byte_tokenizer():
    """Return a tokenizer of single bytes with Qwen's special tokens and chat format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    run(main)
