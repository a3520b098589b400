"""Conversations become the tokens of inference; their sizes come from headers alone."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps
from tokenizers import pre_tokenizers, trainers

from clvr_jax.backends.protocol import Options, assistant, system, user
from clvr_jax.data.packing import Size, plan_packed
from clvr_jax.data.sources import open_source
from clvr_jax.data.trajectory import Message, Picture, Step, Trajectory
from clvr_jax.models.qwen3_vl import processor
from clvr_jax.models.qwen3_vl.model import position_ids
from clvr_jax.models.qwen3_vl.processor import Processor
from clvr_jax.sft.vlm import batches, examples
from launch import build_vlm
from launch.toy import SEEING, VLM_TEMPLATE, byte_tokenizer
from launch.toy_data import make
from tests.backends import toy
from tests.sft import vlm_cases

ANSWERS = ("Draw a jug.\n<IMG_GEN_1>", " spaced, é and 水 ", "done")


@pytest.fixture(scope="module")
def cfg():
    return build_vlm.find(str(toy.folder())).config


@pytest.fixture(scope="module")
def reads(cfg):
    return processor.load(toy.folder(), cfg.vision)


def talk():
    """Three turns; the first has a system message and two pictures, the last is text."""
    return [
        system("be brief"),
        user("look ", toy.picture(1), toy.picture(2, 64, 160), " well"),
        assistant(*ANSWERS[0].partition("\n")),
        user(toy.picture(3, 70, 90)),
        assistant(ANSWERS[1]),
        user("and now?"),
        assistant(ANSWERS[2]),
    ]


def test_tokens_are_those_of_a_session(reads, cfg):
    """A session whose every answer a grammar prescribes holds the same ids."""
    vlm = toy.load()
    session, since = vlm.start(), []
    for message in talk():
        if message.role != "assistant":
            since.append(message)
            continue
        text = message.text.replace("\n", r"\n")
        reply = session.ask(since, Options(max_tokens=99, grammar=f'start: "{text}"'))
        assert (reply.text, reply.finish, since) == (message.text, "stop", since)
        since = []
    ids = session.ids
    vlm.close()
    assert examples.encode(talk(), reads, cfg).ids.tolist() == list(ids)


def merging(reads) -> Processor:
    """A processor whose tokenizer joins letters and newlines, as a real one does."""
    tokenizer = byte_tokenizer(SEEING, VLM_TEMPLATE)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SEEING),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = ["<a jug> the jug there, draw another\n\n\n", "assistant user\n", "one\n\ntwo\n\n\n"] * 9
    tokenizer.backend_tokenizer.train_from_iterator(text, trainer)
    return Processor(tokenizer, VLM_TEMPLATE, reads.images)


def whole(messages, reads) -> list[int]:
    """transformers' own tokens of a conversation up to the last closing token."""
    given = [
        {
            "role": m.role,
            "content": [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
                for p in m.parts
            ],
        }
        for m in messages
    ]
    ids = reads.tokenizer.apply_chat_template(given, return_dict=False)
    images = [p for m in messages for p in m.parts if not isinstance(p, str)]
    counts = iter([len(reads.picture(image).patches) // 4 for image in images])
    image = reads.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = [i for token in ids for i in [token] * (next(counts) if token == image else 1)]
    return ids[: len(ids) - ids[::-1].index(reads.close)]


@pytest.mark.parametrize("merges", [False, True])
def test_tokens_are_those_of_the_whole_where_turns_are_separable(reads, cfg, merges):
    own = merging(reads) if merges else reads
    special = own.tokenizer.convert_tokens_to_ids
    names = ("image_pad", "vision_start", "vision_end", "video_pad")
    cfg = type(cfg)(cfg.text, cfg.vision, *(special(f"<|{name}|>") for name in names))
    assert examples.encode(talk(), own, cfg).ids.tolist() == whole(talk(), own)
    # an answer that begins with a newline is said after the header's own, not joined with it
    odd = [user("a"), assistant("\n\nthe jug")]
    ids = examples.encode(odd, own, cfg).ids.tolist()
    assert own.tokenizer.decode(ids) == own.tokenizer.decode(whole(odd, own))
    assert (ids == whole(odd, own)) == (not merges)


def test_the_assistant_is_learnt_and_nothing_else(reads, cfg):
    example = examples.encode(talk(), reads, cfg)
    learnt = reads.tokenizer.decode(example.ids[example.trained])
    assert learnt == "".join(f"{answer}<|im_end|>" for answer in ANSWERS)
    before = np.flatnonzero(np.diff(example.trained.astype(int)) == 1)
    header = reads.tokenizer.encode("<|im_start|>assistant\n")
    for at in before:
        assert example.ids[at + 1 - len(header) : at + 1].tolist() == header
    after = np.flatnonzero(np.diff(example.trained.astype(int)) == -1)
    assert len(after) == 2 and (example.ids[after + 1] == reads.tokenizer.encode("\n")[0]).all()
    assert example.trained[-1] and example.ids[-1] == reads.close


def test_pictures_and_positions(reads, cfg):
    example = examples.encode(talk(), reads, cfg)
    pictures = [p for m in talk() for p in m.images]
    assert len(example.pictures) == 3
    for (at, picture), image in zip(example.pictures, pictures, strict=True):
        np.testing.assert_array_equal(picture.patches, reads.picture(image).patches)
        cells = len(picture.patches) // 4
        assert example.ids[at - 1] == cfg.vision_start
        assert (example.ids[at : at + cells] == cfg.image_token).all()
        assert example.ids[at + cells] == cfg.vision_end
    grids = [picture.grid for _, picture in example.pictures]
    np.testing.assert_array_equal(example.positions, position_ids(example.ids, grids, cfg)[0])
    assert example.positions[:, 1].max() < len(example.ids) - 1  # images take fewer positions


def test_nothing_is_learnt_from_what_follows_the_last_answer(reads, cfg):
    """Trajectories without a closing end with the picture that nobody answered."""
    short = talk()[:3]
    longer = examples.encode([*short, user(toy.picture(5))], reads, cfg)
    np.testing.assert_array_equal(longer.ids, examples.encode(short, reads, cfg).ids)
    assert len(longer.pictures) == 2


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("a")], "no assistant message"),
        ([user("a"), assistant("b"), assistant("c")], "stands first or follows another"),
        ([assistant("b")], "stands first or follows another"),
        ([user("a"), assistant("<|im_end|> b")], r"holds <\|im_end\|>, which is no text"),
        ([user("a"), assistant("<|image_pad|>")], r"holds <\|image_pad\|>"),
        ([user("a"), Message("assistant", (toy.picture(),))], "pictures are the user's"),
        ([user("a <|image_pad|>"), assistant("b")], "give pictures as pictures"),
    ],
)
def test_conversations_that_cannot_be_learnt(reads, cfg, messages, text):
    with pytest.raises(ValueError, match=text):
        examples.encode(messages, reads, cfg)
    with pytest.raises(ValueError, match=f"conversation 1: .*{text}"):
        examples.sizes(2, lambda i: messages if i else talk(), reads, cfg)


def saved(kind, orientation, size=(96, 160)) -> bytes:
    """A picture file whose EXIF data turn it."""
    image, exif, out = toy.picture(4, *size), Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(out, kind, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_from_headers(reads, cfg, monkeypatch, tmp_path, kind, orientation):
    """Turned pictures change their grids' sides, and no pixel is decoded to know it."""
    file = tmp_path / "vase"
    file.write_bytes(saved(kind, orientation))
    trajectory = Trajectory(
        id="a", goal="a vase", steps=(Step(reasoning="draw", image="vase"),), closing="done"
    )
    messages = trajectory.within(tmp_path).messages()
    example = examples.encode(messages, reads, cfg)
    assert example.pictures[0][1].grid == ((10, 6) if orientation > 4 else (6, 10))
    upright = ImageOps.exif_transpose(Image.open(file))
    patches = reads.picture(upright).patches
    np.testing.assert_array_equal(example.pictures[0][1].patches, patches)

    def refuse(*_):
        raise AssertionError("a picture is decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert examples.sizes(1, lambda i: messages, reads, cfg) == [example.size]


def test_pictures_that_are_missing_are_named(reads, cfg, tmp_path):
    messages = [Message("user", ("see", Picture(str(tmp_path / "no.png"), 1))), assistant("ah")]
    for call in (
        lambda: examples.encode(messages, reads, cfg),
        lambda: examples.sizes(1, lambda i: messages, reads, cfg),
    ):
        with pytest.raises(ValueError, match=r"no\.png does not exist"):
            call()


def test_sizes_equal_encoded_ones(reads, cfg):
    rng = np.random.default_rng(0)
    picture = lambda: Image.new("RGB", tuple(rng.integers(1, 600, 2).clip(20).tolist()))
    make = lambda n: [
        m for i in range(n + 1) for m in (user(*[picture()] * (i % 3), "go"), assistant("x" * i))
    ]
    talks = [make(n) for n in range(12)]
    found = examples.sizes(len(talks), talks.__getitem__, reads, cfg)
    assert found == [examples.encode(t, reads, cfg).size for t in talks]
    assert found[0] == Size(len(examples.encode(talks[0], reads, cfg).ids), 0, 0)
    assert examples.sizes(0, talks.__getitem__, reads, cfg) == []
    line = [user(Image.new("RGB", (500, 2))), assistant("a line")]
    with pytest.raises(ValueError, match="aspect ratio"):
        examples.sizes(1, lambda i: line, reads, cfg)


def test_a_dataset_of_trajectories_is_planned_and_read(reads, cfg, tmp_path):
    """Every trajectory's answers, with actions and markers, are learnt once an epoch."""
    source = open_source(make(tmp_path, count=7, steps=(1, 3, 2)))
    messages = lambda i: source[i].messages()
    sizes = examples.sizes(len(source), messages, reads, cfg, threads=2)
    steps = plan_packed(sizes, max(size.tokens for size in sizes), 2, 1, seed=0, epoch=0)
    read = lambda i: examples.encode(messages(i), reads, cfg)
    learnt = []
    for step in steps:
        batch = batches.make(step, read, cfg.vision)
        for targets, weights in zip(batch["targets"].reshape(-1), batch["weights"].reshape(-1)):
            learnt += [int(targets)] * int(weights)
    said = [m.parts[0] for i in range(7) for m in messages(i) if m.role == "assistant"]
    assert sorted(reads.tokenizer.decode(learnt).split("<|im_end|>")) == sorted([*said, ""])
    assert sum("<IMG_GEN_" in text for text in said) == 13


def test_half_of_the_conversations_are_spread_over_more_positions():
    said = vlm_cases.example(3, (4, 6), 2, -5, 1, -7, (2, 2), 1, -2)
    turns = np.flatnonzero(np.diff(said.trained.astype(int)) == -1) + 1
    drawn = [examples.spread(said, np.random.default_rng(seed), 200) for seed in range(200)]
    moved = np.array([each.positions - said.positions for each in drawn])
    assert all(each.positions.dtype == np.int32 for each in drawn)
    assert all(np.array_equal(each.ids, said.ids) for each in drawn)
    assert (moved == moved[..., :1]).all(), "a picture moves as a whole"
    gaps = np.diff(moved[..., 0], prepend=0)
    assert (gaps >= 0).all() and set(np.flatnonzero(gaps.any(0))) == set(turns)
    assert 70 < (moved == 0).all((1, 2)).sum() < 130
    ends = np.array([each.positions.max() for each in drawn])
    assert ends.max() < 200 and np.quantile(ends, 0.9) > 150, "up to the whole room"


def test_what_has_one_turn_or_no_room_is_not_spread():
    for said, longest in [(vlm_cases.example(3, -5), 99), (vlm_cases.example(2, -2, 2, -2), 8)]:
        for seed in range(9):
            assert examples.spread(said, np.random.default_rng(seed), longest) is said
