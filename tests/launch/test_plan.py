"""Plans of training runs: exact where they say so, verdicts, advice, the report."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

from clvr_jax import lora, parallel
from clvr_jax.models.flux2 import transformer, vae
from clvr_jax.models.flux2.config import STACKED, TRANSFORMER_VARIANTS, VAE_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import model as vl
from clvr_jax.models.qwen3_vl.config import VARIANTS as VLMS
from launch.plan import activations, advice, memory, report, targets
from launch.plan.image import Image
from launch.plan.job import Job, typed
from launch.plan.vlm import Text

ADAM = optax.adamw(1e-5)


@functools.cache
def abstract(name: str) -> dict:
    """Trees that several tests need; nobody changes them."""
    if name in TRANSFORMER_VARIANTS:
        return transformer.abstract_params(TRANSFORMER_VARIANTS[name])
    if name in VLMS:
        return vl.abstract_params(VLMS[name])
    if name == "vae":
        return vae.abstract_params(VAE_VARIANTS["klein"], jnp.bfloat16)
    text = dataclasses.replace(qwen3.VARIANTS[name], layers=27)
    return language.abstract_params(text, jnp.bfloat16, head=False)


def image_job(name: str, target: str, references: int = 0, each: int = 1, **fields) -> Job:
    found = targets.parse(target)
    cfg, small = TRANSFORMER_VARIANTS[name], VAE_VARIANTS["klein"]
    encoder = {"klein_4b": "qwen3_4b", "klein_9b": "qwen3_8b"}[name]
    text = dataclasses.replace(qwen3.VARIANTS[encoder], layers=27)
    params = abstract(name)
    encoders = {"text_encoder": abstract(encoder), "vae": abstract("vae")}
    mesh = targets.mesh_sizes(fields.pop("mesh", {"fsdp": -1}), found.devices)
    rows = each * mesh.get("data", 1) * mesh.get("fsdp", 1)
    layout = Layout(512, (64, 64), ((64, 64),) * references)
    work = Image(cfg, text, small, layout, rows, fields.pop("remat", "full"))
    state = jax.eval_shape(ADAM.init, params)
    return Job(name, found, mesh, work, params, optimizer=state, frozen=encoders, **fields)


def vlm_job(target: str, tokens: int = 8192, **fields) -> Job:
    found, cfg = targets.parse(target), VLMS["qwen3_vl_8b"]
    params = abstract("qwen3_vl_8b")
    mesh = targets.mesh_sizes({"fsdp": -1}, found.devices)
    work = Text(cfg, found.devices, tokens, images=4, patches=4096, remat="full")
    state = jax.eval_shape(ADAM.init, params)
    return Job("qwen3_vl_8b", found, mesh, work, params, optimizer=state, accumulation=8, **fields)


def test_targets():
    for name in targets.NAMES:
        one = targets.parse(name)
        assert one.devices >= 1 and one.hosts >= 1
    h20 = targets.parse("h20x8")
    assert (h20.devices, h20.hosts, h20.peak, h20.topology) == (8, 1, 148e12, None)
    assert targets.parse("h200x16").hosts == 2
    assert targets.parse("h200x8").peak == 989e12  # not the H20's, whose name it begins with
    v5e, v6e = targets.parse("v5e-64"), targets.parse("v6e-32")
    assert (v5e.topology, v5e.hosts, v5e.devices) == ("v5e:8x8", 16, 64)
    assert (v6e.topology, v6e.hosts, v6e.peak) == ("v6e:4x8", 8, 918e12)
    here = targets.parse("here")
    assert here.devices == len(jax.devices()) and here.memory and here.peak is None


@pytest.mark.parametrize("name", ["h20", "b200x8", "v5e-63", "v5ex8", "h200x0", ""])
def test_unknown_targets_are_refused(name):
    with pytest.raises(ValueError, match="no target"):
        targets.parse(name)


def test_mesh_sizes():
    assert targets.mesh_sizes({"data": 2, "fsdp": -1}, 8) == {"data": 2, "fsdp": 4}
    with pytest.raises(ValueError, match="does not make 8 devices"):
        targets.mesh_sizes({"fsdp": 3}, 8)
    with pytest.raises(ValueError, match="has 4 devices, the target v5e-8 8"):
        dataclasses.replace(image_job("klein_4b", "v5e-8"), mesh={"fsdp": 4})


@pytest.mark.parametrize("adapted", [False, True])
def test_the_exact_part_is_what_arrays_take_on_a_device(adapted):
    """Real arrays on eight devices; the VLM's vision MLP falls back where 5 does not divide 36."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    cfg = VLMS["tiny"]
    params = vl.abstract_params(cfg)
    adapters, trained, fixed = {}, params, {}
    if adapted:
        make = lambda key: lora.init(
            key, params, "language/layers/.*kernel$", 4, ("language/layers",)
        )
        adapters = jax.eval_shape(make, jax.random.key(0))
        trained, fixed = {}, typed(params, jnp.bfloat16)
    learnt = {name: part for name, part in (("model", trained), ("lora", adapters)) if part}
    target = targets.Target("test", "cpu", 8, 1, None)
    job = Job(
        "tiny",
        target,
        sizes,
        Text(cfg, 4, 64),
        trained,
        fixed,
        adapters,
        optimizer=jax.eval_shape(ADAM.init, learnt),
        ema=learnt,
        batch={"ids": jax.ShapeDtypeStruct((3, 4, 64), jnp.int32)},
        accumulation=3,
    )
    mesh = parallel.make_mesh(sizes, jax.devices()[:8])

    def on_a_device(tree) -> int:
        places = parallel.shardings(tree, mesh)
        make = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        arrays = jax.tree.leaves(jax.jit(make, out_shardings=places)())
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    own = adapters or trained
    wide, narrow = on_a_device(own), on_a_device(typed(own, jnp.bfloat16))
    expected = {
        "adapters" if adapted else "trained parameters": wide,
        "compute copy, bfloat16": narrow,
        "gradients, bfloat16": narrow,
        "gradients added up, float32": wide,
        "optimizer state": 2 * wide + 4,  # two moments and a counter
        "moving average": wide,
        "batch": 3 * 1 * 64 * 4,
    }
    if adapted:
        expected["frozen parameters of the model"] = on_a_device(fixed)
    found = memory.of(job)
    assert {line.label: line.size for line in found.exact} == expected
    assert all(line.how == "exact" for line in found.exact)


def test_activations_of_a_sample():
    """performance.md A5: block inputs of a 1024 x 1024 sample."""
    for name, references, gigabytes in (("klein_4b", 0, 0.71), ("klein_9b", 1, 2.28)):
        lines = memory.of(image_job(name, "h200x8", references)).estimated
        blocks = sum(line.size for line in lines if "blocks: kept" in line.label)
        assert blocks / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_tensor_and_context_divide_activations():
    widths = {"d": 64, "h": 64, "m": 192}
    one = activations.layers(
        "x", 2, 100, activations.KLEIN_SINGLE, "none", widths, activations.Ways(), 2
    )
    ways = activations.Ways(tensor=4)
    four = activations.layers("x", 2, 100, activations.KLEIN_SINGLE, "none", widths, ways, 2)
    assert one[0].size / 4 < four[0].size < one[0].size
    job = image_job("klein_4b", "v5e-8")
    spread = dataclasses.replace(
        job, mesh={"fsdp": 4, "context": 2}, work=dataclasses.replace(job.work, rows=4)
    )
    kept_by = lambda job: memory.of(job).estimated[0].size
    assert kept_by(spread) == kept_by(job) // 2
    exact = lambda job: memory.of(job).exact
    assert exact(spread) == exact(job)  # parameters lie on fsdp x context


@pytest.mark.parametrize(
    ("job", "fits"),
    [
        (lambda: image_job("klein_9b", "h200x8"), True),
        (lambda: image_job("klein_9b", "h20x8", references=3), True),
        (lambda: image_job("klein_4b", "h200x1"), True),
        (lambda: image_job("klein_9b", "h200x1"), False),
        (lambda: image_job("klein_4b", "v5e-64"), True),
        (lambda: image_job("klein_9b", "v5e-8"), False),
        (lambda: vlm_job("h20x8"), True),
        (lambda: vlm_job("h200x8"), True),
        (lambda: vlm_job("v5e-8"), False),
        (lambda: vlm_job("v5e-64"), True),
    ],
)
def test_verdicts(job, fits):
    job = job()
    found = memory.of(job)
    assert found.fits == fits
    told = advice.advise(job)
    assert bool(told) != fits
    totals = [found.total, *(one.total for one in told)]
    assert totals == sorted(totals, reverse=True)
    assert all(one.gain > 0 for one in told)
    if told:
        assert told[-1].fits and not any(one.fits for one in told[:-1])
        assert told[-1].total <= job.target.memory


def test_advice_is_cheapest_first():
    job = image_job("klein_9b", "v5e-8", each=8, remat="none", mesh={"data": 2, "fsdp": 4})
    changes = [one.change.split(":")[0].split("=")[0] for one in advice.advise(job)]
    assert changes[:4] == ["remat", "batch.rows and accumulation", "mesh.fsdp", "data.features"]
    bits = image_job("klein_9b", "h200x1")
    assert advice.advise(bits)[-1].change == "optim.moments=bfloat16"  # as performance.md says


def test_advice_says_how_many_devices_when_nothing_helps():
    job = vlm_job("v5e-1")
    last = advice.advise(job)[-1]
    assert "devices with mesh.fsdp" in last.change and last.fits
    longer = vlm_job("v5e-1", tokens=65536)
    assert not any(one.fits for one in advice.advise(longer))
    assert "shorter rows" in report.advice_lines(longer)[-1]
    assert (
        advice.advise(dataclasses.replace(job, target=dataclasses.replace(job.target, memory=None)))
        == []
    )


def test_freezing_the_tower_takes_its_state_away():
    job = vlm_job("v5e-8", ema=abstract("qwen3_vl_8b"))
    frozen = advice._vision(job)
    assert set(frozen.trained) == {"language"} and set(frozen.fixed) == {"visual"}
    size = lambda job: {line.label: line.size for line in memory.of(job).exact}
    before, after = size(job), size(frozen)
    assert after["optimizer state"] == pytest.approx(2 * after["trained parameters"], rel=1e-6)
    assert after["moving average"] == after["trained parameters"]
    assert before["trained parameters"] > after["trained parameters"]
    assert "vision blocks: kept, remat full" not in {x.label for x in memory.of(frozen).estimated}


def test_advice_starts_from_the_compiled_step():
    job = image_job("klein_4b", "v5e-8")
    assert memory.of(job).fits and advice.advise(job) == []
    told = advice.advise(job, compiled=2 * job.target.memory)
    assert told[0].total + told[0].gain == 2 * job.target.memory


def test_seconds_follow_from_flops_and_peak():
    job = image_job("klein_4b", "h20x8", each=8)
    done = report.step(job)
    assert done.parts["transformer"].model / 64e12 == pytest.approx(104, rel=0.01)
    assert done.seconds == pytest.approx(8.7 * 108.5 / 104, rel=0.03)  # performance.md, + encoders
    twice = report.step(dataclasses.replace(job, accumulation=2))
    assert twice.total.model == 2 * done.total.model


@pytest.mark.parametrize("compiled", [None, 2**34])
def test_the_report(compiled):
    out = io.StringIO()
    job = vlm_job("v5e-8")
    report.show(job, compiled, Console(file=out, width=200, highlight=False))
    text = out.getvalue()
    for part in (
        "8 x TPU v5e, hosts: 1, mesh fsdp=8",
        "8,767,123,696 trained",
        "language/layers/mlp/up_proj/kernel",
        "36 x 512 x 12288",
        "model TFLOP a step",
        "computed, not measured",
        "does not fit",
    ):
        assert part in text
    assert ("formula: 36 x" in text) == (compiled is None)
    assert ("compiled for the target" in text) == (compiled is not None)


def test_a_fallback_is_shown():
    job = image_job("klein_4b", "v5e-8", mesh={"tensor": 8})  # 24 heads and 9216 are divided
    notes = [leaf.notes for leaf in memory.leaves(job.trained, memory.abstract_mesh({"tensor": 7}))]
    assert any("7" in note for note in sum(notes, ()))
    with pytest.raises(ValueError, match="unknown mesh axes"):
        memory.abstract_mesh({"model": 2})


def test_adapters_cost_little():
    job = image_job("klein_9b", "h200x8")
    adapted = advice._adapters(job)
    assert not adapted.trained and lora.ranks(adapted.adapters)["single_blocks/qkv"] == advice.RANK
    assert memory.of(adapted).total < 0.5 * memory.of(job).total
    share = report.step(adapted).total.model / report.step(job).total.model
    assert 0.66 < share < 0.75  # two thirds of the products, all of attention, the adapters
    assert adapted.work.stacked == STACKED
