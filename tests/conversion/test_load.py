"""Loading onto devices: values, shardings, types, one compilation a shape, bounded host memory."""

import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from clvr_jax.parallel import shardings
from clvr_jax.tree import flatten, unflatten
from clvr_jax.weights import SafetensorsReader, WeightsError
from conversion import load as loading
from conversion.lazy import Joined
from conversion.load import load
from conversion.sinks import write_orbax
from conversion.sources import MappedSource, OrbaxSource, TreeSource, leaves
from tests.conversion import toy


@pytest.fixture(scope="module", params=["diffusers", "bfl", "orbax"])
def source(request, tmp_path_factory):
    """The same random transformer in bfloat16, from each layout."""
    folder = tmp_path_factory.mktemp("load")
    part = toy.component("transformer")
    file = toy.save(
        folder / "x.safetensors", toy.tensors("transformer", "diffusers", ml_dtypes.bfloat16)
    )
    first = MappedSource(SafetensorsReader(file), part.table("diffusers"), part.abstract())
    if request.param == "diffusers":
        return first
    if request.param == "orbax":
        write_orbax(folder / "o", first, part.abstract(), part.stacked)
        return OrbaxSource(folder / "o", part.stacked)
    from conversion.sinks import write_mapped

    write_mapped(folder / "b.safetensors", first, part.table("bfl"), part.abstract())
    reader = SafetensorsReader(folder / "b.safetensors")
    return MappedSource(reader, part.table("bfl"), part.abstract())


PART = toy.component("transformer")


def expected(source):
    flat = {}
    for path, layer, _ in leaves(PART.abstract(), PART.stacked):
        flat.setdefault(path, []).append(np.array(source.read(path, layer)))
    return {
        path: np.stack(x) if path.startswith(PART.stacked) else x[0] for path, x in flat.items()
    }


def assert_equal(params, wanted, dtype):
    params = flatten(params)
    assert params.keys() == wanted.keys()
    for path, leaf in params.items():
        assert leaf.dtype == dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), wanted[path].astype(dtype), err_msg=path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_stacked_on_one_device(source, dtype):
    params = load(source, PART.abstract(dtype), PART.stacked)
    assert_equal(params, expected(source), dtype)
    assert {d for leaf in jax.tree.leaves(params) for d in leaf.devices()} == {jax.devices()[0]}


def test_dtype_overrides_the_tree(source):
    params = load(source, PART.abstract(jnp.float32), PART.stacked, dtype=jnp.bfloat16)
    assert_equal(params, expected(source), jnp.bfloat16)


def test_sharded_over_eight_devices(source, mesh_2x2x2):
    wanted = shardings(PART.abstract(), mesh_2x2x2)
    params = load(source, PART.abstract(jnp.bfloat16), PART.stacked, wanted)
    assert_equal(params, expected(source), jnp.bfloat16)
    for path, leaf in flatten(params).items():
        assert leaf.sharding.is_equivalent_to(flatten(wanted)[path], leaf.ndim), path
    qkv = params["single_blocks"]["qkv"]["kernel"]
    # fsdp halves the width, tensor the heads
    assert qkv.addressable_shards[0].data.size == qkv.size // 4


def test_sharding_may_split_the_layers(source, mesh_2x2x2):
    axes = {"double_blocks": "fsdp", "single_blocks": None}
    flat = {
        path: jax.NamedSharding(mesh_2x2x2, jax.P(axes.get(path.split("/")[0])))
        for path in flatten(PART.abstract())
    }
    params = load(source, PART.abstract(jnp.bfloat16), PART.stacked, unflatten(flat))
    assert_equal(params, expected(source), jnp.bfloat16)


def test_fewer_layers_than_the_file(source):
    def first_two(path, leaf):
        shape = leaf.shape
        return jax.ShapeDtypeStruct(
            (2, *shape[1:]) if "single_blocks" in path else shape, jnp.bfloat16
        )

    flat = {path: first_two(path, leaf) for path, leaf in flatten(PART.abstract()).items()}
    params = load(source, unflatten(flat), PART.stacked)
    wanted = expected(source)
    wanted = {p: x[:2] if p.startswith("single_blocks") else x for p, x in wanted.items()}
    assert_equal(params, wanted, jnp.bfloat16)


def test_part_of_a_tree(source):
    tree = {"img_in": PART.abstract(jnp.bfloat16)["img_in"]}
    params = load(source, tree, PART.stacked)
    assert_equal(params, {"img_in/kernel": expected(source)["img_in/kernel"]}, jnp.bfloat16)


def test_another_shape_is_refused(source):
    tree = {"img_in": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    with pytest.raises(WeightsError, match=r"img_in/kernel: found shape .*expected shape \(3, 4\)"):
        load(source, tree, PART.stacked)


def test_one_compilation_for_each_shape_of_a_leaf(mesh_2x2x2):
    layers, shape = 5, (16, 8)
    tree = {"blocks": {"a": np.ones((layers, *shape)), "b": np.zeros((layers, *shape))}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
    sharding = jax.NamedSharding(mesh_2x2x2, jax.P(None, "fsdp", "tensor"))
    loading._writer.cache_clear()
    load(TreeSource(tree), abstract, ("blocks",), jax.tree.map(lambda _: sharding, abstract))
    assert loading._writer.cache_info().misses == 1
    assert loading._writer(sharding, (0, 1))._cache_size() == 1


def test_the_host_holds_one_layer_at_a_time():
    read, most = [], 0

    class Counting(TreeSource):
        def read(self, path, layer):
            nonlocal most
            most = max(most, sum(reference() is not None for reference in read))
            array = np.array(super().read(path, layer))
            read.append(weakref.ref(array))
            return array

    tree = {"blocks": {"a": np.random.default_rng(0).standard_normal((6, 64, 32))}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
    params = load(Counting(tree), abstract, ("blocks",))
    assert len(read) == 6 and most == 0
    np.testing.assert_array_equal(params["blocks"]["a"], tree["blocks"]["a"].astype(np.float32))


def test_arrays_outlive_the_files(tmp_path):
    part = toy.component("vae")
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("vae", "diffusers"))
    source = MappedSource(SafetensorsReader(file), part.table("diffusers"), part.abstract())
    wanted = {path: np.array(source.read(path, None)) for path in flatten(part.abstract())}
    params = load(source, part.abstract(), part.stacked)
    source.close()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_equal(params, wanted, np.float32)


def test_what_is_joined_goes_to_the_device_unjoined(tmp_path, monkeypatch, mesh_2x2x2):
    """A shard of q, k, v is copied from the file itself, never from a joined array on the host."""
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "diffusers"))
    source = MappedSource(SafetensorsReader(file), PART.table("diffusers"), PART.abstract())
    monkeypatch.setattr(Joined, "__array__", None)
    wanted = shardings(PART.abstract(), mesh_2x2x2)
    params = load(source, PART.abstract(), PART.stacked, wanted)
    kernel = params["double_blocks"]["img"]["qkv"]["kernel"]
    rows = SafetensorsReader(file).read("transformer_blocks.1.attn.to_k.weight")
    np.testing.assert_array_equal(
        np.asarray(kernel)[1, :, 1].reshape(PART.config.width, -1), rows.T
    )
