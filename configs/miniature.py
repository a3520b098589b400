"""The miniature's networks from nothing: its VAE, its klein, its Qwen3-VL, on a world of shapes.

python -m launch.miniature --out=outputs/miniature                  # every stage, one after another
python -m launch.train --config=configs/miniature.py:vae --workdir=runs/vae \
  --config.weights=FOLDER                                           # one of them

Variants: `vae`; `klein` (transformer and text encoder, together; the VAE is frozen); `klein_more`
and `klein_long` (the same, on from weights that the one before left; the last with room for prompts
that say all of a full picture); `vlm` (reading pictures). Nothing is read from a disk but the first
weights, which `launch.miniature` draws at random: a row of a step is a number, and all of it comes
from that and the seed.
"""

import ml_collections as mlc

_STEPS = {"vae": 4000, "klein": 4800, "klein_more": 6000, "klein_long": 4000, "vlm": 9000}
_ROWS = {"vae": 16, "klein": 32, "klein_more": 32, "klein_long": 32, "vlm": 2}
_RATE = {"vae": 3e-3, "klein": 3e-3, "klein_more": 2e-3, "klein_long": 2e-3, "vlm": 2e-3}


def get_config(variant: str = "klein") -> mlc.ConfigDict:
    """Return the config of a variant."""
    if variant not in _STEPS:
        raise ValueError(f"variant {variant!r} is unknown; choose from {', '.join(_STEPS)}")
    section = lambda **fields: mlc.ConfigDict(fields)
    klein = variant.startswith("klein")
    c = mlc.ConfigDict(dict(stage="world_klein" if klein else f"world_{variant}"))
    c.sizes = "miniature"  # what the weights must be; empty: whatever they are
    c.weights = "outputs/miniature/begin"  # a folder or run: what is trained on from, what is kept
    c.seed = 0
    c.epochs = 0  # there are none: data never repeat
    c.steps = _STEPS[variant]
    c.data = section(train="train", validation="", threads=1)  # splits of the world
    if klein:
        # text lengths; a prompt takes the smallest that it fits into
        c.text = (32, 56, 144) if variant == "klein_long" else (32, 48, 112)
        # steps of a round: prompts, edits, edits with a second reference
        c.tasks = section(prompts=8, edits=5, brings=2)
        c.times = section(distribution="logit_normal", mean=0.0, std=1.2)
        c.times.shift = "2.5"  # what is drawn where is decided in much noise
        c.times.weighting = "none"
        c.dropout = 0.1  # share of rows without text, for guidance
    if variant == "vlm":
        c.data.tokens = 2048  # of a row that begins with a long lesson
        c.data.images = 20  # of such a row
        c.data.positions = 4096  # over which conversations are spread, as the loop's come to be
        # steps of a round: short lessons, in three times as many rows; long ones, as stories are
        c.tasks = section(short=2, long=2)
        # shares of lessons among the short ones, of a question and an answer
        c.lessons = section(inventory=0.04, caption=0.02, difference=0.04, critique=0.26)
        c.lessons.update(verify=0.04, choose=0.04, checklist=0.02, rewrite=0.02, repeat=0.02)
        c.lessons.update(compare=0.1, find=0.16, need=0.08, clear=0.2)
        c.lessons.update(story=0.8, proxy=0.1, narrate=0.1)  # and among the long ones
        c.template = section(enable_thinking=False)  # names for the chat template
        c.chunk = 512  # tokens whose scores over the vocabulary exist at once
    c.batch = section(rows=_ROWS[variant], accumulation=1)  # rows: per device, data and fsdp
    c.train = ".*"
    if variant == "vae":
        c.train = "^(encoder|decoder|quant_conv|post_quant_conv)/"  # not the latents' statistics
    c.lora = section(rank=0, alpha=0.0, pattern=r"kernel$")
    c.precision = "float32"  # float32, mixed, bfloat16
    c.ema = 0.999
    c.remat = "none"  # none, full, attention, dots
    c.attention = "blocked" if variant == "vlm" else "reference"  # sequences are short
    c.optim = section(
        name="muon",  # a step is worth several of AdamW
        learning_rate=_RATE[variant],
        schedule="cosine",
        warmup=0.02,  # steps, or a share of all below 1
        end=0.01,
        momentum=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.01,
        decay=r"(kernel|embedding|/a|/b)$",
        clip_norm=1.0,
        groups=(),  # ((pattern, factor of the learning rate), ...)
        moments="float32",  # or bfloat16
    )
    c.mesh = section(data=1, fsdp=-1, tensor=1, context=1)  # -1: the devices that are left
    c.log = 50
    c.save = section(every=500, last=2, keep_every=0, best=0, metric="loss", folder="")
    c.validation = section(every=0, steps=16)  # needs data.validation
    c.preview = section(every=0)  # there are none: `launch.evaluate miniature` shows more
    c.trackers = ()  # tensorboard, wandb
    return c
