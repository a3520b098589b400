import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clvr_jax.checkpoint import ParamsReader, restore, save, write_params
from clvr_jax.tree import flatten, unflatten
from clvr_jax.weights import WeightsError, zarr

TYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "f8", "f4", "f2", "i8", "i4", "u1", "?"]


@pytest.fixture
def leaves() -> dict[str, np.ndarray]:
    """A leaf of every type, layers, a scalar, an empty leaf and one of zeros."""
    rng = np.random.default_rng(0)
    layers = {
        f"blocks/{i}/qkv/kernel": rng.normal(size=(6, 3, 4)).astype(ml_dtypes.bfloat16)
        for i in range(3)
    }
    types = {f"types/{t}": rng.normal(size=(5, 7)).astype(np.dtype(t)) for t in TYPES}
    zeros = {"empty": np.zeros((0, 3), np.float32), "zeros": np.zeros((40,), np.float32)}
    return layers | types | zeros | {"scalar": np.array(3, np.float32)}


@pytest.fixture(params=[1 << 20, 48, 14], ids=["whole", "chunked", "tiny"])
def chunk_bytes(request, monkeypatch):
    """The largest chunk in bytes: leaves in one piece, cut along the first axis, along several."""
    monkeypatch.setattr(zarr, "_CHUNK", request.param)


def specs_of(leaves):
    return {name: (value.shape, value.dtype) for name, value in leaves.items()}


def write(path, leaves, **options):
    write_params(path, iter(leaves.items()), specs_of(leaves), **options)


def assert_same(given, expected):
    assert given.dtype == expected.dtype and given.shape == expected.shape
    assert np.asarray(given).tobytes() == expected.tobytes()


# reading


@pytest.mark.usefixtures("chunk_bytes")
def test_leaves_come_back(tmp_path, leaves):
    write(tmp_path / "params", leaves, metadata={"format": 1, "layers": [1, 2]})
    reader = ParamsReader(tmp_path / "params")
    assert reader.metadata == {"format": 1, "layers": [1, 2]}
    assert reader.specs == specs_of(leaves)
    for name, value in leaves.items():
        assert_same(reader.read(name), value)
        assert not reader.read(name).flags.writeable


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize(
    "index", [(slice(1, 5), slice(2), slice(3, 4)), (slice(None), slice(-2, None), slice(2, 2))]
)
def test_parts_come_back(tmp_path, leaves, index):
    name = "blocks/1/qkv/kernel"
    write(tmp_path / "params", leaves)
    assert_same(ParamsReader(tmp_path / "params").read(name, index), leaves[name][index])


def test_one_chunk_is_a_view_of_its_file(tmp_path, leaves):
    write(tmp_path / "params", leaves)
    assert not ParamsReader(tmp_path / "params").read("types/f4").flags.owndata


def test_large_leaves_are_cut_evenly():
    bf16 = np.dtype(ml_dtypes.bfloat16)
    assert zarr._chunks((151936, 4096), bf16) == (7997, 4096)
    assert zarr._chunks((4096, 3, 32, 128), bf16) == (2048, 3, 32, 128)
    assert zarr._chunks((2, 40000, 4096), bf16) == (1, 8000, 4096)
    assert zarr._chunks((0, 3), bf16) == (1, 3)
    assert zarr._chunks((), bf16) == ()


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_reads_every_layout_of_orbax(tmp_path, leaves, ocdbt, zarr3, compressed):
    ocp = pytest.importorskip("orbax.checkpoint")
    del leaves["empty"]  # Orbax itself refuses to save these
    if zarr3:
        leaves = {k: v for k, v in leaves.items() if "float8" not in k}
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=compressed
    )
    tree = unflatten(leaves) | {"device": jnp.arange(4), "nothing": {}}
    ocp.Checkpointer(handler).save(tmp_path / "params", tree)
    reader = ParamsReader(tmp_path / "params")
    assert reader.specs.keys() == leaves.keys() | {"device"}
    assert reader.read("device").tolist() == [0, 1, 2, 3]
    for name, value in leaves.items():
        assert_same(reader.read(name), value)
        assert_same(
            reader.read(name, (slice(0, 2),) * value.ndim), value[(slice(0, 2),) * value.ndim]
        )


# what Orbax makes of it


@pytest.mark.usefixtures("chunk_bytes")
def test_plain_orbax_restores_it(tmp_path, leaves):
    ocp = pytest.importorskip("orbax.checkpoint")
    write(tmp_path / "params", leaves, metadata={"format": 1})
    for checkpointer in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
        restored = flatten(checkpointer.restore(tmp_path / "params"))
        assert restored.keys() == leaves.keys()
        for name, value in leaves.items():
            assert_same(restored[name], value)


def test_metadata_is_what_orbax_writes(tmp_path, leaves):
    ocp = pytest.importorskip("orbax.checkpoint")
    del leaves["empty"], leaves["scalar"]  # Orbax would call a numpy scalar a Python one
    write(tmp_path / "ours", leaves, metadata={"format": 1})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    args = ocp.args.PyTreeSave(unflatten(leaves), custom_metadata={"format": 1})
    ocp.Checkpointer(handler).save(tmp_path / "theirs", args=args)
    ours, theirs = (
        {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and file.name != "commit_success.txt"
        }
        for folder in (tmp_path / "ours", tmp_path / "theirs")
    )
    theirs.pop("_sharding", None)  # of jax arrays, which there are none of
    theirs.pop("array_metadatas/process_0", None)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "_CHECKPOINT_METADATA":
            parts = [json.loads(side[name]) for side in (ours, theirs)]
            assert parts[0].keys() == parts[1].keys()
            assert parts[0]["item_handlers"] == parts[1]["item_handlers"]
        elif name == "_METADATA" or name.endswith(".zarray"):
            assert json.loads(ours[name]) == json.loads(theirs[name])
        else:
            assert ours[name] == theirs[name]


# meshes


@pytest.fixture
def tree() -> dict:
    """An adapter tree, as training would save it."""
    rng = np.random.default_rng(0)
    return {
        "qkv": {"a": rng.normal(size=(2, 8, 4)).astype(np.float32)},
        "out": {"b": rng.normal(size=(2, 4, 16)).astype(ml_dtypes.bfloat16)},
        "step": np.array(3, np.int32),
    }


def place(tree, mesh, spec):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim else P())), tree
    )


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_restored_on_another_mesh(tmp_path, tree, mesh_2x2x2):
    save(tmp_path / "adapters", place(tree, mesh_2x2x2, P(None, "fsdp", "tensor")))
    other = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"))
    for mesh, spec in ((other, P(None, "tensor", "fsdp")), (mesh_2x2x2, P())):
        abstract = abstract_of(place(tree, mesh, spec))
        restored = restore(tmp_path / "adapters", abstract)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, abstract
        )
        jax.tree.map(assert_same, restored, tree)


def test_streamed_leaves_are_restored_onto_a_mesh_and_cast(tmp_path, tree, mesh_2x2x2):
    write(tmp_path / "params", flatten(tree))
    sharding = NamedSharding(mesh_2x2x2, P(None, "fsdp"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
    abstract["qkv"]["a"] = jax.ShapeDtypeStruct((2, 8, 4), jnp.bfloat16, sharding=sharding)
    restored = restore(tmp_path / "params", abstract)
    assert restored["qkv"]["a"].sharding == sharding
    assert_same(restored["qkv"]["a"], tree["qkv"]["a"].astype(ml_dtypes.bfloat16))
    assert_same(restored["out"]["b"], tree["out"]["b"].astype(np.float32))


def test_another_tree_is_refused(tmp_path, tree):
    save(tmp_path / "adapters", tree)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    abstract["qkv"] = {"b": jax.ShapeDtypeStruct((1,), jnp.float32)}
    abstract["out"]["b"] = jax.ShapeDtypeStruct((2, 4, 15), jnp.float32)
    message = r"missing: qkv/b \(1,\); unexpected: qkv/a \(2, 8, 4\); shape: out/b is \(2, 4, 16\)"
    with pytest.raises(WeightsError, match=f"adapters: found {message}, expected .*asked for"):
        restore(tmp_path / "adapters", abstract)
    with pytest.raises(WeightsError, match="adapters: found something there, expected nothing"):
        save(tmp_path / "adapters", tree)


# what is broken


def test_other_folders_are_named(tmp_path, leaves):
    write(tmp_path / "transformer" / "params", leaves)
    with pytest.raises(WeightsError, match=r"transformer: found no _METADATA, .*folders: params"):
        ParamsReader(tmp_path / "transformer")
    with pytest.raises(WeightsError, match="gone: found no folder, expected a checkpoint written"):
        ParamsReader(tmp_path / "gone")
    metadata = tmp_path / "transformer" / "params" / "_METADATA"
    for text, message in (
        (metadata.read_text()[:50], r"_METADATA: found no JSON \(.*copy it again"),
        ("{}", "found no names of leaves"),
        ('{"tree_metadata": {"a": {"key_metadata": 1}}}', "found no names of leaves"),
    ):
        metadata.write_text(text)
        with pytest.raises(WeightsError, match=message):
            ParamsReader(tmp_path / "transformer" / "params")


def test_unknown_leaves_and_indices_are_named(tmp_path, leaves):
    write(tmp_path / "params", leaves)
    reader = ParamsReader(tmp_path / "params")
    with pytest.raises(WeightsError, match=r"zero: found no such leaf, expected .* 16 leaves \(ze"):
        reader.read("zero")
    for index in ((slice(None),), (slice(None), slice(0, 4, 2))):
        with pytest.raises(ValueError, match=r"a slice without step for each axis of \(5, 7\)"):
            reader.read("types/f4", index)


@pytest.mark.parametrize("ocdbt", [False, True])
def test_missing_and_truncated_data_is_named(tmp_path, leaves, ocdbt):
    path, name = tmp_path / "params", "blocks/1/qkv/kernel"
    if ocdbt:
        save(path, {"x": np.arange(10_000, dtype=np.float32)})
        name = "x"
        files = [file for file in path.rglob("d/*") if file.stat().st_size > 5000]
    else:
        write(path, leaves)
        files = [path / "blocks.1.qkv.kernel" / "0.0.0"]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WeightsError, match=rf"{name}: found damaged or missing data \(.*copy it"):
        ParamsReader(path).read(name)
    for file in files:
        file.unlink()
    with pytest.raises(WeightsError, match=rf"{name}: found (damaged|no readable)"):
        ParamsReader(path).read(name)


def test_a_lost_leaf_is_named_at_once(tmp_path, leaves):
    write(tmp_path / "params", leaves)
    (tmp_path / "params" / "zeros" / ".zarray").write_text('{"shape": [')
    with pytest.raises(WeightsError, match=r"zeros: found no readable array \(.*as _METADATA"):
        ParamsReader(tmp_path / "params")
    shutil.rmtree(tmp_path / "params" / "zeros")
    with pytest.raises(WeightsError, match=r"zeros: found no readable array .*No such file"):
        ParamsReader(tmp_path / "params")


ONE = np.ones((3,), np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a/x", ONE)], "no array to write for 1 of 2: b"),
        ([("a/x", ONE), ("a/x", ONE)], "a/x: found it a second time"),
        ([("c", ONE)], "c: found an array to write, expected none of this name"),
        ([("b", ONE[:2])], r"b: found an array float32 \(2,\) to write, expected float32 \(3,\)"),
    ],
)
def test_nothing_is_left_after_a_wrong_leaf(tmp_path, given, message):
    specs = {"a/x": ((3,), ONE.dtype), "b": ((3,), ONE.dtype)}
    with pytest.raises(WeightsError, match=message):
        write_params(tmp_path / "deep" / "params", iter(given), specs)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_after_an_exception(tmp_path):
    def broken():
        yield "a", ONE
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_params(tmp_path / "params", broken(), {"a": ((3,), ONE.dtype)})
    assert not list(tmp_path.iterdir())


def test_what_exists_is_kept(tmp_path, leaves):
    (tmp_path / "params").mkdir()
    with pytest.raises(WeightsError, match="params: found something there, expected nothing; rem"):
        write(tmp_path / "params", leaves)
    assert not list((tmp_path / "params").iterdir())


def test_metadata_that_is_no_json_is_refused_before_writing(tmp_path, leaves):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(tmp_path / "params", leaves, metadata={"a": object()})
    assert not list(tmp_path.iterdir())


# memory


RESIDENT = """
import resource, sys
import ml_dtypes, numpy as np
from clvr_jax.checkpoint import ParamsReader, write_params
from clvr_jax.weights import is_finite
def leaves():
    for i in range(10):
        bits = np.full((4096, 8192), i << 6, np.uint16)  # 64 MiB
        yield f"blocks/{i}/kernel", bits.view(ml_dtypes.bfloat16)
specs = {f"blocks/{i}/kernel": ((4096, 8192), np.dtype(ml_dtypes.bfloat16)) for i in range(10)}
write_params(sys.argv[1], iter(()), {})  # imports all it needs
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_params(sys.argv[2], leaves(), specs)
reader = ParamsReader(sys.argv[2])
assert all(is_finite(reader.read(name)) for name in reader.specs)
assert "orbax" not in sys.modules
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_a_leaf(tmp_path):
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path / "empty"), str(tmp_path / "params")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert sum(f.stat().st_size for f in (tmp_path / "params").rglob("*/*")) > 640e6
    assert float(done.stdout) < 200  # MiB: a leaf, the next one, and one under way to the disk
