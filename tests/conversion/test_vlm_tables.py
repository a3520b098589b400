"""The table of Qwen3-VL: every released name and shape, and every layout said by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.models.qwen3_vl.config import VARIANTS
from clvr_jax.tree import count, flatten
from conversion import qwen3_vl
from conversion.components import recognise
from conversion.load import load
from conversion.rules import Bound, file_specs
from conversion.sinks import write_orbax
from conversion.sources import OrbaxSource, TreeSource, leaves, strip
from tests.conversion import toy, vlm_cases

SIZES = {
    "qwen3_vl_2b": (625, 2_127_532_032),
    "qwen3_vl_4b": (713, 4_437_815_808),
    "qwen3_vl_8b": (750, 8_767_123_696),
    "qwen3_vl_32b": (1058, 33_357_390_064),
}


@pytest.mark.parametrize("variant", SIZES)
def test_the_table_covers_every_key_and_shape(variant):
    part = toy.component("vlm", VARIANTS[variant])
    specs = file_specs(part.table("diffusers"), part.abstract())
    assert specs == vlm_cases.released_names(part.config)
    assert (len(specs), sum(map(math.prod, specs.values()))) == SIZES[variant]
    assert count(part.abstract()) == SIZES[variant][1]
    assert part.variant == variant


@pytest.mark.parametrize("cfg", [vlm_cases.TIED, vlm_cases.UNTIED], ids=["tied", "untied"])
def test_toy_sizes_and_no_deepstack(cfg):
    for blocks in ((0, 1, 2), (3,), ()):
        cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, deepstack=blocks))
        part = toy.component("vlm", cfg)
        specs = file_specs(part.table("diffusers"), part.abstract())
        assert specs == vlm_cases.released_names(cfg)
        assert ("lm_head.weight" in specs) is not cfg.text.tied


@pytest.fixture(scope="module")
def read():
    """A leaf of the toy model as the table reads it, and the tensors it is read from."""
    part, tensors = toy.component("vlm", vlm_cases.UNTIED), vlm_cases.tensors(vlm_cases.UNTIED)
    bound = Bound(part.table("diffusers"), part.abstract())

    def read(path, layer=None):
        entry, target = bound.at(path, layer)
        return np.asarray(entry.read(target, tensors.__getitem__))

    return read, tensors


def test_qkv_is_cut_into_parts_then_heads(read):
    read, tensors = read
    c = vlm_cases.UNTIED.vision
    kernel, bias = (read(f"visual/blocks/attn/qkv/{leaf}", 2) for leaf in ("kernel", "bias"))
    rows = tensors["model.visual.blocks.2.attn.qkv.weight"]
    numbers = tensors["model.visual.blocks.2.attn.qkv.bias"]
    for part in range(3):
        for head in range(c.heads):
            first = part * c.width + head * c.head_width
            own = slice(first, first + c.head_width)
            np.testing.assert_array_equal(kernel[:, part, head], rows[own].T)
            np.testing.assert_array_equal(bias[part, head], numbers[own])


def test_a_patch_is_flattened_as_the_processor_does(read):
    """Channels, frames, rows, columns: a product with it is the reference's convolution."""
    read, tensors = read
    kernel = read("visual/patch_embed/kernel")
    weight = tensors["model.visual.patch_embed.proj.weight"]
    assert kernel.shape == (3, 2, 16, 16, 24)
    np.testing.assert_array_equal(kernel[2, 1, 3, 5], weight[:, 2, 1, 3, 5])
    flat = kernel.reshape(-1, kernel.shape[-1])
    np.testing.assert_array_equal(flat, weight.reshape(len(weight), -1).T)


def test_linears_are_transposed_and_layers_kept_in_order(read):
    read, tensors = read
    for path, name in {
        "language/layers/mlp/down_proj": "model.language_model.layers.3.mlp.down_proj",
        "visual/blocks/mlp/linear_fc2": "model.visual.blocks.3.mlp.linear_fc2",
    }.items():
        np.testing.assert_array_equal(read(f"{path}/kernel", 3), tensors[f"{name}.weight"].T)
    for i in range(3):
        name = f"model.visual.deepstack_merger_list.{i}.linear_fc1.bias"
        ours = read("visual/deepstack_merger_list/linear_fc1/bias", i)
        np.testing.assert_array_equal(ours, tensors[name])
    norm = read("visual/merger/norm/scale")  # one of the two mergers norms before it joins
    assert norm.shape == (24,) and read("visual/deepstack_merger_list/norm/scale", 0).shape == (96,)


def test_names_of_older_files_are_understood():
    table = qwen3_vl.table(vlm_cases.UNTIED)
    released = vlm_cases.released_names(vlm_cases.UNTIED)
    names, old = list(released), list(vlm_cases.renamed(released))
    assert "visual.blocks.0.norm1.weight" in old and "model.layers.0.mlp.up_proj.weight" in old
    assert strip(old, table.prefixes, table.spellings) == dict(zip(names, old))
    assert strip(names, table.prefixes, table.spellings) == dict(zip(names, names))
    with pytest.raises(ValueError, match="same tensor under two names"):
        strip([*names, "visual.merger.norm.bias"], table.prefixes, table.spellings)
    assert recognise(names) == recognise(old) == ("vlm", "diffusers")


def test_roots_with_a_slash_survive_orbax_and_loading(tmp_path):
    """`language/layers` is stored as `language/layers/3/...` and stacked again on the device."""
    part = toy.component("vlm", vlm_cases.UNTIED)
    rng = np.random.default_rng(0)
    flat = flatten(part.abstract())
    values = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()}
    write_orbax(tmp_path / "params", TreeSource(values), part.abstract(), part.stacked)
    source = OrbaxSource(tmp_path / "params", part.stacked)
    assert "language/layers/3/self_attn/q_proj/kernel" in source.reader.specs
    assert "visual/deepstack_merger_list/2/norm/bias" in source.reader.specs
    layers = {(path, layer) for path, layer, _ in leaves(part.abstract(), part.stacked)}
    assert ("visual/blocks/norm1/bias", 3) in layers and ("language/norm/scale", None) in layers
    loaded = flatten(load(source, part.abstract(jnp.float32), part.stacked))
    assert loaded.keys() == values.keys()
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(np.asarray(leaf), values[path], err_msg=path)
