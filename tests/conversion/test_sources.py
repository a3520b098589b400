"""Files and Orbax folders seen as one set of weights: cycles, fingerprints, what is refused."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from clvr_jax.tree import flatten, unflatten
from clvr_jax.weights import SafetensorsReader, WeightsError
from conversion.lazy import Joined
from conversion.sinks import write_mapped, write_orbax
from conversion.sources import (
    MappedSource,
    OrbaxSource,
    Together,
    TreeSource,
    fingerprint,
    leaves,
)
from tests.conversion import toy


def mapped(path, part, layout):
    return MappedSource(SafetensorsReader(path), part.table(layout), part.abstract())


def stacked_tree(source, part):
    """The whole tree in memory, stacked, from any source."""
    flat = {}
    for path, layer, _ in leaves(part.abstract(), part.stacked):
        leaf = np.array(source.read(path, layer))
        flat.setdefault(path, []).append(leaf if layer is None else leaf[None])
    return unflatten({path: np.concatenate(x) if len(x) > 1 else x[0] for path, x in flat.items()})


def assert_same_tensors(given, expected):
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert given[name].dtype == value.dtype, name
        np.testing.assert_array_equal(given[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_cycle_through_every_layout_is_bit_exact(tmp_path, name, dtype):
    part = toy.component(name)
    tensors = toy.tensors(name, "diffusers", dtype)
    toy.save_sharded(tmp_path / "diffusers", tensors, "model", 3)
    source = mapped(tmp_path / "diffusers", part, "diffusers")
    write_orbax(tmp_path / "ours", source, part.abstract(), part.stacked)
    source = OrbaxSource(tmp_path / "ours", part.stacked)
    file = tmp_path / "bfl.safetensors"
    write_mapped(file, source, part.table("bfl"), part.abstract())
    assert len(load_file(file)) == len(part.table("bfl").rules) + (name == "vae") or part.stacked
    source = mapped(file, part, "bfl")
    write_orbax(tmp_path / "again", source, part.abstract(), part.stacked)
    source = OrbaxSource(tmp_path / "again", part.stacked)
    write_mapped(tmp_path / "back", source, part.table("diffusers"), part.abstract())
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_layouts_can_be_changed_without_a_stop(tmp_path, name):
    part = toy.component(name)
    tensors = toy.tensors(name, "bfl")
    toy.save(tmp_path / "a.safetensors", tensors)
    source = mapped(tmp_path / "a.safetensors", part, "bfl")
    write_mapped(tmp_path / "d", source, part.table("diffusers"), part.abstract())
    source = mapped(tmp_path / "d", part, "diffusers")
    write_mapped(tmp_path / "b.safetensors", source, part.table("bfl"), part.abstract())
    assert_same_tensors(load_file(tmp_path / "b.safetensors"), tensors)


@pytest.mark.parametrize("config", [toy.TEXT_ENCODER, toy.UNTIED])
def test_the_text_encoder_comes_back_bit_exactly(tmp_path, config):
    part = toy.component("text_encoder", config)
    tensors = toy.tensors("text_encoder", "diffusers", ml_dtypes.bfloat16, config)
    toy.save_sharded(tmp_path / "in", tensors, "model", 2)
    source = mapped(tmp_path / "in", part, "diffusers")
    write_orbax(tmp_path / "ours", source, part.abstract(), part.stacked)
    source = OrbaxSource(tmp_path / "ours", part.stacked)
    write_mapped(tmp_path / "back", source, part.table("diffusers"), part.abstract())
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_shards_may_be_listed_in_any_order(tmp_path):
    part = toy.component("transformer")
    tensors = toy.tensors("transformer", "diffusers")
    toy.save_sharded(tmp_path / "three", tensors, "model", 3)
    toy.save(tmp_path / "one" / "model.safetensors", tensors)
    trees = [
        flatten(stacked_tree(mapped(tmp_path / folder, part, "diffusers"), part))
        for folder in ("three", "one")
    ]
    assert_same_tensors(*trees)


def test_orbax_leaves_are_single_layers(tmp_path):
    part = toy.component("transformer")
    toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "bfl"))
    source = mapped(tmp_path / "x.safetensors", part, "bfl")
    write_orbax(tmp_path / "ours", source, part.abstract(), part.stacked)
    specs = OrbaxSource(tmp_path / "ours", part.stacked).reader.specs
    c = toy.TRANSFORMER
    shape, dtype = specs["single_blocks/2/qkv/kernel"]
    assert tuple(shape) == (c.width, 3, c.heads, c.head_width) and dtype == np.float32
    assert "single_blocks/qkv/kernel" not in specs


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_one_fingerprint_for_one_set_of_weights(tmp_path, name):
    part = toy.component(name)
    tree, stacked = part.abstract(), part.stacked
    file = toy.save(tmp_path / "x.safetensors", toy.tensors(name, "bfl", ml_dtypes.bfloat16))
    source = mapped(file, part, "bfl")
    prints = {fingerprint(source, tree, stacked)}
    write_mapped(tmp_path / "d", source, part.table("diffusers"), tree)
    prints.add(fingerprint(mapped(tmp_path / "d", part, "diffusers"), tree, stacked))
    write_orbax(tmp_path / "o", source, tree, stacked)
    prints.add(fingerprint(OrbaxSource(tmp_path / "o", stacked), tree, stacked))
    prints.add(fingerprint(TreeSource(stacked_tree(source, part)), tree, stacked))
    assert len(prints) == 1
    assert len(prints.pop()) == 12


def test_fingerprints_see_every_layer_and_type(tmp_path):
    part = toy.component("transformer")
    tensors = toy.tensors("transformer", "bfl")
    tree, stacked = part.abstract(), part.stacked

    def of(values, dtype=None):
        file = toy.save(tmp_path / "x.safetensors", values)
        return fingerprint(mapped(file, part, "bfl"), tree, stacked, dtype)

    plain = of(tensors)
    assert of(tensors) == plain
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    assert of(half) != plain
    assert of(half) == of(tensors, "bfloat16")
    for name in ("single_blocks.2.linear1.weight", "double_blocks.1.txt_attn.norm.key_norm.scale"):
        for place in (0, -1):
            changed = tensors[name].copy()
            changed.flat[place] += 1
            assert of(tensors | {name: changed}) != plain
    first, second = (f"single_blocks.{i}.linear2.weight" for i in (0, 1))
    assert of(tensors | {first: tensors[second], second: tensors[first]}) != plain


def test_reading_copies_nothing(tmp_path):
    part = toy.component("transformer")
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "diffusers"))
    source = mapped(file, part, "diffusers")
    for path, layer, shape in leaves(part.abstract(), part.stacked):
        leaf = source.read(path, layer)
        assert tuple(leaf.shape) == shape
        for piece in leaf.parts if isinstance(leaf, Joined) else [leaf]:
            assert not piece.flags.owndata and not piece.flags.writeable


def test_leaves_are_visited_layer_by_layer():
    part = toy.component("transformer")
    visited = [(path, layer) for path, layer, _ in leaves(part.abstract(), part.stacked)]
    assert len(visited) == len(set(visited))
    singles = [layer for path, layer in visited if path.startswith("single_blocks")]
    assert singles == sorted(singles)


def test_errors_name_file_tensor_found_and_expected(tmp_path):
    part = toy.component("transformer")
    tensors = toy.tensors("transformer", "bfl")
    tensors["img_in.weight"] = tensors["img_in.weight"][:, 1:]
    del tensors["txt_in.weight"]
    source = mapped(toy.save(tmp_path / "x.safetensors", tensors), part, "bfl")
    with pytest.raises(WeightsError, match=r"x\.safetensors: img_in\.weight: found .*15.*expected"):
        source.read("img_in/kernel", None)
    with pytest.raises(WeightsError, match=r"x\.safetensors: txt_in\.weight: found no such tensor"):
        source.read("txt_in/kernel", None)
    with pytest.raises(WeightsError, match="in memory: img_in/kernel"):
        TreeSource({}).read("img_in/kernel", None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    part = toy.component("transformer")
    tensors = toy.tensors("transformer", "diffusers", ml_dtypes.bfloat16)
    tensors["transformer_blocks.1.attn.to_k.weight"][3, 5] = bad
    file = toy.save(tmp_path / "x.safetensors", tensors)
    source = mapped(file, part, "diffusers")
    message = rf"x\.safetensors: transformer_blocks\.1\.attn\.to_k\.weight: found {bad} at \[3, 5\]"
    with pytest.raises(WeightsError, match=message):
        write_orbax(tmp_path / "o", source, part.abstract(), part.stacked)
    assert not (tmp_path / "o").exists()
    with pytest.raises(WeightsError, match=message):
        write_mapped(tmp_path / "b.safetensors", source, part.table("bfl"), part.abstract())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_a_type_that_cannot_hold_the_values_is_refused(tmp_path):
    part = toy.component("transformer")
    tensors = toy.tensors("transformer", "bfl")
    tensors["img_in.weight"][0, 0] = 1e6
    file = toy.save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"img_in\.weight: found values too large"):
        write_orbax(
            tmp_path / "o",
            mapped(file, part, "bfl"),
            part.abstract(),
            part.stacked,
            dtype="float16",
        )


def test_types_can_be_changed_and_mixed_types_are_kept(tmp_path):
    part = toy.component("transformer")
    tensors = toy.tensors("transformer", "bfl", ml_dtypes.bfloat16)
    norms = {name for name in tensors if name.endswith("scale")}
    tensors |= {name: tensors[name].astype(np.float32) for name in norms}
    source = mapped(toy.save(tmp_path / "x.safetensors", tensors), part, "bfl")
    write_orbax(tmp_path / "o", source, part.abstract(), part.stacked)
    ours = OrbaxSource(tmp_path / "o", part.stacked)
    write_mapped(tmp_path / "b.safetensors", ours, part.table("bfl"), part.abstract())
    assert_same_tensors(load_file(tmp_path / "b.safetensors"), tensors)
    write_mapped(
        tmp_path / "f.safetensors", ours, part.table("bfl"), part.abstract(), dtype="float32"
    )
    wide = {name: value.astype(np.float32) for name, value in tensors.items()}
    assert_same_tensors(load_file(tmp_path / "f.safetensors"), wide)


def test_checkpoints_together_are_read_under_roots_of_their_own(tmp_path):
    names = ("transformer", "vae")
    parts = {}
    for name in names:
        toy.save_sharded(tmp_path / name, toy.tensors(name, "diffusers"), "model", 2)
        parts[name] = mapped(tmp_path / name, toy.component(name), "diffusers")
    both = Together(parts)
    for name in names:
        part = toy.component(name)
        for path, layer, _ in leaves(part.abstract(), part.stacked):
            expected = np.array(parts[name].read(path, layer))
            np.testing.assert_array_equal(np.array(both.read(f"{name}/{path}", layer)), expected)
    both.release()
    both.close()
