"""Write a random toy klein or Qwen3-VL, or toy trajectories, to try every command without weights.

  python -m launch.toy OUT [--model=klein|vlm|trajectories] [--seed=0]

A model's folder has the shape of a released one at toy width, and diffusers or transformers loads
it. Its weights are random: its pictures are noise and its words are gibberish by nature.
Trajectories are pictures of 64 x 64 pixels to which every step adds a coloured shape.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from launch.folders import (
    CHAT_TEMPLATE,
    PREPROCESSOR,
    SEEING,
    SPECIAL,
    VLM_TEMPLATE,
    aside,
    with_picture_tokens,
    write_model,
    write_pipeline,
)
from launch.runtime import run

_SEED = flags.DEFINE_integer("seed", 0, "seed of the weights")
_MODEL = flags.DEFINE_enum("model", "klein", ["klein", "vlm", "trajectories"], "what to write")


def main(argv) -> None:
    """Write the folder that the command line names."""
    if len(argv) != 2:
        raise app.UsageError("give one folder to write: python -m launch.toy OUT")
    made = {"klein": write, "vlm": write_vlm, "trajectories": write_trajectories}
    made[_MODEL.value](Path(argv[1]), _SEED.value)
    print(argv[1])


def write_trajectories(out: Path, seed: int = 0) -> None:
    """Write 32 trajectories of one to three steps, aside and then renamed.

    Raises:
      FileExistsError: `out` exists.
    """
    from launch.toy_data import make

    with aside(out) as partial:
        make(partial, count=32, steps=(1, 2, 3), size=(64, 64), seed=seed)


def write(out: Path, seed: int = 0) -> None:
    """Write the toy folder, aside and then renamed.

    Raises:
      FileExistsError: `out` exists.
    """
    with aside(out) as partial:
        write_pipeline(partial, random_weights(seed), byte_tokenizer(), distilled=True)


def write_vlm(out: Path, seed: int = 0, **sizes: Any) -> None:
    """Write a toy Qwen3-VL in transformers' layout, aside and then renamed.

    Args:
      out: the folder.
      seed: of the weights.
      sizes: fields of the language half's config other than the tiny ones.

    Raises:
      FileExistsError: `out` exists.
    """
    import numpy as np

    from clvr_jax.models.qwen3_vl import config
    from clvr_jax.models.qwen3_vl.model import abstract_params
    from clvr_jax.tree import flatten, unflatten

    tokenizer = byte_tokenizer(SEEING, VLM_TEMPLATE)
    tiny = config.VARIANTS["tiny"]
    text = dataclasses.replace(tiny.text, **sizes)
    vision = dataclasses.replace(tiny.vision, out_width=text.width)
    cfg = with_picture_tokens(dataclasses.replace(tiny, text=text, vision=vision), tokenizer)
    rng = np.random.default_rng(seed)
    layered = lambda path: path.startswith(tuple(f"{root}/" for root in config.STACKED))
    tree = unflatten(
        {
            path: _draw(rng, path, leaf.shape, layered(path))
            for path, leaf in flatten(abstract_params(cfg)).items()
        }
    )
    with aside(out) as partial:
        write_model(partial, cfg, tree, tokenizer, PREPROCESSOR)


def _draw(rng: Any, path: str, shape: tuple[int, ...], layered: bool) -> Any:
    """Random numbers of a leaf, such that activations stay of order one."""
    import numpy as np

    from launch.fresh import fan_in

    own = shape[1:] if layered else shape
    if path.endswith(("scale", "var")):
        # sharp attention: a random model with a flat one repeats the same few tokens
        sharp = 2.0 if path.startswith("language/") and "self_attn" in path else 1.0
        return (sharp * rng.uniform(0.8, 1.2, shape)).astype(np.float32)
    if len(own) < 2 or path.endswith("bias"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    inputs = 1 if path.endswith("embedding") else fan_in(path, own)
    return (rng.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)


def random_weights(seed: int) -> dict[str, tuple[Any, Any]]:
    """Return (config, parameter tree of numpy arrays) of each component at toy width."""
    import numpy as np

    from clvr_jax.models.flux2 import config as flux2
    from clvr_jax.models.flux2 import transformer, vae
    from clvr_jax.models.qwen3 import config as qwen3
    from clvr_jax.models.qwen3 import language
    from clvr_jax.tree import flatten, unflatten

    rng = np.random.default_rng(seed)
    text = dataclasses.replace(qwen3.VARIANTS["tiny"], layers=28)
    dit, autoencoder = flux2.TRANSFORMER_VARIANTS["tiny"], flux2.VAE_VARIANTS["tiny"]
    stacked = {"transformer": flux2.STACKED, "vae": (), "text_encoder": qwen3.STACKED}

    def fill(name: str, abstract):
        flat, roots = flatten(abstract), stacked[name]
        return unflatten(
            {
                path: _draw(rng, path, leaf.shape, path.startswith(tuple(f"{r}/" for r in roots)))
                for path, leaf in flat.items()
            }
        )

    return {
        "transformer": (dit, fill("transformer", transformer.abstract_params(dit))),
        "vae": (autoencoder, fill("vae", vae.abstract_params(autoencoder))),
        "text_encoder": (text, fill("text_encoder", language.abstract_params(text))),
    }


def byte_tokenizer(
    special: Sequence[str] = SPECIAL, template: str = CHAT_TEMPLATE, words: Sequence[str] = ()
):
    """Return a tokenizer of single bytes with Qwen's special tokens and a chat format.

    Args:
      special: tokens, the last of all.
      template: the chat format.
      words: further tokens, which no text is ever given.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(known)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[0],
        eos_token=special[2],
        padding_side="right",
        chat_template=template,
    )


if __name__ == "__main__":
    run(main)
