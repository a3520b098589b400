"""Image SFT: the klein transformer learns every picture of a trajectory, given what led to it.

python -m launch.data validate trajectories.jsonl
python -m launch.train --config=configs/image_sft.py:klein_4b --workdir=runs/image_sft \
  --config.data.train=trajectories.jsonl --dry_run
python -m launch.train --config=configs/image_sft.py:klein_4b --workdir=runs/image_sft \
  --config.data.train=trajectories.jsonl

Variants: `klein_4b`, `klein_9b` (the paper's stage: full fine-tuning of the transformer, 3 epochs,
one picture per device), `miniature` (adapters for the weights that come with the package, on a
laptop), `toy` (random weights of `python -m launch.toy`).
The paper gives no learning rate, warm-up or resolution that survived; those here are choices: 1e-5
as DiffSynth-Studio's full fine-tuning of FLUX.2, pictures of 1024 x 1024 pixels. Fine-tune base
weights, not distilled ones, as Black Forest Labs advise.

Computed, not measured (`--dry_run --target=h20x8`, or h200x8, v5e-64, v6e-32, ...), for the paper's
20,861 trajectories of about 2.5 pictures, texts of up to 2,048 tokens, one reference:
  klein_4b: 8 x H20 13.9 GiB a device, 3.2 s a step, 17 hours; 8 x H200 0.62 s a step, 3.4 hours
  klein_9b: 8 x H20 27.3 GiB a device, 6.5 s a step, 35 hours; 8 x H200 1.3 s a step, 7 hours
"""

import ml_collections as mlc

_WEIGHTS = {
    "klein_4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "klein_9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "miniature": "miniature",
    "toy": "outputs/toy",
}


def get_config(variant: str = "miniature") -> mlc.ConfigDict:
    """Return the config of a variant."""
    if variant not in _WEIGHTS:
        raise ValueError(f"variant {variant!r} is unknown; choose from {', '.join(_WEIGHTS)}")
    small = variant in ("miniature", "toy")
    section = lambda **fields: mlc.ConfigDict(fields)
    c = mlc.ConfigDict(dict(stage="image"))
    # what the weights must be; empty: whatever they are
    c.sizes = "" if variant == "toy" else variant
    c.weights = _WEIGHTS[variant]  # diffusers folder, converted folder, hub id, or a run's folder
    c.seed = 0
    c.epochs = 3
    c.steps = 0  # this many optimiser steps instead of whole epochs; 0: epochs
    c.data = section(
        train="",  # JSON, JSONL, ArrayRecord or Parquet, or a folder of them
        validation="",  # the same, never trained on
        threads=4,  # read and decode at the same time
        features="",  # folder of precomputed text features and latents; empty: made on the fly
    )
    # what of a trajectory the transformer is given (clvr_jax/data/conditioning.py), recorded with
    # the weights
    c.condition = section(text="trajectory", references="all", last_k=0)
    c.condition.buckets = (512, 1024, 2048)
    c.pictures = section(
        areas=((64 * 64),) if small else ((1024 * 1024),),  # further ones take smaller pictures
        pattern="full",  # who attends to whom: full as klein; causal and kv as experiments
        rejected=False,  # learn pictures that the trajectory itself rejected
        reference_noise=0.0,  # in the latents of references, against flaws that add up; 0: none
    )
    # noise levels: clvr_jax/diffusion/path.py tells the sources of these choices
    c.times = section(distribution="logit_normal", mean=0.0, std=1.0)
    c.times.shift = "dynamic"  # or a number, "3.0"
    c.times.weighting = "none"
    c.dropout = 0.0  # share of rows without text, for weights sampled with guidance
    c.batch = section(rows=1, accumulation=1)  # rows: per device along data and fsdp
    c.train = ".*"  # pattern of the parameters that are trained
    c.lora = section(rank=0, alpha=0.0, pattern=r"blocks/.*kernel$")  # rank 0: no adapters
    c.precision = "float32" if small else "mixed"  # float32, mixed, bfloat16
    c.ema = 0.0
    c.remat = "none" if small else "full"  # none, full, attention, dots
    c.attention = "auto"
    c.optim = section(
        name="adamw",
        learning_rate=1e-3 if small else 1e-5,
        schedule="constant",
        warmup=0.0 if small else 100.0,  # steps, or a share of all below 1
        end=0.0,
        momentum=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        decay=r"(kernel|embedding|/a|/b)$",
        clip_norm=1.0,
        groups=(),  # ((pattern, factor of the learning rate), ...)
        moments="float32",  # or bfloat16
    )
    c.mesh = section(data=1, fsdp=-1, tensor=1, context=1)  # -1: the devices that are left
    c.log = 10
    c.save = section(every=500, last=2, keep_every=0, best=0, metric="validation_loss", folder="")
    c.validation = section(every=500, steps=16)  # needs data.validation
    c.preview = section(
        every=500,
        samples=4,  # of the validation data, else of the training data, with their conditions
        prompts=(),
        seed=0,
        steps=4 if small else 28,
        guidance=1.0 if small else 4.0,
    )
    c.trackers = ()  # tensorboard, wandb
    if variant == "miniature":  # as its weights were trained, and sampled
        c.condition.update(text="instruction", references="chosen", buckets=(32, 56, 144))
        c.times.update(std=1.2, shift="2.5")
        c.dropout, c.ema, c.attention = 0.1, 0.99, "reference"
        c.pictures.reference_noise, c.optim.learning_rate, c.epochs = 0.3, 4e-4, 2
        c.batch.rows, c.lora.rank = 32, 32
        c.optim.schedule = "cosine"
        c.preview.update(steps=28, guidance=4.0)
    return c
