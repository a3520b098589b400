"""The same trajectories from every kind of file, in any order."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clvr_jax.data import containers
from clvr_jax.data.images import image_size, read_image
from clvr_jax.data.index import RecordError, json_places
from clvr_jax.data.sources import open_source
from clvr_jax.data.writers import write_array_record, write_jsonl
from launch.toy_data import make

COUNT = 5


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return make(tmp_path_factory.mktemp("toy"), COUNT, (1, 3, 2))


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def written(jsonl, kind, folder):
    """Write the toy dataset as another kind of file."""
    source = open_source(jsonl)
    if kind.startswith("array_record"):
        file = folder / "made.array_record"
        write_array_record(file, source, embed=kind.endswith("bytes"))
    elif kind in ("conversations", "messages"):
        file = folder / f"{kind}.jsonl"
        write_jsonl(file, source, kind)
    elif kind == "copied":
        file = folder / "copied.jsonl"
        write_jsonl(file, source, copy_images=True)
    else:
        file = jsonl.parent / f"{kind}.json"
        rows = records(jsonl)
        file.write_text(json.dumps(rows, indent=2 if kind == "pretty" else None))
    return file


def same(a, b):
    assert len(a) == len(b) == COUNT
    for index in (3, 0, 4, 1, 2, 0):
        one, other = a[index], b[index]
        assert one.with_images([""] * len(one.steps)) == other.with_images([""] * len(other.steps))
        for left, right in zip(one.steps, other.steps):
            assert image_size(left.image) == image_size(right.image)
            pixels = np.asarray(read_image(right.image))
            np.testing.assert_array_equal(np.asarray(read_image(left.image)), pixels)


@pytest.mark.parametrize(
    "kind",
    [
        "array_record_bytes",
        "array_record_paths",
        "conversations",
        "messages",
        "copied",
        "array",
        "pretty",
    ],
)
def test_all_kinds_hold_the_same(jsonl, kind, tmp_path):
    file = written(jsonl, kind, tmp_path)
    source = open_source(file)
    same(open_source(jsonl), source)
    same(open_source(jsonl), pickle.loads(pickle.dumps(source)))
    assert source.fingerprint == open_source(file).fingerprint


def test_parquet_with_images_inside_or_named(jsonl, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = records(jsonl)
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), jsonl.parent / "named.parquet", row_group_size=2
    )
    same(open_source(jsonl), open_source(jsonl.parent / "named.parquet"))
    for row in rows:
        for step in row["steps"]:
            data = (jsonl.parent / step["image"]).read_bytes()
            step["image"] = {"bytes": data, "path": "somewhere.png"}
    file = tmp_path / "inside.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    same(open_source(jsonl), open_source(file))
    back = tmp_path / "back.jsonl"
    write_jsonl(back, open_source(file), "conversations")
    same(open_source(jsonl), open_source(back))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordError, match=r"needs pyarrow; pip install 'clvr_jax\[parquet\]'"):
        open_source(tmp_path / "a.parquet")


def test_images_survive_there_and_back(jsonl, tmp_path):
    packed, back = tmp_path / "a.array_record", tmp_path / "back.jsonl"
    write_array_record(packed, open_source(jsonl))
    write_jsonl(back, open_source(packed))
    assert records(back)[1]["steps"][2]["image"] == "back_images/000001/3.png"
    original = (jsonl.parent / "toy-1" / "3.png").read_bytes()
    assert (tmp_path / "back_images/000001/3.png").read_bytes() == original
    same(open_source(jsonl), open_source(back))


def test_several_threads_read_at_once(jsonl, tmp_path):
    packed = tmp_path / "a.array_record"
    write_array_record(packed, open_source(jsonl))
    source, expected = open_source(packed), open_source(jsonl)
    with ThreadPoolExecutor(8) as pool:
        numbers = [i % COUNT for i in range(200)]
        for number, made in zip(numbers, pool.map(source.__getitem__, numbers)):
            assert made.id == expected[number].id
        images = [source[i].steps[0].image for i in numbers]
        sizes = list(pool.map(image_size, images))
    assert sizes == [image_size(expected[i].steps[0].image) for i in numbers]


def test_the_fingerprint_is_of_the_content(jsonl, tmp_path):
    source = open_source(jsonl)
    shutil.copytree(jsonl.parent, tmp_path / "copy")
    moved = (tmp_path / "copy" / jsonl.name).rename(tmp_path / "copy" / "other.jsonl")
    assert open_source(moved).fingerprint == source.fingerprint
    assert len(source.fingerprint) == 16
    moved.write_text(moved.read_text().replace("white", "black", 1))
    assert open_source(moved).fingerprint != source.fingerprint


def test_a_fixed_dataset_has_a_fixed_fingerprint(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "1"}\n')
    assert open_source(tmp_path / "a.jsonl").fingerprint == "db0593f147d8b7b7"


def test_large_binary_files_are_sampled(tmp_path, monkeypatch, jsonl):
    from clvr_jax.data import sources

    file = tmp_path / "a.array_record"
    write_array_record(file, open_source(jsonl))
    monkeypatch.setattr(sources, "_WHOLE", 1000)
    monkeypatch.setattr(sources, "_BLOCK", 100)
    first = open_source(file).fingerprint
    assert first == open_source(file).fingerprint
    data = bytearray(file.read_bytes())
    data[-50] ^= 1  # inside the last block
    (tmp_path / "b.array_record").write_bytes(data)
    assert sources._digest(tmp_path / "b.array_record", True) != sources._digest(file, True)


def test_folders_shards_and_splits(jsonl, tmp_path):
    lines = jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "train-00001-of-00002.jsonl").write_text("".join(lines[2:4]))
    (tmp_path / "train-00000-of-00002.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "test.jsonl").write_text(lines[4])
    (tmp_path / "notes.txt").write_text("no data")
    ids = lambda source: [made.id for made in source]
    assert ids(open_source(tmp_path, "train")) == ["toy-0", "toy-1", "toy-2", "toy-3"]
    assert ids(open_source(tmp_path, "test")) == ["toy-4"]
    assert ids(open_source(tmp_path)) == ["toy-4", "toy-0", "toy-1", "toy-2", "toy-3"]
    assert open_source(tmp_path).where(4).endswith("train-00001-of-00002.jsonl:2")
    with pytest.raises(RecordError, match=r"no files of the split dev; it holds test.jsonl, train"):
        open_source(tmp_path, "dev")
    (tmp_path / "more.json").write_text("[]")
    with pytest.raises(RecordError, match=r"holds \.json and \.jsonl files"):
        open_source(tmp_path)


def test_the_folders_that_the_loop_writes(jsonl, tmp_path):
    for made in open_source(jsonl):
        (tmp_path / made.id).mkdir()
        (tmp_path / made.id / "trajectory.json").write_text(json.dumps(made.record(), indent=1))
    same(open_source(jsonl), open_source(tmp_path))


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a dataset file"):
        open_source(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="holds no dataset"):
        open_source(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RecordError, match=r"no dataset file; its name must end in .json or"):
        open_source(tmp_path / "a.csv")
    (tmp_path / "a.array_record").write_bytes(b"x" * 1000)
    with pytest.raises(RecordError, match="is no ArrayRecord file, or it is cut off"):
        open_source(tmp_path / "a.array_record")
    with pytest.raises(RecordError, match="is a file; a split"):
        open_source(tmp_path / "a.csv", "train")


def test_a_broken_record_names_its_line_and_others_are_read(jsonl, tmp_path):
    lines = jsonl.read_text().splitlines()
    file = tmp_path / "a.jsonl"
    file.write_text(f"\n{lines[0]}\n\n{{broken\n{lines[1]}\n")
    source = open_source(file)
    assert len(source) == 3 and source[2].id == "toy-1"
    with pytest.raises(RecordError, match=r"a\.jsonl:4: is no JSON: Expecting property name"):
        source[1]
    with pytest.raises(IndexError, match="record 3 of 3"):
        source[3]


@pytest.mark.parametrize(
    "text,spans",
    [
        ("[]", []),
        (
            ' [{"a": 1}, {"b": "]}\\"{"},\n{"c": [{}, []]}]\n',
            [(2, 10, 1), (12, 26, 1), (28, 43, 2)],
        ),
        ("\ufeff[{}]", [(4, 6, 1)]),
        ('\n{"a":\n1}', [(1, 9, 2)]),
        ('{"a": 1}\n\n{"b": 2}\n', [(0, 9, 1), (10, 19, 3)]),
    ],
)
def test_where_the_records_of_a_json_file_lie(tmp_path, text, spans):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert list(zip(*(part.tolist() for part in json_places(tmp_path / "a.json")))) == spans


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "1: the file is empty"),
        ("\nhello", "2: neither an array of records nor a record"),
        ("[1, 2]", "1: expected a record or the array's end"),
        ("[\n{}\n{}]", "2: expected records separated by commas"),
        ("[{},\n[{}]]", "1: expected records separated by commas"),
        ("[{}]\nmore", "1: text follows the array's end"),
        ('[{},\n{"a": "', "2: the array is cut off; no ] ends it"),
    ],
)
def test_a_broken_json_file_names_the_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError) as caught:
        open_source(tmp_path / "a.json")
    assert str(caught.value) == f"{tmp_path / 'a.json'}:{message}"


def test_nothing_is_overwritten_and_failures_leave_nothing(jsonl, tmp_path):
    source = open_source(jsonl)
    file = tmp_path / "a.jsonl"
    write_jsonl(file, source, copy_images=True)
    with pytest.raises(FileExistsError):
        write_jsonl(file, source)
    with pytest.raises(FileExistsError):
        write_array_record(file, source)
    gone = source[0].with_images(["/nowhere.png"])
    for write in (
        lambda: write_jsonl(tmp_path / "b.jsonl", [source[1], gone], copy_images=True),
        lambda: write_array_record(tmp_path / "b.array_record", [source[1], gone]),
    ):
        with pytest.raises(FileNotFoundError):
            write()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.jsonl", "a_images"]


def test_places_inside_files_that_do_not_exist(jsonl, tmp_path):
    file = tmp_path / "a.array_record"
    write_array_record(file, open_source(jsonl))
    for place in (f"{file}#0/7", f"{file}#99/0"):
        assert containers.is_embedded(place)
        with pytest.raises(ValueError, match=r"does not exist: .* holds no image"):
            read_image(place)
    with pytest.raises(ValueError, match="does not exist"):
        read_image(f"{tmp_path}/b.array_record#0/0")
