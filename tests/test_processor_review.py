"""What a template would hide, ends of turns, and pictures that are not plain files of 8 bits."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from clvr_jax.models.qwen3_vl import config, processor
from clvr_jax.models.qwen3_vl.processor import Processor
from launch.toy import SEEING, byte_tokenizer
from tests.backends import toy

VISION = config.VARIANTS["tiny"].vision
# as Qwen3-VL-Instruct's: a system message is shown only where it comes first
INSTRUCT = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}"
    "{%- for part in messages[0].content %}{{- part.text }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for m in messages %}{%- if m.role in ('user', 'assistant') %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- for part in m.content %}"
    "{%- if part.type == 'image' and m.role == 'user' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# as Qwen3's for text: turns since the last question keep their reasoning, or get an empty one
HYBRID = (
    "{%- set ns = namespace(last=messages|length - 1, found=false) %}"
    "{%- for m in messages[::-1] %}{%- if not ns.found and m.role == 'user' %}"
    "{%- set ns.found = true %}{%- set ns.last = messages|length - loop.index %}"
    "{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or loop.first %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


def make(template, images=True, stops=(), **options):
    tokenizer = byte_tokenizer(SEEING, template)
    seeing = processor.load(toy.folder(), VISION).images if images else None
    return Processor(tokenizer, template, seeing, stops, options)


def message(role, *parts):
    return {"role": role, "parts": parts}


def shown(reads, turn) -> str:
    return reads.tokenizer.decode(turn.ids)


def test_a_hidden_system_message_is_refused():
    """Rather than answered as if it had not been given."""
    reads = make(INSTRUCT)
    asked = message("user", "a")
    assert "be brief" in shown(reads, reads.first([message("system", "be brief"), asked]))
    for turn in (
        lambda: reads.first([asked, message("system", "be brief")]),
        lambda: reads.later([message("system", "be brief"), asked], True),
    ):
        with pytest.raises(ValueError, match="does not show a system message"):
            turn()
    plain = make(HYBRID, images=False)
    assert shown(plain, plain.later([message("system", "be brief"), asked], True)) == (
        "\n<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_pictures_belong_to_users(role):
    with pytest.raises(ValueError, match="pictures belong in user messages"):
        make(INSTRUCT).first([message(role, "a", toy.picture()), message("user", "b")])


@pytest.mark.parametrize("thinks", [{}, {"enable_thinking": False}])
def test_a_later_turn_of_a_template_that_edits_reasoning(thinks):
    reads = make(HYBRID, images=False, **thinks)
    empty = "<think>\n\n</think>\n\n" if thinks else ""
    text = shown(reads, reads.later([message("user", "b")], False))
    assert text == ("<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n" + empty)
    given = [message("assistant", "<think>\nhm\n</think>\n\nyes"), message("user", "b")]
    assert "hm" not in shown(reads, reads.later(given, True))


@pytest.mark.parametrize("words", ["\u241e", "a\u241e\u241eb", "\u241e" * 5])
def test_a_message_may_hold_any_sign(words):
    reads = make(INSTRUCT)
    text = shown(reads, reads.later([message("user", words)], True))
    assert text == f"\n<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"


def test_an_empty_message_is_an_empty_turn():
    for reads in (make(INSTRUCT), make(HYBRID, images=False)):
        text = shown(reads, reads.later([message("user")], True))
        assert text == "\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


def test_what_closes_a_turn_is_what_the_template_writes():
    """A base model's tokenizer ends texts with <|endoftext|>; its turns close with <|im_end|>."""
    ids = byte_tokenizer(SEEING, INSTRUCT).convert_tokens_to_ids
    end, close = ids("<|endoftext|>"), ids("<|im_end|>")
    reads = make(INSTRUCT, stops=(end, close))
    assert reads.close == close
    after = "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert shown(reads, reads.later([message("user", "b")], True)) == after
    assert shown(reads, reads.later([message("user", "b")], False)) == "<|im_end|>" + after


@pytest.mark.parametrize("named", [None, 256, [258, 256, 257]])
def test_generation_config_may_name_one_end_or_several_or_none(tmp_path, named):
    place = tmp_path / "vl"
    shutil.copytree(toy.folder(), place)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    expected = {None: (258,), 256: (258, 256)}.get(named if named is None or named == 256 else 0)
    assert processor.load(place, VISION).stops == (expected or (258, 256, 257))


def stored(image, kind="PNG", **fields) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **fields)
    file.seek(0)
    return Image.open(file)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photographs_are_turned_upright(orientation):
    """As transformers' own loading does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = stored(toy.picture(1, 64, 128), exif=exif)
    reads = make(INSTRUCT)
    ours, upright = reads.picture(photograph), reads.picture(load_image(photograph))
    assert ours.grid == upright.grid
    np.testing.assert_array_equal(ours.patches, upright.patches)


def test_pictures_of_16_bits_are_not_white():
    reads = make(INSTRUCT)
    grey = np.asarray(toy.picture(1).convert("L"))
    deep = stored(Image.fromarray(grey.astype(np.uint16) * 257))
    assert deep.mode.startswith("I")
    np.testing.assert_array_equal(
        reads.picture(deep).patches, reads.picture(Image.fromarray(grey)).patches
    )


def test_a_broken_file_is_a_request_that_cannot_be_answered():
    file = io.BytesIO()
    toy.picture(1, 256, 256).save(file, "JPEG")
    torn = Image.open(io.BytesIO(file.getvalue()[:700]))
    with pytest.raises(ValueError, match="cannot be read"):
        make(INSTRUCT).picture(torn)
