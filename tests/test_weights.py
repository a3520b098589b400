import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from clvr_jax.weights import SafetensorsReader, WeightsError, is_finite, write_safetensors
from clvr_jax.weights import blocks as blocks_module
from clvr_jax.weights import writer as writer_module
from clvr_jax.weights.header import DTYPES

TYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "f8", "f4", "f2", "i8", "i4", "i2", "i1"]
TYPES += ["u8", "u4", "u2", "u1", "?"]


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """One tensor of every type, besides a scalar, an empty one and one of a single element."""
    rng = np.random.default_rng(0)
    values = {f"layer.{t}.weight": rng.normal(size=(3, 5)).astype(np.dtype(t)) for t in TYPES}
    return values | {
        "scalar": np.array(1.5, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "counter": np.array(7, np.int64),
        "one": np.ones((1, 1, 1), np.int8),
    }


def specs_of(tensors):
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def write(path, tensors, **options):
    write_safetensors(path, specs_of(tensors), iter(tensors.items()), **options)


def assert_same(given, expected):
    assert given.dtype == expected.dtype and given.shape == expected.shape
    assert given.tobytes() == expected.tobytes()


def raw_file(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    """A file of a given header (JSON value, or bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# round trips


def test_reads_what_safetensors_writes(tmp_path, tensors):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert reader.metadata == {"format": "pt"}
        assert reader.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            assert reader.tensors[name] == (value.dtype, value.shape, tmp_path / "a.safetensors")
            assert_same(reader.read(name), value)


def test_safetensors_reads_what_we_write(tmp_path, tensors):
    safetensors = pytest.importorskip("safetensors")
    write(tmp_path / "a.safetensors", tensors, metadata={"source": "näme"})
    loaded = dict(safetensors.deserialize((tmp_path / "a.safetensors").read_bytes()))
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert DTYPES[loaded[name]["dtype"]] == value.dtype
        assert tuple(loaded[name]["shape"]) == value.shape
        assert bytes(loaded[name]["data"]) == value.tobytes()
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert opened.metadata() == {"source": "näme", "format": "pt"}
        for name in ("layer.bfloat16.weight", "layer.i8.weight", "scalar", "empty"):
            assert_same(opened.get_tensor(name), tensors[name])


def test_data_is_aligned(tmp_path, tensors):
    write(tmp_path / "a.safetensors", tensors)
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, value in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert value["data_offsets"][0] % tensors[name].itemsize == 0


def test_unaligned_tensors_are_read(tmp_path):
    header = {"a": entry(0, 1, (1,), "I8"), "b": entry(1, 9)}
    data = b"\x01" + np.array([1, 2], np.float32).tobytes()
    value = SafetensorsReader(raw_file(tmp_path / "a.safetensors", header, data)).read("b")
    assert value.flags.aligned and value.tolist() == [1, 2]


def test_views_are_lazy_read_only_and_outlive_the_reader(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.arange(10_000, dtype=np.float32)})
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    view = reader.read("x")
    assert not view.flags.writeable and not view.flags.owndata
    reader.release("x")
    reader.release()
    reader.close()
    assert view.sum() == np.arange(10_000, dtype=np.float32).sum()


def test_order_of_arrival_does_not_matter(tmp_path, tensors):
    write(tmp_path / "a.safetensors", tensors)
    reverse = reversed(list(tensors.items()))
    write_safetensors(tmp_path / "b.safetensors", specs_of(tensors), reverse)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
def test_strided_views_are_written_block_by_block(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(writer_module, "_BLOCK", 100)
    base = np.random.default_rng(0).normal(size=(7, 6, 33)).astype(np.dtype(dtype))
    views = {
        "transposed": base.transpose(2, 0, 1),
        "reversed": base[::-1, :, ::2],
        "swapped": base.swapaxes(0, 1),
        "broadcast": np.broadcast_to(base[:1], (7, 6, 33)),
        "column": base[:, :, :1],
        "row": base.T[:1],
    }
    write(tmp_path / "a.safetensors", views)
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    for name, view in views.items():
        assert_same(reader.read(name), np.ascontiguousarray(view))


# folders


def test_a_small_folder_is_one_file(tmp_path, tensors):
    write(tmp_path / "out", tensors, stem="diffusion_pytorch_model", max_shard_bytes=1 << 20)
    names = [f.name for f in (tmp_path / "out").iterdir()]
    assert names == ["diffusion_pytorch_model.safetensors"]
    assert SafetensorsReader(tmp_path / "out").tensors.keys() == tensors.keys()


def test_shards_follow_the_hugging_face_layout(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {f"w{i}": np.full((100,), i, np.float32) for i in range(5)}
    tensors["large"] = np.ones((1000,), np.float32)
    write(tmp_path / "out", tensors, max_shard_bytes=800)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6000}
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    for name, value in tensors.items():
        shard = safetensors.load_file(tmp_path / "out" / index["weight_map"][name])
        assert_same(shard[name], value)
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors.index.json"):
        reader = SafetensorsReader(path)
        for name, value in tensors.items():
            assert_same(reader.read(name), value)


def test_the_index_decides_which_tensors_there_are(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.ones(2), "unused": np.ones(3)})
    write(tmp_path / "b.safetensors", {"x": np.zeros(2), "y": np.ones(4)})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = SafetensorsReader(tmp_path)
    assert reader.tensors.keys() == {"x", "y"} and reader.read("x").tolist() == [1, 1]


def test_an_existing_folder_keeps_its_other_files(tmp_path, tensors):
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, tensors, max_shard_bytes=200)
    assert (tmp_path / "config.json").exists()
    assert SafetensorsReader(tmp_path).tensors.keys() == tensors.keys()
    with pytest.raises(WeightsError, match=r"found weights already \(model-00001-of-\d+\.safet"):
        write(tmp_path, tensors)


def folder_with(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_bytes(content)
    return tmp_path


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "a.safetensors", "z": "a.safetensors"}}, "z: found no such tensor"),
        (
            {"weight_map": {"x": "a.safetensors", "y": "gone.safetensors"}},
            "1 of 2 files missing: gone.safetensors, expected all of them; finish the download",
        ),
        ({"weight_map": {"x": "../a.safetensors"}}, "x: found file '../a.safetensors', expected"),
        ({"weight_map": {}}, "weight_map {}, expected the file of each tensor"),
        ({}, "weight_map None"),
        ([1], r"found no JSON: \[1\], expected a JSON object"),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, message):
    write(tmp_path / "a.safetensors", {"x": np.ones(2)})
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        SafetensorsReader(tmp_path)


def test_an_index_that_is_no_json_is_named(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.ones(2)})
    (tmp_path / INDEX).write_text('{"weight_map": {')
    with pytest.raises(WeightsError, match=f"{INDEX}: found no JSON .*download the folder again"):
        SafetensorsReader(tmp_path)
    (tmp_path / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match=f"{INDEX}: found a git-LFS pointer.*git lfs pull"):
        SafetensorsReader(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(WeightsError, match=f"{INDEX}: found no file, expected an index"):
        SafetensorsReader(tmp_path / INDEX)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(WeightsError, match="found no safetensors among: nothing"):
        SafetensorsReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"found no safetensors among: pytorch_model\.bin"):
        SafetensorsReader(tmp_path)
    with pytest.raises(WeightsError, match=r"nowhere: found nothing, expected a \.safetensors"):
        SafetensorsReader(tmp_path / "nowhere")
    write(tmp_path / "a.safetensors", {"x": np.ones(2)})
    write(tmp_path / "b.safetensors", {"x": np.ones(2)})
    message = r"b\.safetensors: x: found a second one, besides a\.safetensors, expected each tensor"
    with pytest.raises(WeightsError, match=message):
        SafetensorsReader(tmp_path)
    for name in ("model.safetensors.index.json", "model.fp16.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(WeightsError, match=r"several indices: model\.fp16.*give the one to read"):
        SafetensorsReader(tmp_path)


def test_a_missing_shard_shows_without_an_index(tmp_path):
    write(tmp_path, {f"w{i}": np.ones(10) for i in range(3)}, max_shard_bytes=100)
    (tmp_path / INDEX).unlink()
    assert len(SafetensorsReader(tmp_path).tensors) == 3
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of 3 files missing: model-00002-of-00003\.safet"):
        SafetensorsReader(tmp_path)


# files that are not what they claim to be


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file, expected a safetensors file; download it again"),
        (b"\x10\0\0", "found 3 bytes, expected a safetensors file, truncated; download"),
        (b"\xff" * 64, "found a header of 18446744073709551615 bytes, expected 2 to 100000000"),
        (b"\0" * 64, "found a header of 0 bytes"),
        (b"\x40" + b"\0" * 7 + b"{", "found 9 bytes: truncated inside the header, expected more"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer.*`git lfs pull`"),
        (b"PK\x03\x04" + b"\0" * 90, r"found a PyTorch pickle \(zip\).*use the .safetensors files"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "found a PyTorch pickle, expected"),
        (b"GGUF\x03\0\0\0" + b"\0" * 90, "found a GGUF file"),
        (b"<!doctype html><html>", "found a web page.*accept the licence"),
    ],
)
def test_other_files_are_recognised(tmp_path, content, message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{file}: {message}|{message}"):
        SafetensorsReader(file)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_by_name(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"anything")
    with pytest.raises(WeightsError, match=rf"a PyTorch pickle \(\{suffix}\), expected a safet"):
        SafetensorsReader(file)


EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a": ', b"", r"a header that is not JSON \(.*\), expected a JSON object; download"),
        (b"\xff\xfe{}  ", b"", "a header that is not JSON .*utf-8"),
        (b"[" * 100_000, b"", "a header that is not JSON"),
        ([1], b"", r"a header that is not JSON: \[1\]"),
        (b'{"a": 1, "a": 2}', b"", "'a' is named twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__: found {'a': 1}, expected text by name"),
        ({"a": 1}, b"", "a: found the entry 1, expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, b"", "a: found the entry {'dtype': 'F32'}"),
        ({"a": entry(0, 8, (-2,))}, EIGHT, "a: found the entry .*-2"),
        ({"a": entry(0, 8, (2.0,))}, EIGHT, "a: found the entry"),
        ({"a": entry(0, 8, (2,), "F4")}, EIGHT, "a: found type F4, expected one of BF16.*bf16 w"),
        ({"a": entry(0, 8, (2,), ["F32"])}, EIGHT, r"a: found type \['F32'\]"),
        ({"a": entry(0, 8, (3,))}, EIGHT, r"a: found 8 bytes, expected 12 for F32 \(3,\)"),
        ({"a": entry(8, 0)}, EIGHT, "a: found -8 bytes, expected 8"),
        (
            {"a": entry(0, 8), "b": entry(4, 12)},
            EIGHT + b"\0" * 4,
            "b: found an overlap: its data begins at byte 4, expected byte 8",
        ),
        ({"a": entry(8, 16)}, EIGHT * 2, "a: found a hole: its data begins at byte 8, expected b"),
        (
            {"a": entry(0, 8)},
            b"\0" * 7,
            "a: found 76 bytes in the file, which is truncated, exp.*77",
        ),
        ({"a": entry(0, 8)}, EIGHT + b"\n", "1 bytes after the last tensor, expected a file of 77"),
    ],
)
def test_broken_headers_are_named(tmp_path, header, data, message):
    file = raw_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(WeightsError, match=message) as raised:
        SafetensorsReader(file)
    assert str(raised.value).startswith(f"{file}: ")


@pytest.mark.parametrize("length", [0x3C, 0x280])
def test_a_length_that_looks_like_another_file_is_read(tmp_path, length):
    header = json.dumps({"a": entry(0, 8)}).encode().ljust(length)
    reader = SafetensorsReader(raw_file(tmp_path / "a.safetensors", header, EIGHT))
    assert reader.read("a").tolist() == [0, 0]


def test_an_unknown_name_gets_the_nearest_ones(tmp_path):
    write(tmp_path / "a.safetensors", {"img_in.weight": np.ones(2), "zzz": np.ones(2)})
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    message = (
        r"img_in\.bias: found no such tensor, expected one of its 2 tensors \(img_in\.weight\)"
    )
    with pytest.raises(WeightsError, match=message):
        reader.read("img_in.bias")
    with pytest.raises(WeightsError, match=message):
        reader.release("img_in.bias")


# writing all or nothing


ONE, TWO = np.ones(3, np.float32), np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", ONE)], r"no array to write for 1 of 2: b, expected all of them"),
        ([("a", ONE), ("b", TWO), ("a", ONE)], "a: found it a second time, expected each array on"),
        ([("a", ONE), ("c", TWO)], "c: found an array to write, expected none of this name"),
        ([("a", TWO)], r"a: found an array float32 \(2, 2\) to write, expected float32 \(3,\)"),
        ([("a", ONE.astype(np.float16))], r"a: found an array float16 \(3,\) to write, expected f"),
    ],
)
@pytest.mark.parametrize("name", ["new/deep/a.safetensors", "new/folder"])
def test_nothing_is_left_after_a_wrong_tensor(tmp_path, given, message, name):
    specs = {"a": ((3,), np.dtype("f4")), "b": ((2, 2), np.dtype("f4"))}
    with pytest.raises(WeightsError, match=message):
        write_safetensors(tmp_path / name, specs, iter(given), max_shard_bytes=12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    def broken():
        yield "a", ONE
        raise error

    write(tmp_path / "x.safetensors", {"old": TWO})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    specs = {"a": ((3,), np.dtype("f4")), "b": ((2, 2), np.dtype("f4"))}
    for target in ("x.safetensors", "folder"):
        with pytest.raises(error):
            write_safetensors(tmp_path / target, specs, broken(), max_shard_bytes=12)
    assert sorted(tmp_path.rglob("*")) == before
    assert SafetensorsReader(tmp_path / "x.safetensors").tensors.keys() == {"old"}
    write(tmp_path / "x.safetensors", {"new": ONE})
    assert SafetensorsReader(tmp_path / "x.safetensors").tensors.keys() == {"new"}


def test_a_type_without_a_code_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="a: found type complex64, expected one of"):
        write(tmp_path / "a.safetensors", {"a": np.ones(2, np.complex64)})


def test_a_full_disk_is_refused_at_once(tmp_path):
    specs = {"a": ((1 << 50,), np.dtype("f4"))}
    with pytest.raises(WeightsError, match=r"GB free, expected 4503599\.63 GB; free some"):
        write_safetensors(tmp_path / "new" / "a.safetensors", specs, iter(()))
    assert not list(tmp_path.iterdir())


# finite values


@pytest.mark.parametrize("dtype", [np.dtype(t) for t in TYPES if np.dtype(t).kind in "fV"], ids=str)
def test_finite_agrees_with_numpy_on_every_pattern(dtype, monkeypatch):
    monkeypatch.setattr(blocks_module, "_CACHED", 64)
    if dtype.itemsize <= 2:
        bits = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    else:
        rng = np.random.default_rng(0)
        special = np.array([0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).max], dtype)
        bits = np.concatenate([rng.integers(0, 256, 1 << 14, np.uint8), special.view(np.uint8)])
        bits = bits.view(f"u{dtype.itemsize}")
    values = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = np.isfinite(values)
    finite = values[expected]
    assert is_finite(finite) and is_finite(finite[::-2]) and is_finite(finite[:0])
    for bad in values[~expected][:300]:
        array = np.ones((6, 40), dtype)
        array[5, 39] = bad
        assert not is_finite(array) and not is_finite(array.T) and not is_finite(array[:, ::-3])
        assert is_finite(array[:5]) and not is_finite(bad)


def test_integers_are_finite():
    assert is_finite(np.full((3,), -1)) and is_finite(np.array([True]))
    assert not is_finite(np.array([1, complex(0, np.nan)]))
    assert is_finite([1.0, 2.0]) and not is_finite(float("nan"))


# memory


RESIDENT = """
import resource, sys
import ml_dtypes, numpy as np
from clvr_jax.weights import SafetensorsReader, is_finite, write_safetensors
rows = np.random.default_rng(0).integers(0, 1 << 14, (4096, 8192), np.uint16)  # 64 MiB
array = rows.view(ml_dtypes.bfloat16)
specs = {f"w{i}": (array.shape[::-1], array.dtype) for i in range(10)}
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(sys.argv[1], specs, ((name, array.T) for name in specs))
with SafetensorsReader(sys.argv[1]) as reader:
    for name in specs:
        assert is_finite(reader.read(name))
        reader.release(name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_a_tensor(tmp_path):
    file = tmp_path / "large.safetensors"
    command = [sys.executable, "-c", RESIDENT, str(file)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert file.stat().st_size > 640e6
    assert float(done.stdout) < 120  # MiB above the source: one tensor and its blocks
