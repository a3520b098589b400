"""Every fault is found, and its line is named."""

import json

import pytest
from PIL import Image

from clvr_jax.data.images import Limits
from clvr_jax.data.sources import open_source
from clvr_jax.data.validate import Fault, InvalidData, require_valid, validate
from clvr_jax.data.writers import write_array_record, write_jsonl
from launch.toy_data import make

GOOD = 3  # lines before the broken one


@pytest.fixture
def toy(tmp_path):
    return make(tmp_path, GOOD + 1, 2)


def broken(toy, change, form="native") -> list[str]:
    """Break the record on line 4, and return the faults, which must all be of that line."""
    if form != "native":
        file = toy.with_name("sharegpt.jsonl")
        write_jsonl(file, open_source(toy), form)
        toy = file
    lines = toy.read_text().splitlines()
    record = json.loads(lines[GOOD])
    change(record)
    lines[GOOD] = json.dumps(record)
    toy.write_text("\n".join([*lines, lines[0].replace("toy-0", "toy-9", 1)]) + "\n")
    report = validate(toy)
    assert report.records == GOOD + 2
    assert {fault.where for fault in report.faults} == {f"{toy}:{GOOD + 1}"}
    return [fault.what for fault in report.faults]


def test_good_data_has_no_faults(toy):
    report = validate(toy, full=True)
    assert report.summary() == "4 records, 8 images: no faults"
    assert require_valid(toy) == report


def paint(toy, size):
    Image.new("1", size).save(toy.parent / "toy-3" / "2.png")


def test_a_missing_image(toy):
    (toy.parent / "toy-3" / "2.png").unlink()
    assert broken(toy, lambda r: None) == ["image 2 (toy-3/2.png) does not exist"]


def test_an_unreadable_image(toy):
    (toy.parent / "toy-3" / "2.png").write_text("hello")
    assert broken(toy, lambda r: None) == ["image 2 (toy-3/2.png) is no picture that can be read"]


def test_an_image_that_is_cut_off(toy):
    image = toy.parent / "toy-3" / "2.png"
    image.write_bytes(image.read_bytes()[:-30])
    assert broken(toy, lambda r: None)[0].startswith("image 2 (toy-3/2.png) cannot be decoded")


def test_an_animated_image(toy):
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(toy.parent / "toy-3" / "2.png", save_all=True, append_images=frames[1:])
    assert broken(toy, lambda r: None)[0].endswith("is animated, 2 frames; it must be one picture")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 64), (64, 20_000)])
def test_an_image_of_a_wrong_size(toy, size):
    paint(toy, size)
    (fault,) = broken(toy, lambda r: None)
    assert fault.startswith(f"image 2 (toy-3/2.png) is {size[0]}x{size[1]} pixels; ")


def edit(**changes):
    return lambda record: record.update(changes)


def step(number, **changes):
    return lambda record: record["steps"][number - 1].update(changes)


def say(turn, value):
    return lambda record: record["conversations"][turn - 1].update(value=value)


def swap(record):
    turns = record["conversations"]
    turns[1], turns[2] = turns[2], turns[1]


@pytest.mark.parametrize(
    "form,change,message",
    [
        ("conversations", edit(images=["toy-3/1.png"]), "2 <image> tags in the turns, 1 images"),
        ("conversations", say(3, "look"), "turn 3: must hold <image> once, holds it 0 times"),
        ("conversations", say(2, "x\n<IMG_GEN_2>"), "turn 2: must end with <IMG_GEN_1>"),
        ("conversations", say(4, "x\n<IMG_GEN_1>"), "turn 4: must end with <IMG_GEN_2>"),
        ("conversations", swap, "turn 2: wrong role order"),
        ("conversations", edit(conversations=[]), "conversations: must be a list of turns"),
        ("conversations", edit(source="web"), "source: is no field of the format"),
        ("native", edit(steps=[]), "steps: List should have at least 1 item"),
        ("native", step(2, reasoning="as <IMG_GEN_2>"), "names <IMG_GEN_2>; 1 to 1 exist"),
        (
            "native",
            step(2, action={"kind": "edit", "prompt": "x", "references": [3]}),
            "step 2: reference 3 is a later image; 1 to 1 exist",
        ),
        ("native", edit(colour="red"), "colour: is no field of the schema"),
        ("native", edit(goal=" "), "goal: is empty"),
        ("native", edit(goal="a<|im_end|>"), "goal: contains <|im_end|>"),
        ("native", step(1, reasoning="<|image_pad|>"), "step 1: reasoning: contains <|image_pad|>"),
        ("native", edit(id="toy-1"), "the id 'toy-1' is taken by "),
    ],
)
def test_a_broken_record(toy, form, change, message):
    told = broken(toy, change, form)
    assert any(message in fault for fault in told), told


def test_a_taken_id_names_the_first(toy):
    (fault,) = broken(toy, edit(id="toy-1"))
    assert fault == f"the id 'toy-1' is taken by {toy}:2"


@pytest.mark.parametrize(
    "line,message",
    [
        (b'{"id": "\xff"}', "is no UTF-8: byte 0xff at byte 8 of the record"),
        (b'{"id":', "is no JSON: Expecting value (column 7)"),
        (b"[1, 2]", "is a list; a record is a JSON object"),
        (b'{"id": "a", "id": "b"}', "is no record: the field 'id' stands twice in one object"),
        (b'{"id": NaN}', "is no JSON: NaN is no JSON number"),
        (b"[" * 100_000, "is no record: too many levels of brackets"),
    ],
)
def test_a_line_that_is_no_record(toy, line, message):
    lines = toy.read_bytes().splitlines()
    toy.write_bytes(b"\n".join([*lines[:2], b"", line, *lines[2:]]) + b"\n")
    assert validate(toy).faults == (Fault(f"{toy}:4", message),)


def test_records_of_an_array_are_named_by_their_first_line(toy):
    records = [json.loads(line) for line in toy.read_text().splitlines()]
    records[1]["goal"] = ""
    records[3]["steps"][0]["image"] = "none.png"
    text = json.dumps(records, indent=1)
    file = toy.with_name("array.json")
    file.write_text(text)
    starts = [number for number, line in enumerate(text.splitlines(), 1) if line == " {"]
    assert validate(file).faults == (
        Fault(f"{file}:{starts[1]}", "goal: is empty"),
        Fault(f"{file}:{starts[3]}", "image 1 (none.png) does not exist"),
    )


def test_all_faults_of_all_files_are_collected(toy, tmp_path):
    lines = toy.read_text().splitlines()
    first, second = (json.loads(line) for line in lines[:2])
    first["goal"], second["steps"][1]["image"] = "", "none.png"
    second["extra"] = 1
    (tmp_path / "more.jsonl").write_text(
        "\n".join([json.dumps(first), "broken", json.dumps(second)])
    )
    (tmp_path / "a.jsonl").write_text("")
    report = validate(tmp_path)
    assert [str(fault).removeprefix(f"{tmp_path}/") for fault in report.faults] == [
        "more.jsonl:1: goal: is empty",
        "more.jsonl:2: is no JSON: Expecting value (column 1)",
        "more.jsonl:3: extra: is no field of the schema",
        "more.jsonl:3: image 2 (none.png) does not exist",
    ]
    assert report.summary() == "7 records, 9 images: 4 faults in 3 places"


def test_a_fault_inside_an_array_record_names_the_record(toy, tmp_path):
    paint(toy, (1, 1))
    file = tmp_path / "a.array_record"
    write_array_record(file, open_source(toy))
    (fault,) = validate(file).faults
    assert fault.where == f"{file}[3]" and "#3/1) is 1x1 pixels" in fault.what


def test_files_that_cannot_be_opened_are_faults_too(toy, tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("[{},")
    assert validate(file).faults == (Fault(f"{file}:1", "the array is cut off; no ] ends it"),)
    bad = tmp_path / "bad.array_record"
    bad.write_bytes(b"x" * 99)
    assert validate(bad).faults == (Fault(str(bad), "is no ArrayRecord file, or it is cut off"),)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert validate(empty).faults == (Fault(str(empty), "holds no records"),)
    with pytest.raises(FileNotFoundError):
        validate(tmp_path / "none")
    with pytest.raises(InvalidData, match=r"1 fault in 1 place\n.*1.png: is no dataset file"):
        require_valid(toy.parent / "toy-0" / "1.png")


def test_limits_and_the_message_of_an_error(toy):
    with pytest.raises(InvalidData) as caught:
        require_valid(toy, limits=Limits(min_side=65))
    message = str(caught.value)
    assert message.startswith("the data cannot be used: 4 records, 8 images: 8 faults in 4 places")
    assert f"{toy}:1: image 1 (toy-0/1.png) is 64x64 pixels; both sides must have" in message
    assert len(caught.value.report.faults) == 8


def test_progress_is_told(toy):
    told = []
    validate(toy, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 4)]
