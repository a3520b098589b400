"""A vision-language model: how it is loaded and kept, and how it speaks.

python -m launch.serve --weights=FOLDER --config=configs/vlm.py
python -m launch.ask --weights=FOLDER --image=a.png --prompt="what is this?"

Variants: `instruct` samples as Qwen3-VL-Instruct's generation_config.json says, `thinking` as the
Thinking editions' authors evaluate them, `greedy` takes the likeliest token.
"""

import ml_collections as mlc

_SAMPLING = {
    "instruct": dict(temperature=0.7, top_p=0.8, top_k=20),
    "thinking": dict(temperature=0.6, top_p=0.95, top_k=20),
    "greedy": dict(temperature=0.0, top_p=1.0, top_k=0),
}


def get_config(variant: str = "instruct") -> mlc.ConfigDict:
    """Return the config of a variant."""
    if variant not in _SAMPLING:
        raise ValueError(f"variant {variant!r} is unknown; choose from {', '.join(_SAMPLING)}")
    c = mlc.ConfigDict(_SAMPLING[variant])  # of launch.ask; a server's clients say their own
    c.max_tokens = 1024
    c.presence_penalty = 0.0  # Qwen's own evaluation of Instruct uses 1.5
    c.dtype = "auto"  # bfloat16 on accelerators, float32 on CPUs
    c.context = -1  # most tokens of a conversation; -1: 16,384, or fewer if the model ends before
    c.cache_gib = -1.0  # for the keys and values of all conversations; -1: most of what is free
    c.max_rows = 16  # turns generated at once, a power of two
    c.attention = "auto"  # auto, reference, blocked, cudnn
    c.template = mlc.ConfigDict(dict(enable_thinking=False))  # names for the chat template
    c.remote = mlc.ConfigDict(
        dict(  # of a model behind a server
            sampling_extensions=True,  # it takes top_k and the like; OpenAI's own API does not
            max_tokens_field="max_tokens",  # or max_completion_tokens
            timeout=120.0,  # seconds without a byte, after which a turn is asked again
            max_in_flight=8,  # turns asked at the same time
            cache="",  # folder for replies, which are then not paid for again
            transcript="",  # file to which every exchange is added
        )
    )
    c.devices = ()  # their numbers; (): all that there are
    c.mesh = mlc.ConfigDict(dict(data=1, fsdp=1, tensor=-1))  # -1: the devices that are left
    return c
