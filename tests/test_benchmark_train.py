"""The training benchmark: its cases, its report at toy size, and the peer's loss beside ours."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from clvr_jax.models.flux2.layout import Layout
from launch import benchmark
from launch.bench import flops, train, train_jobs
from launch.bench.text import MODELS as VLMS
from launch.bench.timing import Timing
from launch.bench.train_jobs import Case
from launch.plan import targets

IMAGE = Case("image", "toy", size=(32, 48), text_tokens=16, references=1, precision="float32")
VLM = Case("vlm", "toy", tokens=48, pictures=2, picture=32, precision="float32")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="the peer is torch")


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine of one device, where there is no mesh and the peer can be beside us."""
    here = dataclasses.replace(targets.here(), devices=1)
    monkeypatch.setattr(targets, "here", lambda: here)
    monkeypatch.setattr(train_jobs.build, "make_mesh", lambda sizes: None)


def test_flops_are_those_of_the_formulas():
    """With adapters the gradients of the kernels are left out, a third of all products."""
    work = train_jobs.make(dataclasses.replace(IMAGE, accumulation=2, rows=3), 1, "h200x1")
    nets, layout = work.networks, Layout(16, (2, 3), ((2, 3),))
    sizes = nets.transformer.cfg, nets.text_encoder.cfg, nets.vae.cfg
    assert work.flops.model == 6 * flops.train_image(*sizes, layout)
    assert work.units == {"images": 6.0}
    alone = dataclasses.replace(IMAGE, features="precomputed")
    of = lambda rank: train_jobs.make(dataclasses.replace(alone, lora=rank), 1, "h200x1").flops
    assert 0.65 < of(1).model / of(0).model < 0.75


def test_features_take_the_encoders_off(one_device):
    fly = train_jobs.make(IMAGE, 1)
    assert fly.job.others().keys() == {"text_encoder", "vae"}
    assert fly.arrays["pixels"].shape == (1, 1, 32, 48, 3)
    made = train_jobs.make(dataclasses.replace(IMAGE, features="precomputed"), 1)
    assert made.job.others() == {}
    assert made.arrays["text"].shape == (1, 1, 16, fly.cfg.text_width)
    (reference,) = made.arrays["reference_latents"]
    assert reference.shape == made.arrays["latents"].shape == (1, 1, 2, 3, fly.cfg.channels)


def test_a_conversation_fills_its_row(one_device):
    work = train_jobs.make(VLM, 1)
    cfg, rows = VLMS["toy"], work.arrays
    assert (rows["segments"] == 1).all() and work.units == {"tokens": 48.0}
    assert (rows["ids"] == cfg.image_token).sum() == (rows["places"] >= 0).sum() == 2
    # every word behind the pictures is learnt, the first of them from the last token before
    assert rows["weights"].sum() == 48 - 2 * 3
    assert len(np.unique(rows["pixels"])) > 200


def test_cases_that_do_not_fit_are_told(one_device):
    for case, text in (
        (dataclasses.replace(IMAGE, size=(32, 50)), "must be positive multiples of 16"),
        (dataclasses.replace(VLM, tokens=6), "leave no room for words in 6 tokens"),
        (dataclasses.replace(VLM, picture=40), "must be a multiple of 32"),
    ):
        with pytest.raises(ValueError, match=text):
            train_jobs.make(case, 1)


def test_rates_are_those_of_the_median():
    timing = Timing(9.0, [2.0, 1.0, 4.0])
    cost = flops.Training(model=6 * 10**12, again=10**12)
    told = train.describe(timing, cost, {"images": 4.0}, {"limit_tflops": 10.0})
    assert (told["median_s"], told["min_s"], told["images_per_s"]) == (2.0, 1.0, 2.0)
    assert (told["model_tflops"], told["mfu"]) == (3.0, 0.3)


def test_other_work_is_no_peer():
    ours = {"loss": 2.0, "grad_norm": 1.0}
    train.require_same(VLM, ours, {"loss": 2.0001, "grad_norm": 1.0005})
    with pytest.raises(RuntimeError, match=r"loss .* is 2 here and 2\.01 of the peer"):
        train.require_same(VLM, ours, {"loss": 2.01, "grad_norm": 1.0})
    other = {"loss": 2.0, "grad_norm": 1.1}
    with pytest.raises(RuntimeError, match="grad_norm"):
        train.require_same(VLM, ours, other)
    train.require_same(dataclasses.replace(VLM, lora=2), ours, other)


@pytest.mark.slow
def test_training_on_pictures_is_reported(tmp_path, capsys, one_device):
    out = tmp_path / "train.json"
    flags = ["--size=32x48", "--text_tokens=16", "--references=1", "--precision=float32"]
    flags += ["--accumulation=2", "--remat=none", "--lora=2", "--repeat=1", "--loop_steps=2"]
    assert benchmark.main(["train_image", "--model=toy", *flags, f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    assert report["case"]["features"] == "fly" and report["case"]["size"] == [32, 48]
    assert report["trained"] < report["parameters"]
    step, outside = report["step"], report["outside"]
    assert step["median_s"] >= step["min_s"] > 0 and step["compile_s"] > 0
    assert step["images_per_s"] > 0 and step["mfu"] > 0
    assert "measured here" in report["limits"]["limit_is"] or jax.default_backend() != "cpu"
    assert outside["steps"] == 2 and outside["host_s"] > 0 and len(outside["rounds"]) == 3
    assert report["memory"]["xla_peak_gb"] > 0 and "peers" not in report
    assert report["environment"]["command"].startswith("python -m launch.benchmark")
    shown = capsys.readouterr().out
    assert "LoRA of rank 2" in shown and "outside the step" in shown


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("lora", [0, 2])
def test_the_peer_has_our_loss(one_device, lora):
    """`run` refuses a peer whose first loss, or gradient norm, is another one."""
    pictures = dataclasses.replace(IMAGE, features="precomputed", lora=lora, accumulation=2)
    for case in (pictures, dataclasses.replace(VLM, lora=lora, rows=2)):
        report = train.run(case, 1, 0, peer=True, apart=bool(lora))
        who = "diffusers" if case.subject == "image" else "transformers"
        ours, theirs = (report["first_step"][name]["loss"] for name in ("ours", who))
        assert theirs == pytest.approx(ours, rel=1e-5)
        peer = report["peers"][who]
        assert peer["ratio"] > 0 and peer["calls"] == 1 and report["outside"] == {}
        assert lora or peer["trained"] == report["trained"]


@needs_torch
def test_the_peer_runs_on_one_device():
    with pytest.raises(ValueError, match="on one device"):
        train.run(IMAGE, 1, 0, peer=True)


@needs_torch
def test_the_peer_has_no_encoders(one_device):
    with pytest.raises(ValueError, match="--features=precomputed"):
        train.run(IMAGE, 1, 0, peer=True)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        pytest.param(
            ["train_image", "--model=klein_4b", "--size=512x512", "--lora=64"],
            "klein_4b LoRA",
            marks=pytest.mark.slow,
        ),
        (["train_vlm", "--model=qwen3_vl_2b", "--tokens=2048"], "qwen3_vl_2b full, 2048 tokens"),
    ],
)
def test_full_sizes_are_traced_without_weights(flags, told, capsys):
    assert benchmark.main([*flags, "--dry_run=h200x1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(told) and "135.7 GB of room" in shown


def test_wrong_options_start_nothing(capsys):
    for flags, told in (
        (["train_vlm", "--mesh=fsdp"], "is not AXIS=SIZE"),
        (["train_image", "--peer=transformers"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(flags)
        assert told in capsys.readouterr().err
