"""Qwen3-VL: its names in transformers' layout (`models/qwen3_vl/modeling_qwen3_vl.py`)."""

from collections.abc import Iterator

from clvr_jax.models.qwen3_vl.config import STACKED, Qwen3VLConfig
from conversion import qwen3
from conversion.qwen3 import LINEAR, SCALE
from conversion.rules import Rule, Table

BIAS = "o -> o"
QKV = "(part h k) i -> i part h k"

_LANGUAGE = "model.language_model."
# the tower beside the decoder, as Qwen2-VL's files had it and some repositories still do
_SPELLINGS = (
    ("visual.", "model.visual."),
    ("model.layers.", f"{_LANGUAGE}layers."),
    ("model.embed_tokens.", f"{_LANGUAGE}embed_tokens."),
    ("model.norm.", f"{_LANGUAGE}norm."),
)


def table(cfg: Qwen3VLConfig) -> Table:
    """Return the table of a model of these sizes."""
    rules = (*qwen3.rules(_LANGUAGE, "language/"), *_visual(bool(cfg.vision.deepstack)))
    if cfg.text.tied:
        extras = (qwen3.tied_head(_LANGUAGE),)
        return Table(rules, STACKED, extras, spellings=_SPELLINGS)
    return Table((*rules, qwen3.head("language/")), STACKED, spellings=_SPELLINGS)


def _visual(deepstack: bool) -> Iterator[Rule]:
    theirs, ours = "model.visual.", "visual/"
    # a convolution whose stride is its kernel: channels, frames, rows and columns of one patch
    patch = "o c t y x -> c t y x o"
    yield Rule(f"{theirs}patch_embed.proj.weight", f"{ours}patch_embed/kernel", patch)
    yield Rule(f"{theirs}patch_embed.proj.bias", f"{ours}patch_embed/bias", BIAS)
    yield Rule(f"{theirs}pos_embed.weight", f"{ours}pos_embed/embedding", "p d -> p d")
    block, blocks = theirs + "blocks.{layer}.", f"{ours}blocks/"
    yield from _norm(f"{block}norm1", f"{blocks}norm1")
    yield from _norm(f"{block}norm2", f"{blocks}norm2")
    yield Rule(f"{block}attn.qkv.weight", f"{blocks}attn/qkv/kernel", QKV)
    yield Rule(f"{block}attn.qkv.bias", f"{blocks}attn/qkv/bias", "(part h k) -> part h k")
    yield from _affine(f"{block}attn.proj", f"{blocks}attn/proj")
    yield from _affine(f"{block}mlp.linear_fc1", f"{blocks}mlp/linear_fc1")
    yield from _affine(f"{block}mlp.linear_fc2", f"{blocks}mlp/linear_fc2")
    yield from _merger(f"{theirs}merger", f"{ours}merger")
    if deepstack:
        list_of = theirs + "deepstack_merger_list.{layer}"
        yield from _merger(list_of, f"{ours}deepstack_merger_list")


def _merger(theirs: str, ours: str) -> Iterator[Rule]:
    yield from _norm(f"{theirs}.norm", f"{ours}/norm")
    yield from _affine(f"{theirs}.linear_fc1", f"{ours}/linear_fc1")
    yield from _affine(f"{theirs}.linear_fc2", f"{ours}/linear_fc2")


def _norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", f"{ours}/scale", SCALE)
    yield Rule(f"{theirs}.bias", f"{ours}/bias", SCALE)


def _affine(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR)
    yield Rule(f"{theirs}.bias", f"{ours}/bias", BIAS)
