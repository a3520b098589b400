"""Both models on the devices of a machine: what they take, what fits, and what to change."""

import pytest

from clvr_jax.backends.local.reader import cache_places
from clvr_jax.models.qwen3.cache import token_bytes
from clvr_jax.tree import count
from configs import generate as generate_config
from configs import vlm as vlm_config
from conversion.components import KINDS
from launch import build_vlm
from launch.drawing import models, placement
from launch.plan import targets
from launch.plan.targets import GIB


def placed(target, weights="klein_4b", vlm="qwen3_vl_8b", **changes):
    """The placement under configs with changes: `config_batch=1`, `vlm_context=6144`."""
    config, speaks = generate_config.get_config(), vlm_config.get_config()
    for name, value in changes.items():
        which, _, key = name.partition("_")
        given = config if which == "config" else speaks
        given.update_from_flattened_dict({key.replace("__", "."): value})
    found = placement.sized(weights)
    settings = models.settings_of(found, config)
    model = placement.sized_vlm(vlm) if vlm else None
    return placement.place(found, model, settings, 3, config, speaks, targets.parse(target))


def line(found, share, label):
    return next(each for each in found.shares[share].lines if each.label == label).size


def test_parameters_and_caches_are_exact():
    found = placed("h200x1")
    whole = KINDS["vlm"].variants["qwen3_vl_8b"]
    assert line(found, 1, "parameters") == 2 * count(placement.sized_vlm("qwen3_vl_8b").abstract())
    places = 7 * 16384 + 24576  # one may be read while it is full
    expected = places * token_bytes(whole.text, 2)
    assert found.cache == expected == line(found, 1, "keys and values")
    assert found.fits and found.limit == pytest.approx(0.95 * 0.9 * 140.4 * GIB, rel=1e-6)
    assert found.taken(0) == found.shares[0].size + found.shares[1].size
    # drawing and decoding do not happen at the same time
    lines = {each.label: each.size for each in found.shares[0].lines}
    assert found.shares[0].size == sum(lines.values()) - min(lines["drawing"], lines["VAE at work"])


def test_the_cache_takes_what_is_left_and_no_less_than_a_conversation():
    found = placed("a100x1", "klein_9b")
    assert found.fits and found.cache < placed("h200x1", "klein_9b").cache
    assert "what is left" in found.table()
    tight = placed("rtx4090x1")
    assert not tight.fits
    with pytest.raises(ValueError, match=r"do not fit(.|\n)*--config.loop.concurrency"):
        tight.require()
    given = placed("h200x1", vlm_cache_gib=4.0)
    assert given.cache == 4 * GIB
    with pytest.raises(ValueError, match=r"cache_gib=2\.0 does not hold a conversation of 16384"):
        placed("h200x1", vlm_cache_gib=2.0)


def test_what_fits_can_be_loaded():
    """The engine refuses a cache that does not hold one conversation while it is read."""
    tiny = dict(config_batch=1, vlm_context=6144, config_loop__concurrency=1)
    found = placed("rtx4090x1", vlm="qwen3_vl_2b", **tiny)
    found.require()
    language = placement.sized_vlm("qwen3_vl_2b").config.text
    assert found.cache == cache_places(6144) * token_bytes(language, 2)


def test_models_on_their_own_devices_and_behind_a_server():
    tiny = dict(config_batch=1, vlm_context=6144, config_loop__concurrency=1)
    apart = placed("rtx4090x2", config_devices=(0,), vlm_devices=(1,), **tiny)
    apart.require()
    assert apart.taken(0) == apart.shares[0].size and apart.taken(1) == apart.shares[1].size
    remote = placed("rtx4090x1", vlm=None, config_batch=1)
    assert remote.fits and len(remote.shares) == 1 and remote.cache == 0
    with pytest.raises(ValueError, match=r"devices are \[2\], rtx4090x2 has 2"):
        placed("rtx4090x2", config_devices=(2,))


def test_a_mesh_shares_parameters_and_cache():
    one, eight = placed("h200x1", "klein_9b"), placed("h200x8", "klein_9b")
    for share, label in ((0, "transformer"), (1, "parameters"), (1, "keys and values")):
        ratio = line(one, share, label) / line(eight, share, label)
        assert 7.5 < ratio <= 8, (label, ratio)
    assert eight.table().splitlines()[-1].startswith("devices 0, 1, 2, 3, 4, 5, 6, 7: ")


@pytest.mark.parametrize(
    "target, weights, vlm, changes",
    [
        ("rtx4090x1", "klein_4b", "qwen3_vl_2b", dict(config_batch=1, vlm_context=6144)),
        ("a100x1", "klein_9b", "qwen3_vl_8b", {}),
        ("h20x1", "klein_9b", "qwen3_vl_8b", {}),
        ("v5e-8", "klein_4b", "qwen3_vl_8b", dict(config_batch=1)),
        ("v6e-8", "klein_9b", "qwen3_vl_8b", {}),
    ],
)
def test_the_recipes_of_the_readme_fit(target, weights, vlm, changes):
    placed(target, weights, vlm, **changes).require()


def test_a_conversation_is_no_longer_than_the_model_can_take():
    config = vlm_config.get_config()
    small = build_vlm.find("miniature-vlm").config
    assert build_vlm.context_of(small, config) == small.text.max_positions == 4096
    assert build_vlm.context_of(KINDS["vlm"].variants["qwen3_vl_8b"], config) == 16384
    config.context = 8192
    with pytest.raises(ValueError, match="8192 tokens, the checkpoint's positions end at 4096"):
        build_vlm.context_of(small, config)


def test_only_released_sizes_have_names():
    assert placement.sized("toy") is None and placement.sized("outputs/klein") is None
    assert placement.sized_vlm("miniature-vlm") is None
