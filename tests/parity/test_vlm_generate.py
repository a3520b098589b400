"""Whole conversations against transformers: ids, pixels, greedy tokens, sampling distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from clvr_jax.backends.protocol import Options, assistant, system, user
from clvr_jax.generate import sampling
from clvr_jax.models.qwen3_vl import processor
from tests.backends import toy
from tests.parity.reference import within

TOKENS = 64
CONVERSATIONS = 24


@functools.cache
def reference():
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy.folder()).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def vlm():
    model = toy.load()
    model.processor.stops = (10**6,)  # no token ends a turn: all 64 are compared
    yield model
    model.close()


def conversation(seed: int) -> list:
    """Messages of one to five turns with zero to three pictures of different aspect."""
    rng = np.random.default_rng(seed)
    words = lambda: "".join(chr(c) for c in rng.integers(97, 123, rng.integers(3, 40)))
    image = lambda: toy.picture(
        int(rng.integers(1e6)), int(rng.integers(30, 300)), int(rng.integers(30, 300))
    )
    messages = [system(words())] if rng.random() < 0.4 else []
    for turn in range(rng.integers(1, 4)):
        if turn:
            messages.append(assistant(words()))
        parts = [words()]
        if rng.random() < 0.7:
            parts.insert(int(rng.integers(0, 2)), image())
        if rng.random() < 0.2:
            parts.append(image())
        messages.append(user(*parts))
    return messages


def their_inputs(messages) -> dict:
    """Inputs of the reference by its own tokenizer, template and image processor."""
    tokenizer = AutoTokenizer.from_pretrained(toy.folder())
    images = Qwen2VLImageProcessorPil.from_pretrained(toy.folder())
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
    text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    pictures = [image for m in messages for image in m.images]
    out = {}
    if pictures:
        done = images(pictures, return_tensors="np")
        grids = done["image_grid_thw"]
        out["pixel_values"] = torch.from_numpy(np.asarray(done["pixel_values"]))
        out["image_grid_thw"] = torch.from_numpy(grids)
        for grid in grids:
            pads = "\x00" * (int(grid.prod()) // 4)
            text = text.replace(processor.IMAGE, pads, 1)
        text = text.replace("\x00", processor.IMAGE)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    image = ids == tokenizer.convert_tokens_to_ids(processor.IMAGE)
    return {"input_ids": ids, "mm_token_type_ids": image.int(), **out}


@pytest.mark.parametrize("seed", range(CONVERSATIONS))
def test_ids_and_pixels_are_the_references(vlm, seed):
    messages = conversation(seed)
    theirs = their_inputs(messages)
    ours = vlm.processor.first([{"role": m.role, "parts": m.parts} for m in messages])
    assert ours.ids.tolist() == theirs["input_ids"][0].tolist()
    if "pixel_values" not in theirs:
        assert not ours.pictures
        return
    grids = theirs["image_grid_thw"][:, 1:].tolist()
    assert [list(p.grid) for _, p in ours.pictures] == grids
    patches = np.concatenate([p.patches for _, p in ours.pictures]).reshape(-1, 3, 256)
    levels = vlm.processor.levels()
    pixels = levels[np.arange(3)[:, None], patches]  # as `text.look` does on the device
    twice = np.repeat(pixels[:, :, None], 2, axis=2).reshape(len(patches), -1)
    np.testing.assert_array_equal(twice, theirs["pixel_values"].numpy())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),
        ((768, 1344), (768, 1344)),
        ((1000, 700), (992, 704)),
        ((200, 200), (256, 256)),
        ((4032, 3024), (4032, 3008)),
        ((5000, 5000), (4096, 4096)),
        ((80, 48), (352, 224)),
    ],
)
def test_resize_constants_of_the_released_preprocessor(size, expected):
    """By the reference's function with the released areas; other constants give other sizes."""
    resize = functools.partial(smart_resize, *size)
    assert resize(factor=32, min_pixels=65536, max_pixels=16777216) == expected
    assert resize(factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280) != expected


def test_our_processor_takes_sizes_from_the_file(vlm):
    """The toy's file says 4096 to 65536 pixels, not the class's defaults."""
    for height, width in ((40, 40), (96, 128), (700, 500), (33, 470)):
        rows, cols = vlm.processor.picture(toy.picture(1, height, width)).grid
        size = smart_resize(height, width, factor=32, min_pixels=4096, max_pixels=65536)
        assert (rows * 16, cols * 16) == size


@pytest.mark.parametrize("seed", range(CONVERSATIONS))
def test_greedy_tokens_are_the_references(vlm, seed):
    messages = conversation(seed)
    inputs = their_inputs(messages)
    theirs = reference().generate(
        **inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0
    )[0, inputs["input_ids"].shape[1] :]
    session = vlm.start()
    reply = session.ask(messages, Options(max_tokens=TOKENS))
    ours = session.ids[-TOKENS:]
    assert reply.finish == "length" and reply.usage.completion == TOKENS
    assert len(set(ours)) >= 8, "the toy model is degenerate"
    assert list(ours) == theirs.tolist()
    session.close()


def test_turn_by_turn_equals_the_whole_conversation(vlm):
    """Our session reads turn by turn, the reference the whole conversation with our own ids."""
    session = vlm.start()
    pictures = [toy.picture(i, 64 + 32 * i, 128) for i in range(3)]
    for turn in range(3):
        session.ask([user("look", pictures[turn], "and tell")], Options(max_tokens=20))
    ids = torch.tensor([list(session.ids)])
    images = Qwen2VLImageProcessorPil.from_pretrained(toy.folder())
    done = images(pictures, return_tensors="np")
    image = ids == vlm.processor.tokenizer.convert_tokens_to_ids(processor.IMAGE)
    scores = reference()(
        input_ids=ids,
        mm_token_type_ids=image.int(),
        pixel_values=torch.from_numpy(np.asarray(done["pixel_values"])),
        image_grid_thw=torch.from_numpy(done["image_grid_thw"]),
    ).logits[0]
    # the greedy tokens of every turn are what the reference finds likeliest there
    chosen = scores[-21:-1].argmax(-1).tolist()
    assert chosen == list(session.ids[-20:])
    theirs = torch.log_softmax(scores[-21:-1], -1).gather(-1, ids[0, -20:, None])[:, 0]
    seq = session._sequence
    del seq.ids[-20:]  # as if the last turn had not been said
    seq.cached, seq.position = seq.cached - 20, seq.position - 20
    ours = vlm.engine.call(lambda: vlm.engine.score(seq, [ids[0, -20:].tolist()]))[0]
    assert within(1e-5, ours, theirs.numpy())


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "top_p": {"temperature": 1.5, "top_p": 0.7},
    "min_p": {"temperature": 1.2, "min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition": 1.3},
}


def their_weights(scores: np.ndarray, ids: list[int], o: dict) -> np.ndarray:
    """Probabilities after the reference's processors, in the order of its `generate`."""
    chain = LogitsProcessorList()
    if "repetition" in o:
        chain.append(RepetitionPenaltyLogitsProcessor(o["repetition"]))
    if "temperature" in o:
        chain.append(TemperatureLogitsWarper(o["temperature"]))
    if "top_k" in o:
        chain.append(TopKLogitsWarper(o["top_k"]))
    if "top_p" in o:
        chain.append(TopPLogitsWarper(o["top_p"]))
    if "min_p" in o:
        chain.append(MinPLogitsWarper(o["min_p"]))
    out = chain(torch.tensor([ids]), torch.from_numpy(scores.copy())[None])
    return torch.softmax(out.double(), -1)[0].numpy()


def our_options(rows: int, **o) -> sampling.Sampling:
    fill = lambda name, default, dtype: jnp.full(rows, o.get(name, default), dtype)
    return sampling.Sampling(
        temperature=fill("temperature", 1.0, jnp.float32),
        top_k=fill("top_k", 0, jnp.int32),
        top_p=fill("top_p", 1.0, jnp.float32),
        min_p=fill("min_p", 0.0, jnp.float32),
        repetition=fill("repetition", 1.0, jnp.float32),
        presence=fill("presence", 0.0, jnp.float32),
        frequency=fill("frequency", 0.0, jnp.float32),
        seed=jnp.arange(rows, dtype=jnp.uint32),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_sampling_has_the_references_distribution(name):
    """Same support, same probabilities; 40,000 draws pass a chi-square test."""
    rng = np.random.default_rng(5)
    scores = (2.5 * rng.standard_normal(300)).astype(np.float32)
    ids = rng.integers(0, 300, 20).tolist()
    theirs = their_weights(scores, ids, OPTIONS[name])
    options = our_options(1, **OPTIONS[name])
    seen = np.zeros((1, 300), bool)
    seen[0, ids] = True
    counts = jnp.zeros((1, 300), jnp.int32)
    ours = sampling.warped(
        sampling.penalised(jnp.asarray(scores)[None], options, jnp.asarray(seen), counts), options
    )
    ours = jax.nn.softmax(ours, axis=-1)[0]
    assert ((np.asarray(ours) > 0) == (theirs > 0)).all()
    assert within(2e-6, ours, theirs)
    draws, rows = 40_000, 4000
    step = jax.jit(sampling.sample)
    tokens = np.concatenate(
        [
            step(
                jnp.tile(jnp.asarray(scores), (rows, 1)),
                our_options(rows, **OPTIONS[name]),
                jnp.tile(jnp.asarray(seen), (rows, 1)),
                jnp.zeros((rows, 300), jnp.int32),
                jnp.full(rows, i),
            )
            for i in range(draws // rows)
        ]
    )
    counted = np.bincount(tokens, minlength=300)
    assert not counted[theirs == 0].any()
    often = theirs * draws >= 5
    rest = draws * theirs[~often].sum()
    observed, expected = list(counted[often]), list(draws * theirs[often])
    if rest > 0:
        observed, expected = [*observed, counted[~often].sum()], [*expected, rest]
    if len(observed) > 1:
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4
