"""The benchmark's peer is fed the same: diffusers' pictures are ours within one grey level."""

import dataclasses

import pytest

from clvr_jax.generate.image import Settings
from launch.bench import image, peer

SMALL = Settings(height=64, width=80, steps=2, text_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        pytest.param({}, {"batch": 2}, marks=pytest.mark.slow),
        ({"guidance": 4.0}, {"references": 1}),
        pytest.param({"pattern": "kv"}, {"references": 2, "scan": False}, marks=pytest.mark.slow),
    ],
    ids=["plain", "guided", "kv"],
)
def test_peer_draws_our_picture(fields, changes):
    case = image.Case("toy", dataclasses.replace(SMALL, **fields), dtype="float32", **changes)
    report = image.run(case, 1, "none")
    section = report["peers"]["diffusers"]
    assert section["output"]["largest_level"] <= 1
    assert section["end to end"]["ratio"] > 0 and section["denoise"]["ratio"] > 0
    assert report["pixels"]["std"] > 10


def test_a_pattern_that_diffusers_lacks():
    model = image.build(image.Case("toy", SMALL, dtype="float32"))
    with pytest.raises(ValueError, match="'causal'; it has full and kv"):
        peer.build(model, "causal", guided=False)


def test_the_compile_budget_ends_a_call_that_swallows_exceptions():
    def stubborn():
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    with pytest.raises(peer.CompileTimeout, match=r"did not finish within 0 s"):
        peer.within_budget(stubborn, 0.2)
    seconds, result = peer.within_budget(lambda: 7, 5)
    assert result == 7 and seconds < 5
