"""The benchmark's counts, weights and reports; its commands at toy size."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.generate.image import Settings
from clvr_jax.kernels import attention
from clvr_jax.models.flux2.config import STACKED, TRANSFORMER_VARIANTS, VAE_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3.cache import token_bytes
from clvr_jax.models.qwen3.config import VARIANTS
from clvr_jax.models.qwen3_vl.config import VARIANTS as VLMS
from clvr_jax.tree import flatten
from launch import benchmark, validate_kernels
from launch.bench import attention as kernel_cases
from launch.bench import flops, image, machine, rivals, text, timing
from launch.bench.weights import layer_reader, random_params

SMALL = Settings(height=32, width=48, steps=2, text_tokens=16)


@pytest.mark.parametrize(
    ("variant", "side", "references", "tflop"),
    [
        # torch's FLOP counter on diffusers' transformer without references; by hand with
        ("klein_4b", 32, 0, 10.17),
        ("klein_4b", 64, 0, 34.82),
        ("klein_9b", 32, 0, 22.73),
        ("klein_9b", 64, 0, 75.51),
        ("klein_4b", 64, 1, 76.7),
        ("klein_9b", 64, 3, 385.6),
    ],
)
def test_flops_of_the_transformer(variant, side, references, tflop):
    layout = Layout(512, (side, side), ((side, side),) * references)
    found = flops.transformer(TRANSFORMER_VARIANTS[variant], layout) / 1e12
    assert found == pytest.approx(tflop, rel=1e-3)


def test_flops_with_cached_references():
    """Four steps: the references once, then the noise against their keys and values."""
    cfg = TRANSFORMER_VARIANTS["klein_9b"]
    layout = Layout(512, (64, 64), ((64, 64),), pattern="kv")
    steps = 4 * flops.transformer(cfg, layout.with_cache())
    assert steps / 4e12 == pytest.approx(85.4, rel=2e-3)
    whole = 4 * flops.transformer(cfg, dataclasses.replace(layout, pattern="full"))
    assert whole / (steps + flops.references(cfg, layout)) == pytest.approx(1.58, rel=2e-3)


def test_flops_of_the_other_networks():
    vae, small = VAE_VARIANTS["klein"], VAE_VARIANTS["small_decoder"]
    assert flops.vae_decode(vae, 1024, 1024) / 1e12 == pytest.approx(10.5, abs=0.05)
    assert flops.vae_decode(vae, 512, 512) / 1e12 == pytest.approx(2.52, abs=0.01)
    assert flops.vae_encode(vae, 1024, 1024) / 1e12 == pytest.approx(4.89, abs=0.01)
    assert flops.vae_decode(small, 1024, 1024) / 1e12 == pytest.approx(6.0, abs=0.01)
    for variant, tflop in (("qwen3_4b", 2.85), ("qwen3_8b", 5.39)):
        cfg = dataclasses.replace(VARIANTS[variant], layers=27)
        assert flops.text_encoder(cfg, 512) / 1e12 == pytest.approx(tflop, abs=0.005)


def test_flops_and_bytes_of_the_vision_language_model():
    cfg = VLMS["qwen3_vl_8b"]
    assert flops.vision(cfg.vision, 4096) / 1e12 == pytest.approx(5.80, rel=0.02)
    assert flops.text_encoder(cfg.text, 1100) / 1e12 == pytest.approx(15.6, rel=0.02)
    assert text.decode_bytes(cfg.text, 2) / 1e9 == pytest.approx(15.136, rel=1e-3)
    assert token_bytes(cfg.text, 2) == 147_456


@pytest.mark.slow
@pytest.mark.parametrize("free", [["--free"], []])
def test_the_loop_benchmark_writes_its_report(tmp_path, free):
    out = tmp_path / "loop.json"
    flags = ["--model=toy", "--vlm=toy", "--dtype=float32", "--size=64x64", "--text_tokens=64"]
    flags += ["--generations", "1", "2", "--tokens=20", "--verdict=5", "--repeat=1", *free]
    assert benchmark.main(["loop", *flags, "--references=all", f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    one, two = (report["trajectories"][n] for n in "12")
    assert [turn["new_tokens"] for turn in two["turns"]] == [20, 20, 5]
    assert all((turn["constrain_ms"] > 0) is not bool(free) for turn in two["turns"])
    assert [turn["draw_ms"] > 0 for turn in one["turns"]] == [True, False]
    assert 0 < one["floor_s"] < two["floor_s"] < two["seconds"]
    # a turn reads what is new: the picture, and what closes the turn before
    assert two["turns"][1]["prompt_tokens"] < one["turns"][0]["prompt_tokens"]
    assert {"denoise, 0 references", "denoise, 1 references"} < report["parts"].keys()


@pytest.mark.slow
def test_the_text_benchmark_writes_its_report(tmp_path):
    out = tmp_path / "text.json"
    flags = ["--model=toy", "--dtype=float32", "--prompt=40", "--turn=20", "--picture=64"]
    peer = ["--peer=transformers"] if importlib.util.find_spec("torch") else []
    status = benchmark.main(
        ["text", *flags, *peer, "--batch", "1", "3", "--repeat=2", f"--out={out}"]
    )
    assert status == 0
    report = json.loads(out.read_text())
    assert report["environment"]["command"].startswith("python -m launch.benchmark")
    for name in ("look", "prefill", "decode 16 tokens, batch 1", "decode 16 tokens, batch 3"):
        sides = report["parts"][name]
        assert sides["ours"]["tokens_per_s"] > 0 and 0 < sides["ours"]["share_of_limit"] < 1.5
        if peer:
            assert sides["transformers"]["ratio"] > 0
            assert sides.get("same_tokens", 1.0) == 1.0
    assert report["second_turn"]["anew_ms"] > 0


def test_random_weights_keep_activations_of_order_one():
    shapes = {
        "blocks": {"lin": {"kernel": jax.ShapeDtypeStruct((3, 64, 2, 80), jnp.float32)}},
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.bfloat16)},
        "norm": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
        "bn": {"mean": jax.ShapeDtypeStruct((8,), jnp.float32)},
    }
    flat = flatten(random_params(shapes, 0, ("blocks",)))
    assert flat["blocks/lin/kernel"].std() == pytest.approx(64**-0.5, rel=0.03)
    assert flat["conv/kernel"].astype(jnp.float32).std() == pytest.approx(144**-0.5, rel=0.05)
    assert flat["conv/kernel"].dtype == jnp.bfloat16
    assert bool((flat["norm/scale"] == 1).all()) and bool((flat["bn/mean"] == 0).all())
    first, second, _ = flat["blocks/lin/kernel"]
    assert float(jnp.abs(first - second).mean()) > 0.05  # layers differ


def test_random_weights_refuse_unknown_names():
    with pytest.raises(ValueError, match="no random value is defined for gate/alpha"):
        random_params({"gate": {"alpha": jax.ShapeDtypeStruct((2,), jnp.float32)}}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_both_layouts_of_layers_are_read(scan):
    model = image.build(image.Case("toy", SMALL, dtype="float32", scan=scan))
    shapes, read = layer_reader(model.params["transformer"], STACKED)
    path = "double_blocks/img/qkv/kernel"
    assert flatten(shapes)[path].shape == (2, 64, 3, 4, 16)
    assert read(path, 1).shape == (64, 3, 4, 16)
    assert read("img_in/kernel", None).shape == (16, 64)


def test_calls_are_timed_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or jnp.zeros(1) for name in "ab"}
    timings, results = timing.measure(calls, repeat=3)
    assert order == [*"aabb", *"ababab"]
    assert all(len(one.calls) == 3 for one in timings.values()) and results.keys() == {"a", "b"}
    one = timing.Timing(first=5.0, calls=[3.0, 1.0, 2.0])
    assert (one.median, one.compile, one.report()["min_ms"]) == (2.0, 3.0, 1000.0)


def test_ratios_put_our_reference_parts_beside_their_denoising():
    """diffusers encodes the references inside the call that we compare with our denoising."""
    made = rivals.Rivals(None, None, None, 0)
    assert made.report({}, {}, {}) == {} and made.part("denoise") == {}
    made.peers = {"diffusers": None}
    made.record("denoise", {"diffusers": timing.Timing(0.1, [0.06])})
    made.record("end to end", {"diffusers": timing.Timing(0.1, [0.2])})
    parts = {"reference encode": {"median_ms": 10.0}, "denoise": {"median_ms": 20.0}}
    pictures = {"ours": np.zeros((1, 2, 2, 3), np.uint8), "diffusers": np.ones((1, 2, 2, 3))}
    section = rivals.Rivals.report(made, parts, {"median_ms": 100.0}, pictures)["peers"]
    assert section["diffusers"]["denoise"]["ratio"] == 2.0
    assert section["diffusers"]["end to end"]["ratio"] == 2.0
    assert section["diffusers"]["output"]["largest_level"] == 1.0


def test_the_limit_is_measured_where_no_vendor_number_is_known():
    limit = machine.limits("float32")
    assert limit["peak_tflops"] is None and limit["limit_tflops"] > 0
    assert "measured" in limit["limit_is"]


@pytest.mark.parametrize(
    "extra",
    [
        [],
        pytest.param(
            ["--references=1", "--pattern=kv", "--layers=unrolled"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_image_benchmark_writes_its_report(tmp_path, extra, capsys):
    out = tmp_path / "results" / "toy.json"
    options = ["--model=toy", "--size=64x80", "--steps=2", "--text_tokens=16", "--repeat=1"]
    options += ["--dtype=float32", "--guidance=4", "--check_hlo", f"--out={out}", *extra]
    assert benchmark.main(["image", *options]) == 0
    report = json.loads(out.read_text())
    parts = ["text encode", "denoise", "vae decode"]
    if extra:
        parts[1:1] = ["reference encode", "reference cache"]
    assert list(report["components"]) == parts
    assert report["components"]["denoise"]["step_ms"] > 0
    # the limit is itself measured, on a machine that does other things
    assert report["end_to_end"]["share_of_limit"] > 0
    assert report["end_to_end"]["flop"] == sum(p["flop"] for p in report["components"].values())
    assert report["pixels"]["std"] > 10
    assert report["environment"]["versions"]["jax"] == jax.__version__
    assert "peers" not in report
    assert "end to end" in capsys.readouterr().out


def test_a_wrong_size_is_told_before_weights_are_made(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["image", "--model=toy", "--size=large"])
    assert "is not HEIGHTxWIDTH" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["image", "--model=toy", "--size=100x96"])
    assert "must be positive multiples of 16" in capsys.readouterr().err


@pytest.mark.slow
def test_validation_passes_and_fails(tmp_path, monkeypatch):
    case = kernel_cases.Case("small", 2, 12, (12,), 4, 2, 8, causal=True, lengths=(3, 12))
    monkeypatch.setitem(kernel_cases.CASES, "toy", (case,))
    out = tmp_path / "report.json"
    options = ["--shapes=toy", "--repeat=1", f"--out={out}"]
    assert validate_kernels.main(options) == 0
    rows = json.loads(out.read_text())["cases"]
    status = {(row["implementation"], row["dtype"]): row["status"] for row in rows}
    assert status["reference", "float32"] == status["blocked", "bfloat16"] == "pass"
    if jax.default_backend() == "cpu":
        assert status["cudnn", "bfloat16"] == "not supported"

    def unscaled(q, k, v, **options):
        return attention.reference.attention(2 * q, k, v, **options)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "reference", unscaled)
    assert validate_kernels.main(options) == 1
    rows = json.loads(out.read_text())["cases"]
    assert {row["status"] for row in rows if row["implementation"] == "reference"} == {"fail"}


@pytest.mark.parametrize("command", ["benchmark", "validate_kernels"])
def test_help_starts_nothing(command):
    code = (
        f"import sys, launch.{command} as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
