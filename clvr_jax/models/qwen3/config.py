"""Sizes of Qwen3 decoders and their config.json in transformers' layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clvr_jax.models.config import Fields

KLEIN_LAYERS = (9, 18, 27)  # hidden states that klein reads: after this many layers
STACKED = ("layers",)  # roots whose leaves carry a leading layer axis
_TOKENS = {"bos_token_id": 151643, "eos_token_id": 151645}  # of Qwen's own vocabulary


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a decoder.

    Attributes:
      vocab: rows of the embedding, padding rows included.
      width: width of the residual stream.
      layers: decoder layers.
      heads: query heads.
      kv_heads: key and value heads; consecutive query heads share one.
      head_width: channels of a head, independent of width / heads.
      mlp_width: inner width of the gated MLP.
      rope_theta: base of the rotary frequencies.
      eps: epsilon of every RMSNorm.
      tied: whether the output head is the embedding.
      max_positions: longest context the checkpoint declares.
      mrope_section: frequencies that follow time, height and width in interleaved M-RoPE; None for
        plain positions.
      features: as a text encoder, the layer counts after which the stream is read.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float
    eps: float
    tied: bool
    max_positions: int = 40960
    mrope_section: tuple[int, int, int] | None = None
    features: tuple[int, ...] = KLEIN_LAYERS

    @property
    def feature_width(self) -> int:
        """Width of a text encoder's features."""
        return len(self.features) * self.width

    def as_text_encoder(self) -> "Qwen3Config":
        """Return the sizes without the layers after the last one that is read."""
        return dataclasses.replace(self, layers=self.features[-1])


# a field that transformers does not know and keeps; diffusers' pipeline takes it as an argument
FEATURES = "text_encoder_out_layers"

VARIANTS = {
    "qwen3_4b": Qwen3Config(151936, 2560, 36, 32, 8, 128, 9728, 1e6, 1e-6, tied=True),
    "qwen3_8b": Qwen3Config(151936, 4096, 36, 32, 8, 128, 12288, 1e6, 1e-6, tied=False),
    "tiny": Qwen3Config(512, 32, 36, 4, 2, 16, 48, 1e6, 1e-6, tied=True),
    "miniature": Qwen3Config(
        768, 128, 3, 4, 2, 32, 384, 1e6, 1e-6, tied=True, max_positions=4096, features=(1, 2, 3)
    ),
}

# of config.json, what only training, generation or torch reads
UNUSED = (
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "max_window_layers",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "problem_type",
    "tie_encoder_decoder",
    "cross_attention_hidden_size",
    "bad_words_ids",
)


def from_json(values: Mapping[str, Any]) -> Qwen3Config:
    """Read a text-only Qwen3 config.json (transformers 4 and 5 spellings).

    Raises:
      ValueError: a field is missing, unknown, or asks for what this decoder does not do.
    """
    fields = Fields("config.json", values)
    fields.expect("model_type", "qwen3")
    fields.expect("use_sliding_window", False)
    fields.expect("sliding_window", None)
    sizes = take_sizes(fields)
    fields.expect("layer_types", None, ("full_attention",) * sizes["layers"])
    theta, rope = take_rope(fields)
    if rope:
        raise ValueError(
            f"{fields.name}: its rope parameters have fields unknown here: {sorted(rope)}"
        )
    cfg = Qwen3Config(
        **sizes,
        rope_theta=theta,
        tied=fields.take("tie_word_embeddings"),
        max_positions=fields.take("max_position_embeddings", 40960),
        features=tuple(fields.take(FEATURES, KLEIN_LAYERS)),
    )
    fields.done(ignore=UNUSED)
    return cfg


def take_sizes(fields: Fields) -> dict[str, Any]:
    """Take the fields that every Qwen3 decoder has, as arguments of `Qwen3Config`.

    Raises:
      ValueError: a field is missing, or asks for what this decoder does not do.
    """
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    return {
        "vocab": fields.take("vocab_size"),
        "width": fields.take("hidden_size"),
        "layers": fields.take("num_hidden_layers"),
        "heads": fields.take("num_attention_heads"),
        "kv_heads": fields.take("num_key_value_heads"),
        "head_width": fields.take("head_dim"),
        "mlp_width": fields.take("intermediate_size"),
        "eps": float(fields.take("rms_norm_eps")),
    }


def take_rope(fields: Fields) -> tuple[float, dict[str, Any]]:
    """Take the rotary base, and what else the rope fields of transformers 4 or 5 hold.

    Raises:
      ValueError: no base is given, two differ, or positions are scaled.
    """
    table = {}
    for field in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        table |= fields.take(field, None) or {}
    for field in ("rope_type", "type"):
        kind = table.pop(field, "default")
        if kind != "default":
            raise ValueError(f"{fields.name}: {field} {kind!r} is not supported")
    outside = fields.take("rope_theta", None)
    inside = table.pop("rope_theta", None)
    if outside is None and inside is None:
        raise ValueError(f"{fields.name} has no rope_theta")
    if None not in (outside, inside) and outside != inside:
        raise ValueError(f"{fields.name} has two values of rope_theta: {outside} and {inside}")
    return float(inside if outside is None else outside), table


def to_json(cfg: Qwen3Config) -> dict[str, Any]:
    """Write a config.json that transformers reads; the inverse of `from_json`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": cfg.tied,
        **(_TOKENS if cfg.vocab > max(_TOKENS.values()) else {}),  # a small vocabulary has its own
        **({} if cfg.features == KLEIN_LAYERS else {FEATURES: list(cfg.features)}),
    }
