"""LoRA factors of a toy transformer under every name, their dense updates worked out by hand."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from clvr_jax import lora, tree
from clvr_jax.models.flux2.config import STACKED, TRANSFORMER_VARIANTS
from clvr_jax.models.flux2.transformer import abstract_params

CFG = TRANSFORMER_VARIANTS["tiny"]  # width 64, MLP 192, text 96, channels 16
ABSTRACT = abstract_params(CFG)
D, F = CFG.width, CFG.mlp_width

# BFL's linear layers: (out, in) and where their rows or columns are in our tree, by hand
PLAIN = {
    "img_in": ((D, 16), "img_in", None),
    "txt_in": ((D, 96), "txt_in", None),
    "time_in.in_layer": ((D, 256), "time_in/in_layer", None),
    "time_in.out_layer": ((D, D), "time_in/out_layer", None),
    "double_stream_modulation_img.lin": ((6 * D, D), "double_stream_modulation_img/lin", None),
    "double_stream_modulation_txt.lin": ((6 * D, D), "double_stream_modulation_txt/lin", None),
    "single_stream_modulation.lin": ((3 * D, D), "single_stream_modulation/lin", None),
    "double_blocks.1.img_attn.qkv": ((3 * D, D), "double_blocks/img/qkv", 1),
    "double_blocks.0.txt_attn.qkv": ((3 * D, D), "double_blocks/txt/qkv", 0),
    "double_blocks.0.img_attn.proj": ((D, D), "double_blocks/img/attn_out", 0),
    "double_blocks.1.txt_attn.proj": ((D, D), "double_blocks/txt/attn_out", 1),
    "double_blocks.0.img_mlp.0": ((2 * F, D), "double_blocks/img/mlp_in", 0),
    "double_blocks.0.img_mlp.2": ((D, F), "double_blocks/img/mlp_out", 0),
    "double_blocks.1.txt_mlp.0": ((2 * F, D), "double_blocks/txt/mlp_in", 1),
    "double_blocks.1.txt_mlp.2": ((D, F), "double_blocks/txt/mlp_out", 1),
    "final_layer.adaLN_modulation.1": ((2 * D, D), "final_layer/adaLN_modulation", None),
    "final_layer.linear": ((16, D), "final_layer/linear", None),
}
LINEAR1, LINEAR2 = "single_blocks.2.linear1", "single_blocks.2.linear2"
BFL = {name: shape for name, (shape, _, _) in PLAIN.items()}
BFL |= {LINEAR1: (3 * D + 2 * F, D), LINEAR2: (D, D + F)}


def factors(shape, rank, seed):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rank, shape[1]), np.float32),
        rng.standard_normal((shape[0], rank), np.float32),
    )


def bfl_factors():
    """{module: (A, B)} of every BFL layer in the table above, ranks differing."""
    return {name: factors(shape, 3 + i % 2, i) for i, (name, shape) in enumerate(BFL.items())}


def save(path, tensors, metadata=None):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata=metadata)
    return path


def named(pairs, prefix="diffusion_model.", down="lora_A", up="lora_B"):
    tensors = {f"{prefix}{name}.{down}.weight": a for name, (a, _) in pairs.items()}
    return tensors | {f"{prefix}{name}.{up}.weight": b for name, (_, b) in pairs.items()}


def dense(adapters, path, layer):
    """The update in PyTorch's orientation (out, in), float64."""
    a, b = lora.pairs(adapters)[path]
    if layer is not None:
        a, b = a[layer], b[layer]
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a @ b.reshape(len(b), -1)).T


def check(adapters, expected, tolerance=1e-6):
    """Compare with {BFL module: dense update}; every other layer's update must be zero."""
    seen = set()
    for name, update in expected.items():
        if name == LINEAR1:
            places = [("single_blocks/qkv", 2), ("single_blocks/mlp_in", 2)]
            found = np.concatenate([dense(adapters, *place) for place in places])
        elif name == LINEAR2:
            places = [("single_blocks/attn_out", 2), ("single_blocks/mlp_out", 2)]
            found = np.concatenate([dense(adapters, *place) for place in places], axis=1)
        else:
            places = [PLAIN[name][1:]]
            found = dense(adapters, *places[0])
        seen.update(places)
        assert found.shape == update.shape
        assert np.abs(found - update).max() <= tolerance * np.abs(update).max(), name
    for path, (a, _) in lora.pairs(adapters).items():
        for layer in range(len(a)) if a.ndim == 3 else [None]:
            assert (path, layer) in seen or not dense(adapters, path, layer).any()


def product(a, b, scale=1.0):
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


# diffusers' layers and, by hand, what their rows are in BFL's layout
SPLIT = {
    "double_blocks.1.img_attn.qkv": "transformer_blocks.1.attn.to_{}",
    "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.add_{}_proj",
}
SAME = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.1.txt_attn.proj": "transformer_blocks.1.attn.to_add_out",
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
    "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.linear_out",
    "double_blocks.1.txt_mlp.0": "transformer_blocks.1.ff_context.linear_in",
    "double_blocks.1.txt_mlp.2": "transformer_blocks.1.ff_context.linear_out",
    LINEAR1: "single_transformer_blocks.2.attn.to_qkv_mlp_proj",
    LINEAR2: "single_transformer_blocks.2.attn.to_out",
    "final_layer.linear": "proj_out",
}


def peft_factors(ranks=(3, 4, 2)):
    """{diffusers module: (A, B)} of the same layers."""
    shapes = {theirs: BFL[ours] for ours, theirs in SAME.items()} | {"norm_out.linear": (2 * D, D)}
    for theirs in SPLIT.values():
        shapes |= {theirs.format(part): (D, D) for part in "qkv"}
    return {
        name: factors(shape, ranks[i % len(ranks)], i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def peft_dense(pairs, scale=lambda name: 1.0):
    update = {name: product(*pair, scale(name)) for name, pair in pairs.items()}
    expected = {ours: update[theirs] for ours, theirs in SAME.items()}
    for ours, theirs in SPLIT.items():
        expected[ours] = np.concatenate([update[theirs.format(part)] for part in "qkv"])
    scale_rows, shift_rows = np.split(update["norm_out.linear"], 2)  # diffusers' order
    expected["final_layer.adaLN_modulation.1"] = np.concatenate([shift_rows, scale_rows])
    return expected


def config_metadata(**config):
    fields = {f"transformer.{key}": value for key, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(fields)}


def ours(pattern=".", rank=4, seed=0):
    """Adapters as training leaves them: every part has its own factors."""
    return filled(ABSTRACT, STACKED, pattern, rank, seed)


def filled(abstract, stacked, pattern, rank, seed=0):
    """Adapters of any model, with a b that matters."""
    new = lora.init(jax.random.key(seed), abstract, pattern, rank, stacked)
    rng = np.random.default_rng(seed)
    fill = lambda path, x: rng.standard_normal(x.shape, np.float32) if path[-1] == "b" else x
    return tree.unflatten({k: np.asarray(fill(k, v)) for k, v in tree.flatten(new).items()})


def equal_files(first, second):
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def equal_trees(first, second):
    assert tree.differences(first, second) == []
    for path, leaf in tree.flatten(second).items():
        np.testing.assert_array_equal(tree.flatten(first)[path], leaf, err_msg=path)
