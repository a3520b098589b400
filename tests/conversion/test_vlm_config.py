"""config.json of Qwen3-VL: both spellings, what is refused, and why."""

import dataclasses
import json

import pytest

from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3_vl.config import VARIANTS, from_json, to_json

TINY = VARIANTS["tiny"]


def transformers_5(cfg):
    """The same file as transformers 5 saves it."""
    values = to_json(cfg)
    text, vision = values["text_config"], values["vision_config"]
    rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    text |= {"rope_parameters": rope, "pad_token_id": None, "use_cache": True}
    vision["model_type"] = "qwen3_vl_vision"
    vision["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    return values | {"dtype": "bfloat16", "transformers_version": "5.23.0"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("write", [to_json, transformers_5])
def test_both_spellings_are_read(variant, write):
    cfg = VARIANTS[variant]
    assert from_json(json.loads(json.dumps(write(cfg)))) == cfg


def test_only_the_top_level_ties_the_head():
    values = to_json(TINY)
    values["text_config"]["tie_word_embeddings"] = True
    assert from_json(values) == TINY
    del values["tie_word_embeddings"]
    with pytest.raises(ValueError, match=r"config\.json has no field 'tie_word_embeddings'"):
        from_json(values)


def test_repeated_sizes_must_agree():
    values = to_json(TINY) | {"hidden_size": TINY.text.width, "vocab_size": TINY.text.vocab}
    assert from_json(values) == TINY
    with pytest.raises(ValueError, match="hidden_size is 33; this model supports 32"):
        from_json(values | {"hidden_size": 33})


def test_tokens_are_named_where_the_vocabulary_has_them():
    """transformers warns of numbers beyond it at every load."""
    tokens = {"bos_token_id", "eos_token_id"}
    assert not tokens & to_json(TINY)["text_config"].keys()
    assert tokens <= to_json(VARIANTS["qwen3_vl_8b"])["text_config"].keys()


@pytest.mark.parametrize("write", [to_json, transformers_5])
def test_no_size_has_a_default(write):
    """The defaults of transformers' classes match no released model."""
    kept = {"model_type", "architectures", "hidden_act", "attention_bias", "attention_dropout"}
    kept |= {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "dtype"}
    kept |= {"transformers_version"}
    for part in (None, "text_config", "vision_config"):
        for field in (write(TINY)[part] if part else write(TINY)).keys() - kept:
            values = write(TINY)
            del (values[part] if part else values)[field]
            if (part, field) == ("vision_config", "rope_parameters"):
                continue  # the tower's theta is a constant
            with pytest.raises(ValueError, match=r"no field|has no rope_theta"):
                from_json(values)


@pytest.mark.parametrize(
    "part, change, message",
    [
        (None, {"new_trick": 1}, r"config\.json has fields this model does not know: new_trick=1"),
        ("text_config", {"new_trick": 1}, r"text_config has fields .*: new_trick=1"),
        ("vision_config", {"new_trick": 1}, r"vision_config has fields .*: new_trick=1"),
        (None, {"quantization_config": {}}, "quantization_config"),
        (None, {"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
        (None, {"model_type": "qwen3_vl_moe"}, "'qwen3_vl_moe', a mixture of experts"),
        ("text_config", {"model_type": "qwen3_vl_moe_text"}, "'qwen3_vl_moe_text', a mixture"),
        ("text_config", {"num_experts": 128}, "num_experts=128"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("text_config", {"attention_bias": True}, "attention_bias is True"),
        ("text_config", {"rope_theta": None}, "no rope_theta"),
        ("text_config", {"rope_parameters": {"rope_theta": 1e6}}, "two values of rope_theta"),
        ("text_config", {"hidden_size": 64}, "tower gives width 32, the decoder has 64"),
        ("text_config", {"num_hidden_layers": 2}, "3 deepstack features need as many"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("vision_config", {"patch_size": [16, 16]}, "patch_size is .*supports one whole number"),
        ("vision_config", {"num_position_embeddings": 15}, "must be a square, given 15"),
        ("vision_config", {"deepstack_visual_indexes": [0, 4]}, r"\(0, 4\) must increase and stay"),
        ("vision_config", {"num_heads": 5}, "does not give 5 heads"),
        ("vision_config", {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 1000000.0"),
    ],
)
def test_what_the_model_cannot_honour_is_refused(part, change, message):
    values = to_json(TINY)
    if part:
        values[part] |= change
    else:
        values |= change
    with pytest.raises(ValueError, match=message):
        from_json(values)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mrope_interleaved": False}, "mrope_interleaved is not true"),
        ({"mrope_section": [4, 2, 3]}, r"\(4, 2, 3\) must be three numbers that add up to half"),
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn' is not supported"),
        ({"factor": 4.0}, "rope fields has fields .*factor=4.0"),
    ],
)
def test_other_rotations_are_refused(change, message):
    values = to_json(TINY)
    values["text_config"]["rope_scaling"] |= change
    with pytest.raises(ValueError, match=message):
        from_json(values)


def test_a_plain_decoder_has_no_sections():
    values = qwen3.to_json(qwen3.VARIANTS["tiny"])
    assert qwen3.from_json(values).mrope_section is None
    with pytest.raises(ValueError, match=r"config\.json: .*unknown here: \['mrope_section'\]"):
        qwen3.from_json(values | {"rope_scaling": {"mrope_section": [4, 2, 2]}})


def test_sizes_that_follow_from_others():
    vision = VARIANTS["qwen3_vl_8b"].vision
    assert (vision.head_width, vision.cell, vision.patch_width, vision.side) == (72, 4, 1536, 48)
    assert dataclasses.replace(TINY.vision, deepstack=()).deepstack == ()
