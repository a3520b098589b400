"""Sizes of dense Qwen3-VL models and their config.json in transformers' layout."""

from collections.abc import Mapping
from typing import Any

from clvr_jax.models.config import Fields
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3_vl.sizes import Qwen3VLConfig, VisionConfig

# roots whose leaves carry a leading layer axis
STACKED = ("language/layers", "visual/blocks", "visual/deepstack_merger_list")
VISION_ROPE_THETA = 10000.0
VISION_EPS = 1e-6  # of every LayerNorm; no field of config.json

_TOKENS = dict(image_token=151655, vision_start=151652, vision_end=151653, video_token=151656)


def _released(
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
    *,
    tied: bool,
    vision: tuple[int, int, int],
    deepstack: tuple[int, ...],
) -> Qwen3VLConfig:
    """What all released sizes share: 8 kv heads of 128, theta 5e6, patches of 16 in cells of 2x2.

    `vision` is (width, layers, MLP width).
    """
    text = Qwen3Config(
        vocab=151936,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_width=128,
        mlp_width=mlp_width,
        rope_theta=5e6,
        eps=1e-6,
        tied=tied,
        max_positions=262144,
        mrope_section=(24, 20, 20),
    )
    tower = VisionConfig(
        width=vision[0],
        layers=vision[1],
        heads=16,
        mlp_width=vision[2],
        patch=16,
        temporal_patch=2,
        merge=2,
        out_width=width,
        positions=2304,
        deepstack=deepstack,
    )
    return Qwen3VLConfig(text, tower, **_TOKENS)


_SMALL = dict(tied=True, vision=(1024, 24, 4096), deepstack=(5, 11, 17))
_LARGE = dict(tied=False, vision=(1152, 27, 4304), deepstack=(8, 16, 24))
VARIANTS = {
    "qwen3_vl_2b": _released(2048, 28, 16, 6144, **_SMALL),
    "qwen3_vl_4b": _released(2560, 36, 32, 9728, **_SMALL),
    "qwen3_vl_8b": _released(4096, 36, 32, 12288, **_LARGE),
    "qwen3_vl_32b": _released(5120, 64, 64, 25600, **_LARGE),
    "tiny": Qwen3VLConfig(
        Qwen3Config(512, 32, 4, 4, 2, 16, 48, 5e6, 1e-6, tied=False, mrope_section=(4, 2, 2)),
        VisionConfig(24, 4, 2, 36, 16, 2, 2, 32, 16, (0, 1, 2)),
        image_token=503,
        vision_start=500,
        vision_end=501,
        video_token=504,
    ),
    # patches of 8 pixels, so that a picture of 64 x 64 is 16 tokens
    "miniature": Qwen3VLConfig(
        Qwen3Config(
            768,
            192,
            4,
            6,
            2,
            32,
            512,
            5e6,
            1e-6,
            tied=True,
            max_positions=4096,
            mrope_section=(6, 5, 5),
        ),
        VisionConfig(96, 2, 3, 256, 8, 2, 2, 192, 64, (0,)),
        image_token=7,
        vision_start=5,
        vision_end=6,
        video_token=8,
    ),
}

# our names of sizes and config.json's
_VISION = {
    "width": "hidden_size",
    "layers": "depth",
    "heads": "num_heads",
    "mlp_width": "intermediate_size",
    "patch": "patch_size",
    "temporal_patch": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "out_width": "out_hidden_size",
    "positions": "num_position_embeddings",
    "in_channels": "in_channels",
}
_IDS = {
    "image_token": "image_token_id",
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "video_token": "video_token_id",
}
# what nothing here reads; the last two are tags of a training tool
_UNUSED = (*qwen3.UNUSED, "unsloth_fixed", "unsloth_version")


def from_json(values: Mapping[str, Any]) -> Qwen3VLConfig:
    """Read a Qwen3-VL config.json (transformers 4 and 5 spellings).

    Every size is the file's own: the defaults of transformers' classes match no released model.

    Raises:
      ValueError: a field is missing, unknown, or asks for what this model does not do.
    """
    top = Fields("config.json", values)
    _refuse_experts(values, values.get("text_config") or {})
    top.expect("model_type", "qwen3_vl")
    # transformers ties by this field alone, whatever text_config says
    tied = top.take("tie_word_embeddings")
    text = _text(Fields("config.json, text_config", top.take("text_config")), tied)
    vision = _vision(Fields("config.json, vision_config", top.take("vision_config")))
    top.expect("hidden_size", text.width)  # some training tools repeat these for their own use
    top.expect("vocab_size", text.vocab)
    cfg = Qwen3VLConfig(text, vision, **_integers(top, _IDS))
    top.done(ignore=_UNUSED)
    return cfg


def to_json(cfg: Qwen3VLConfig) -> dict[str, Any]:
    """Write a config.json that transformers 4 and 5 read; the inverse of `from_json`."""
    not_here = ("architectures", "tie_word_embeddings", "use_sliding_window")
    text = {k: v for k, v in qwen3.to_json(cfg.text).items() if k not in not_here}
    rope = {"rope_type": "default", "mrope_interleaved": True}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": cfg.text.tied,
        **{theirs: getattr(cfg, ours) for ours, theirs in _IDS.items()},
        "text_config": {
            **text,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {**rope, "mrope_section": list(cfg.text.mrope_section)},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            **{theirs: getattr(cfg.vision, ours) for ours, theirs in _VISION.items()},
            "deepstack_visual_indexes": list(cfg.vision.deepstack),
        },
    }


def _text(fields: Fields, tied: bool) -> Qwen3Config:
    fields.expect("model_type", "qwen3_vl_text")
    theta, rope = qwen3.take_rope(fields)
    table = Fields(f"{fields.name}, rope fields", rope)
    section = tuple(table.take("mrope_section"))
    if table.take("mrope_interleaved") is not True:
        raise ValueError(f"{table.name}: mrope_interleaved is not true; this model supports true")
    table.done()
    cfg = Qwen3Config(
        **qwen3.take_sizes(fields),
        rope_theta=theta,
        tied=tied,
        max_positions=fields.take("max_position_embeddings"),
        mrope_section=section,
    )
    fields.done(ignore=(*_UNUSED, "tie_word_embeddings"))
    return cfg


def _vision(fields: Fields) -> VisionConfig:
    fields.expect("model_type", "qwen3_vl", "qwen3_vl_vision")
    fields.expect("hidden_act", "gelu_pytorch_tanh")
    rope = Fields(f"{fields.name}, rope_parameters", fields.take("rope_parameters", None) or {})
    rope.expect("rope_theta", VISION_ROPE_THETA)
    rope.expect("rope_type", "axial", "default")
    rope.done()
    blocks = tuple(fields.take("deepstack_visual_indexes"))
    cfg = VisionConfig(**_integers(fields, _VISION), deepstack=blocks)
    fields.done(ignore=(*_UNUSED, "tie_word_embeddings"))
    return cfg


def _integers(fields: Fields, names: Mapping[str, str]) -> dict[str, int]:
    """Take whole numbers, by our names."""
    taken = {ours: fields.take(theirs) for ours, theirs in names.items()}
    for ours, value in taken.items():
        if type(value) is not int:
            raise ValueError(
                f"{fields.name}: {names[ours]} is {value!r}; this model supports one whole number"
            )
    return taken


def _refuse_experts(*parts: Mapping[str, Any]) -> None:
    """Name the mixture-of-experts relatives, whose files look alike."""
    for part in parts:
        kind = str(part.get("model_type"))
        if "moe" in kind:
            raise ValueError(
                f"config.json: model_type is {kind!r}, a mixture of experts; expected a dense "
                "Qwen3-VL (2B, 4B, 8B, 32B or a fine-tune of them)"
            )
