"""VLM SFT: Qwen3-VL learns to plan, look and decide from whole trajectories.

python -m launch.data validate trajectories.jsonl
python -m launch.train --config=configs/vlm_sft.py:qwen3_vl_8b --workdir=runs/vlm_sft \
  --config.data.train=trajectories.jsonl --dry_run
python -m launch.train --config=configs/vlm_sft.py:qwen3_vl_8b --workdir=runs/vlm_sft \
  --config.data.train=trajectories.jsonl

Variants: `qwen3_vl_8b` (the paper's stage: full fine-tuning, loss on assistant turns, bfloat16,
cosine with warm-up, 3 epochs), `miniature` (adapters for the weights that come with the package, on
a laptop), `toy` (random weights of `python -m launch.toy --model=vlm`).
The paper's learning rate and warm-up ratio are lost; 1e-5 and 0.1 are choices, LLaMA-Factory's for
Qwen3-VL, which also freezes the vision tower by default: `--config.train="^language/"` does that.

The paper's step is 64 trajectories: 8 devices x accumulation 8, one conversation a row. Rows here
are packed and hold three or four, so that accumulation 2 is that step on 8 devices.

Computed, not measured (`--dry_run --target=h20x8`, or h200x8, v5e-64, v6e-32, ...), for 20,861
trajectories of about 5,000 tokens, 3 epochs, 1,200 steps:
  qwen3_vl_8b: 8 x H20 33.2 GiB a device, 22 s a step, 7 hours; 8 x H200 4.3 s a step, 1.4 hours
"""

import ml_collections as mlc

_WEIGHTS = {
    "qwen3_vl_8b": "Qwen/Qwen3-VL-8B-Instruct",
    "miniature": "miniature-vlm",
    "toy": "outputs/toy-vl",
}


def get_config(variant: str = "miniature") -> mlc.ConfigDict:
    """Return the config of a variant."""
    if variant not in _WEIGHTS:
        raise ValueError(f"variant {variant!r} is unknown; choose from {', '.join(_WEIGHTS)}")
    small = variant in ("miniature", "toy")
    section = lambda **fields: mlc.ConfigDict(fields)
    c = mlc.ConfigDict(dict(stage="vlm"))
    # what the weights must be; empty: whatever they are
    c.sizes = "" if variant == "toy" else variant
    c.weights = _WEIGHTS[variant]  # transformers folder, converted folder, hub id, a run's folder
    c.seed = 0
    c.epochs = 3
    c.steps = 0  # this many optimiser steps instead of whole epochs; 0: epochs
    c.data = section(
        train="",  # JSON, JSONL, ArrayRecord or Parquet, or a folder of them
        validation="",  # the same, never trained on
        threads=4,  # read and decode at the same time
        tokens=1024 if small else 16384,  # of a row; several conversations share one
        images=-1,  # of a row at most; -1: no limit
        positions=0,  # over which conversations are spread, so that longer ones are known; 0: none
    )
    c.template = section(enable_thinking=False)  # names for the chat template, as in vlm.py
    c.batch = section(rows=1, accumulation=1 if small else 2)  # rows: per device, data and fsdp
    c.train = ".*"  # pattern of the parameters that are trained; "^language/" freezes the tower
    c.lora = section(  # rank 0: no adapters
        rank=0, alpha=0.0, pattern=r"^language/layers/.*kernel$"
    )
    c.chunk = 512  # tokens whose scores over the vocabulary exist at once
    c.precision = "float32" if small else "mixed"  # float32, mixed, bfloat16
    c.ema = 0.0
    c.remat = "none" if small else "full"  # none, full, attention, dots
    c.attention = "auto"
    c.optim = section(
        name="adamw",
        learning_rate=1e-3 if small else 1e-5,
        schedule="cosine",
        warmup=0.1,  # a share of all steps, or steps from 1 on
        end=0.0,
        momentum=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        decay=r"(kernel|embedding|/a|/b)$",
        clip_norm=1.0,
        groups=(),  # ((pattern, factor of the learning rate), ...)
        moments="float32",  # or bfloat16
    )
    c.mesh = section(data=1, fsdp=-1, tensor=1, context=1)  # -1: the devices that are left
    c.log = 10
    c.save = section(every=100, last=2, keep_every=0, best=0, metric="validation_loss", folder="")
    c.validation = section(every=100, steps=16)  # needs data.validation
    c.preview = section(
        every=0 if small else 100,
        samples=2,  # goals of the validation data, else of the training data; answered greedily
        tokens=256,
    )
    c.trackers = ()  # tensorboard, wandb
    if variant == "miniature":
        c.epochs = 1  # as what comes with the package has seen
        c.data.tokens = 4096  # as long as the model's conversations can be: examples are never cut
        c.data.positions = 4096  # short ones are spread over as many
        c.lora.update(rank=16, pattern=r"(layers|blocks|merger).*kernel$")
        c.attention = "blocked"
    return c
