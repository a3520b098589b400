"""Turns rendered one by one, by templates that behave like Qwen's; what a folder must hold."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clvr_jax.models.qwen3_vl import config, processor
from clvr_jax.models.qwen3_vl.processor import Processor
from launch.toy import SEEING, VLM_TEMPLATE, byte_tokenizer
from tests.backends import toy

# Qwen3's text template: reasoning of earlier turns is dropped, thinking can be switched off
TEXT_TEMPLATE = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# a Thinking edition: the turn begins inside the reasoning
THINKING = VLM_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)


def make(template, images=True, **options):
    tokenizer = byte_tokenizer(SEEING, template)
    seeing = processor.load(toy.folder(), config.VARIANTS["tiny"].vision).images
    return Processor(tokenizer, template, seeing if images else None, (), options)


def message(role, *parts):
    return {"role": role, "parts": parts}


@pytest.mark.parametrize("template", [VLM_TEMPLATE, THINKING])
@pytest.mark.parametrize("ended", [True, False])
def test_turns_join_to_the_whole_conversation(template, ended):
    """Read turn by turn, with the sampled ids between them, it is what one rendering gives."""
    reads = make(template)
    turns = [
        message("user", "look", toy.picture(1), "here"),
        message("user", toy.picture(2, 64, 64), "and here"),
    ]
    said = "an answer"
    sampled = reads.tokenizer.encode(said) + ([reads.stops[0]] if ended else [])
    opening = reads.first(turns[:1]).ids
    later = reads.later(turns[1:], ended)
    joined = [*opening, *sampled, *later.ids]
    whole = reads.first([turns[0], message("assistant", said), turns[1]])
    if template is THINKING:  # the reasoning that was begun stays, as it was sampled
        extra = len(reads.tokenizer.encode("<think>\n"))
        joined = [*opening[:-extra], *sampled, *later.ids]
    assert joined == whole.ids.tolist()
    assert len(later.pictures) == 1 and later.ids[later.pictures[0][0]] == reads._image
    np.testing.assert_array_equal(later.pictures[0][1].patches, whole.pictures[1][1].patches)


def test_earlier_reasoning_stays_as_it_was_sampled():
    """The template would drop it on a new rendering; a session's ids are never rendered again."""
    reads = make(TEXT_TEMPLATE, images=False)
    text = reads.tokenizer.decode(reads.later([message("user", "b")], True).ids)
    assert text == "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"


def test_template_options_reach_the_template():
    off = make(TEXT_TEMPLATE, images=False, enable_thinking=False)
    assert off.render([message("user", "a")]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert make(TEXT_TEMPLATE, images=False).render([message("user", "a")]).endswith("assistant\n")


def test_text_only_models_get_strings():
    """Qwen3's template would show a list of parts as nothing."""
    reads = make(TEXT_TEMPLATE, images=False)
    assert "<|im_start|>user\nonetwo<|im_end|>" in reads.render([message("user", "one", "two")])
    with pytest.raises(ValueError, match="text only"):
        reads.first([message("user", toy.picture())])


def test_a_template_that_hides_pictures_or_turns_is_refused():
    hides = make(VLM_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", ""))
    with pytest.raises(ValueError, match="shows 0 of 1 images"):
        hides.first([message("user", toy.picture())])
    last_only = make(VLM_TEMPLATE.replace("for m in messages", "for m in messages[-1:]"))
    with pytest.raises(ValueError, match="does not keep an earlier assistant turn"):
        last_only.later([message("user", "b")], True)
    strict = make("{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match="refuses the conversation: no system"):
        strict.first([message("system", "x")])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pictures_of_every_mode_are_the_references(mode):
    reads = make(VLM_TEMPLATE)
    image = toy.picture(3, 70, 90).convert(mode)
    ours = reads.picture(image)
    theirs = reads.images(image, do_rescale=False, do_normalize=False)["pixel_values"]
    stills = np.asarray(theirs).reshape(len(ours.patches), 3, 2, -1)
    np.testing.assert_array_equal(ours.patches.reshape(len(ours.patches), 3, -1), stills[:, :, 0])
    np.testing.assert_array_equal(stills[:, :, 0], stills[:, :, 1])


@pytest.mark.parametrize("size", [(1, 300), (2, 500)])
def test_pictures_that_are_lines_are_refused(size):
    with pytest.raises(ValueError, match="at most 200 times the shorter"):
        make(VLM_TEMPLATE).picture(Image.new("RGB", size))


def test_every_end_of_turn_is_known():
    reads = processor.load(toy.folder(), config.VARIANTS["tiny"].vision)
    names = reads.tokenizer.convert_ids_to_tokens(list(reads.stops))
    assert names == ["<|im_end|>", "<|endoftext|>"]


def test_what_a_folder_lacks_or_contradicts_is_named(tmp_path):
    vision = config.VARIANTS["tiny"].vision
    place = tmp_path / "vl"
    shutil.copytree(toy.folder(), place)
    file = place / "preprocessor_config.json"
    values = json.loads(file.read_text())
    for change, text in (
        ({"patch_size": 14}, "patch_size is 14, config.json says 16"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"rescale_factor": 1.0}, r"rescale_factor 1\.0"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=text):
            processor.load(place, vision)
    file.unlink()
    with pytest.raises(ValueError, match="says how images are resized"):
        processor.load(place, vision)
    template = (place / "chat_template.jinja").read_text()
    (place / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        processor.load(place, None)
    (place / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert processor.load(place, None).template == template
    (place / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        processor.load(place, None)
