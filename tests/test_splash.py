"""JAX's splash attention, a TPU's Pallas kernel, run as it is written on whatever is here."""

import jax
import jax.numpy as jnp
import pytest

from clvr_jax import parallel
from clvr_jax.kernels import splash
from clvr_jax.kernels.attention import attend, choose
from tests.test_attention import error, operands

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="a TPU's kernel")


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention's kernel, run on a CPU as it is written."""
    monkeypatch.setattr(splash, "INTERPRET", True)


def differentiated(q, k, v, **options):
    """Output and gradients of a sum over attention."""

    def total(q, k, v):
        out = attend(q, k, v, **options)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize(
    ("queries", "keys", "masks"),
    [
        (130, 140, {}),
        (130, 260, {"lengths": jnp.array([3, 200])}),
        (150, 150, {"causal": True, "lengths": jnp.array([3, 140])}),
        (140, 140, {"causal": True, "segments": jnp.arange(140) // jnp.array([[50], [139]])}),
    ],
    ids=["full", "lengths", "causal", "segments"],
)
def test_splash_equals_reference(interpreted, queries, keys, masks):
    """Output and gradients: grouped heads, widths and tokens that are no multiple of 128."""
    given = operands(queries=queries, keys=keys)
    found = differentiated(*given, **masks, implementation="splash")
    wanted = differentiated(*given, **masks, implementation="reference")
    for ours, theirs in zip(found, wanted):
        assert error(ours, theirs) < 1e-6


def test_splash_on_a_mesh(interpreted):
    """Rows, heads and queries apart; several keys become one array, causality another's work."""
    q, k, v = operands(queries=128, keys=128)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2, "context": 2}, jax.devices()[:8])
    keys, values = ([x[:, :30], x[:, 30:]] for x in (k, v))
    with jax.set_mesh(mesh):
        joined = jax.jit(lambda *x: attend(*x, implementation="splash"))(q, keys, values)
        moved = jax.jit(lambda *x: attend(*x, causal=True, implementation="splash"))(q, k, v)
    assert error(joined, attend(q, k, v, implementation="reference")) < 1e-6
    assert error(moved, attend(q, k, v, causal=True, implementation="reference")) < 1e-6


def test_what_a_tpu_chooses(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chosen = []
    for keys, offset in ((512, False), (511, False), (512, True)):
        q, k = (jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16) for length in (512, keys))
        jax.eval_shape(lambda q, k, offset=offset: chosen.append(choose(q, k, offset)), q, k)
    assert chosen == ["splash", "blocked", "blocked"]
    blocks = {4608: 512, 1088: 128, 768: 256, 300: 128, 5: 128}
    assert {length: splash.block_of(length) for length in blocks} == blocks


def test_splash_says_what_it_needs():
    with pytest.raises(ValueError, match=r"splash attention needs a TPU.*float32 on"):
        attend(*operands(), implementation="splash")
