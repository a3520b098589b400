"""Sampling of pictures.

python -m launch.generate --weights=FOLDER --prompt="a cup" --config=configs/generate.py:auto

Variants: `auto` takes steps, guidance and attention pattern from what the weights say they are;
`distilled` (4 steps), `base` (28 steps, guidance 4, the paper's setting), `base_50` (the released
recipe of base weights), `kv` (klein-9b-kv).
"""

import ml_collections as mlc

_SAMPLING = {
    "auto": dict(steps=-1, guidance=-1.0, pattern="auto"),
    "distilled": dict(steps=4, guidance=1.0, pattern="full"),
    "base": dict(steps=28, guidance=4.0, pattern="full"),
    "base_50": dict(steps=50, guidance=4.0, pattern="full"),
    "kv": dict(steps=4, guidance=1.0, pattern="kv"),
}


def get_config(variant: str = "auto") -> mlc.ConfigDict:
    """Return the config of a variant; -1 and "auto" are read off the weights and references."""
    if variant not in _SAMPLING:
        raise ValueError(f"variant {variant!r} is unknown; choose from {', '.join(_SAMPLING)}")
    c = mlc.ConfigDict(_SAMPLING[variant])
    c.height = -1  # pixels, a multiple of 16; -1: of the first reference, else of the weights
    c.width = -1
    c.text_tokens = -1  # -1: as the weights were trained, which is 512 for the released ones
    c.rounding = "none"  # of the noise level: none, bfl, diffusers
    c.dtype = "auto"  # bfloat16 on accelerators, float32 on CPUs
    c.batch = 4  # pictures made at once
    c.layers = "scan"  # scan: fast to compile; unrolled: reads weights where they lie
    c.attention = "auto"  # auto, reference, blocked, cudnn
    c.loop = mlc.ConfigDict(
        dict(  # of modes that ask a vision-language model; how it speaks: --vlm_config
            generations=8,  # most pictures of a prompt
            seconds=-1.0,  # of a prompt; -1: no limit, as for the next two
            evaluations=-1,  # passes through the image network
            tokens=-1,  # that the model writes
            look=1,  # it sees every so many-th picture; 0: never
            # control: as trained; stock: for released weights; auto: as the image weights are;
            # none; or a file
            system="auto",
            constrain="auto",  # turns under a grammar: always, never, auto: where it can be had
            retries=3,  # of a step that failed
            best_of=4,  # pictures of --mode=best_of
            concurrency=8,  # prompts at once
        )
    )
    c.devices = ()  # their numbers; (): all that there are
    c.mesh = mlc.ConfigDict(dict(data=1, fsdp=-1, tensor=1))  # -1: the devices that are left
    return c
