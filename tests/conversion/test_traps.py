"""Every trap of the reference sheet: what the tables should do, said by hand on numpy arrays."""

import numpy as np
import pytest

from conversion import flux2, vae
from conversion.components import recognise
from conversion.rules import Bound, file_specs
from conversion.sources import strip
from tests.conversion import toy

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class Transformer:
    """A toy transformer's tensors in both layouts, related by hand."""

    cfg = toy.TRANSFORMER
    abstract = toy.component("transformer", toy.TRANSFORMER).abstract()

    def __init__(self):
        self.bfl = toy.random_tensors(file_specs(flux2.BFL, self.abstract))
        self.diffusers = toy.random_tensors(file_specs(flux2.DIFFUSERS, self.abstract), seed=1)

    def read(self, layout, path, layer=None):
        table, tensors = {
            "bfl": (flux2.BFL, self.bfl),
            "diffusers": (flux2.DIFFUSERS, self.diffusers),
        }[layout]
        entry, target = Bound(table, self.abstract).at(path, layer)
        return np.asarray(entry.read(target, tensors.__getitem__))


@pytest.fixture(scope="module")
def transformer():
    return Transformer()


def test_final_halves_are_swapped_in_diffusers_only(transformer):
    d = transformer.cfg.width
    path = "final_layer/adaLN_modulation/kernel"
    ours = transformer.read("bfl", path)
    file = transformer.bfl["final_layer.adaLN_modulation.1.weight"]
    np.testing.assert_array_equal(ours[:, 0], file[:d].T)  # shift
    np.testing.assert_array_equal(ours[:, 1], file[d:].T)  # scale
    ours = transformer.read("diffusers", path)
    file = transformer.diffusers["norm_out.linear.weight"]
    np.testing.assert_array_equal(ours[:, 0], file[d:].T)
    np.testing.assert_array_equal(ours[:, 1], file[:d].T)


def test_shared_modulations_keep_the_order_of_their_parts(transformer):
    d = transformer.cfg.width
    for layout, name in (("bfl", "lin"), ("diffusers", "linear")):
        tensors = getattr(transformer, layout)
        for kind, parts in (("double_stream_modulation_txt", 6), ("single_stream_modulation", 3)):
            ours = transformer.read(layout, f"{kind}/lin/kernel")
            file = tensors[f"{kind}.{name}.weight"]
            for part in range(parts):
                np.testing.assert_array_equal(ours[:, part], file[part * d : (part + 1) * d].T)


@pytest.mark.parametrize(
    "layout, linear1, linear2",
    [
        ("bfl", "single_blocks.2.linear1.weight", "single_blocks.2.linear2.weight"),
        (
            "diffusers",
            "single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight",
            "single_transformer_blocks.2.attn.to_out.weight",
        ),
    ],
)
def test_single_blocks_are_cut_in_the_order_q_k_v_gate_up(transformer, layout, linear1, linear2):
    c, tensors = transformer.cfg, getattr(transformer, layout)
    d, f, k = c.width, c.mlp_width, c.head_width
    qkv = transformer.read(layout, "single_blocks/qkv/kernel", 2)
    mlp = transformer.read(layout, "single_blocks/mlp_in/kernel", 2)
    rows = tensors[linear1]
    for part in range(3):
        for head in range(c.heads):
            first = part * d + head * k
            np.testing.assert_array_equal(qkv[:, part, head], rows[first : first + k].T)
    np.testing.assert_array_equal(mlp[:, 0], rows[3 * d : 3 * d + f].T)
    np.testing.assert_array_equal(mlp[:, 1], rows[3 * d + f :].T)
    columns = tensors[linear2]
    attn_out = transformer.read(layout, "single_blocks/attn_out/kernel", 2)
    mlp_out = transformer.read(layout, "single_blocks/mlp_out/kernel", 2)
    np.testing.assert_array_equal(attn_out, columns[:, :d].T)
    np.testing.assert_array_equal(mlp_out, columns[:, d:].T)


@pytest.mark.parametrize("stream, names", [("img", _QKV), ("txt", _ADDED)])
def test_double_blocks_join_q_k_v_in_that_order(transformer, stream, names):
    c = transformer.cfg
    ours = transformer.read("diffusers", f"double_blocks/{stream}/qkv/kernel", 1)
    for part, name in enumerate(names):
        file = transformer.diffusers[f"transformer_blocks.1.attn.{name}.weight"]
        np.testing.assert_array_equal(ours[:, part].reshape(c.width, -1), file.T)
    fused = transformer.bfl[f"double_blocks.1.{stream}_attn.qkv.weight"]
    ours = transformer.read("bfl", f"double_blocks/{stream}/qkv/kernel", 1)
    for part, rows in enumerate(np.split(fused, 3)):
        np.testing.assert_array_equal(ours[:, part].reshape(c.width, -1), rows.T)


def test_norms_end_in_scale_in_bfl_and_weight_in_diffusers(transformer):
    assert not any(name.endswith("norm.weight") for name in transformer.bfl)
    assert not any(name.endswith("scale") for name in transformer.diffusers)
    ours = transformer.read("bfl", "double_blocks/txt/key_norm/scale", 1)
    file = transformer.bfl["double_blocks.1.txt_attn.norm.key_norm.scale"]
    np.testing.assert_array_equal(ours, file)
    ours = transformer.read("diffusers", "double_blocks/txt/key_norm/scale", 1)
    file = transformer.diffusers["transformer_blocks.1.attn.norm_added_k.weight"]
    np.testing.assert_array_equal(ours, file)


def test_single_blocks_are_not_taken_for_double_blocks(transformer):
    """`single_transformer_blocks` contains `transformer_blocks`: names match from the start."""
    ours = transformer.read("diffusers", "single_blocks/query_norm/scale", 1)
    single = transformer.diffusers["single_transformer_blocks.1.attn.norm_q.weight"]
    double = transformer.diffusers["transformer_blocks.1.attn.norm_q.weight"]
    np.testing.assert_array_equal(ours, single)
    assert (single != double).any()
    only_single = [name for name in transformer.diffusers if name.startswith("single_")]
    assert recognise(only_single) is None
    assert recognise(transformer.diffusers) == ("transformer", "diffusers")
    assert recognise(transformer.bfl) == ("transformer", "bfl")


def test_prefixes_are_stripped_from_the_start_only():
    table = flux2.BFL.prefixes
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        assert strip([prefix + "img_in.weight"], table) == {
            "img_in.weight": prefix + "img_in.weight"
        }
    assert strip(["vae.diffusion_model.x"], table) == {
        "vae.diffusion_model.x": "vae.diffusion_model.x"
    }
    with pytest.raises(ValueError, match="same tensor under two names"):
        strip(["img_in.weight", "diffusion_model.img_in.weight"], table)


class Vae:
    """A toy VAE's tensors in both layouts, drawn independently."""

    cfg = toy.VAE
    abstract = toy.component("vae", toy.VAE).abstract()

    def __init__(self):
        self.tensors = {
            layout: toy.random_tensors(file_specs(vae.table(self.cfg, layout), self.abstract))
            for layout in ("diffusers", "bfl")
        }

    def read(self, layout, path):
        entry, target = Bound(vae.table(self.cfg, layout), self.abstract).at(path, None)
        return np.asarray(entry.read(target, self.tensors[layout].__getitem__))


def test_decoder_levels_are_reversed_in_bfl_only():
    toy_vae = Vae()
    levels = len(toy_vae.cfg.widths)
    for i in range(levels):
        ours = f"decoder/up_{i}/resnet_1/conv2/kernel"
        file = toy_vae.tensors["diffusers"][f"decoder.up_blocks.{i}.resnets.1.conv2.weight"]
        np.testing.assert_array_equal(toy_vae.read("diffusers", ours), file.transpose(2, 3, 1, 0))
        file = toy_vae.tensors["bfl"][f"decoder.up.{levels - 1 - i}.block.1.conv2.weight"]
        np.testing.assert_array_equal(toy_vae.read("bfl", ours), file.transpose(2, 3, 1, 0))
        ours = f"encoder/down_{i}/resnet_0/conv1/kernel"
        file = toy_vae.tensors["bfl"][f"encoder.down.{i}.block.0.conv1.weight"]
        np.testing.assert_array_equal(toy_vae.read("bfl", ours), file.transpose(2, 3, 1, 0))
    assert "decoder.up.3.upsample.conv.weight" in toy_vae.tensors["bfl"]
    assert "decoder.up.0.upsample.conv.weight" not in toy_vae.tensors["bfl"]
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in toy_vae.tensors["diffusers"]


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_mid_attention_is_linear_in_diffusers_and_unit_convolution_in_bfl(coder):
    toy_vae = Vae()
    for ours, theirs, bfl in (
        ("to_q", "to_q", "q"),
        ("to_k", "to_k", "k"),
        ("to_v", "to_v", "v"),
        ("to_out", "to_out.0", "proj_out"),
    ):
        path = f"{coder}/mid/attention/{ours}/kernel"
        file = toy_vae.tensors["diffusers"][f"{coder}.mid_block.attentions.0.{theirs}.weight"]
        assert file.ndim == 2
        np.testing.assert_array_equal(toy_vae.read("diffusers", path), file.T)
        file = toy_vae.tensors["bfl"][f"{coder}.mid.attn_1.{bfl}.weight"]
        assert file.shape[2:] == (1, 1)
        np.testing.assert_array_equal(toy_vae.read("bfl", path), file[:, :, 0, 0].T)


def test_quantisation_convolutions_move_inside_the_coders_in_bfl():
    toy_vae = Vae()
    for path, diffusers, bfl in (
        ("quant_conv/kernel", "quant_conv.weight", "encoder.quant_conv.weight"),
        ("post_quant_conv/kernel", "post_quant_conv.weight", "decoder.post_quant_conv.weight"),
    ):
        for layout, name in (("diffusers", diffusers), ("bfl", bfl)):
            file = toy_vae.tensors[layout][name]
            np.testing.assert_array_equal(toy_vae.read(layout, path), file[:, :, 0, 0].T)
