"""Attention implementations against each other and against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax import parallel
from clvr_jax.kernels import attention, blocked
from clvr_jax.kernels.attention import attend, choose, join
from launch import hlo
from launch.bench import attention as cases

HERE = ("reference", "blocked")  # what runs on every device


@pytest.fixture
def many_blocks(monkeypatch):
    """Blocks of 16 queries, the smallest, at toy sizes."""
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked, "CPU_ROWS", 16)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def operands(b=2, queries=37, keys=53, heads=4, kv_heads=2, width=16, dtype=jnp.float32):
    return (
        draw(b, queries, heads, width, seed=1, dtype=dtype),
        draw(b, keys, kv_heads, width, seed=2, dtype=dtype),
        draw(b, keys, kv_heads, width, seed=3, dtype=dtype),
    )


def error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def definition(q, k, v, causal=False, lengths=None):
    """Row by row in numpy, without any of the tricks."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    per = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = k.shape[1] if lengths is None else int(lengths[b])
        seen = min(seen, i + 1) if causal else seen
        scores = k[b, :seen, h // per] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v[b, :seen, h // per] / weights.sum()
    return out


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (1, 29)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_its_definition(many_blocks, name, causal, lengths, kv_heads):
    q, k, v = operands(queries=37, keys=37 if causal else 29, kv_heads=kv_heads)
    given = None if lengths is None else jnp.array(lengths)
    out = attend(q, k, v, causal=causal, lengths=given, implementation=name)
    assert error(out, definition(q, k, v, causal, lengths)) < 5e-7


@pytest.mark.parametrize("name", HERE)
def test_padding_rows_see_real_tokens_only(name):
    """A padding query sees neither itself nor other padding: changing padding changes nothing."""
    q, k, v = operands(queries=32, keys=32)
    lengths = jnp.array([5, 20])
    out = attend(q, k, v, causal=True, lengths=lengths, implementation=name)
    padding = (jnp.arange(32) >= lengths[:, None])[..., None, None]
    k, v = jnp.where(padding, 1e3, k), jnp.where(padding, -1e3, v)
    again = attend(q, k, v, causal=True, lengths=lengths, implementation=name)
    np.testing.assert_array_equal(out, again)
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize("name", HERE)
def test_joined_keys_equal_one_array(many_blocks, name):
    q, k, v = operands(keys=60)
    cuts = [(0, 1), (1, 24), (24, 60)]
    keys, values = ([x[:, a:b] for a, b in cuts] for x in (k, v))
    joined = attend(q, keys, values, implementation=name)
    assert error(joined, definition(q, k, v)) < 5e-7


def test_join_is_exact_for_far_apart_parts():
    """The part whose scores are 300 lower vanishes, without overflow either way round."""
    q, k, v = operands(b=1, heads=1, kv_heads=1)
    whole = attend(q, k, v, implementation="reference")
    part = attention.IMPLEMENTATIONS["reference"](q, k, v, residual=True)
    far = (jnp.full_like(part[0], 7.0), part[1] - 300.0)
    np.testing.assert_allclose(join([part, far]), whole, atol=1e-6)
    np.testing.assert_allclose(join([far, part]), whole, atol=1e-6)


def test_joined_residuals_stay_float32_in_bfloat16():
    """A log-sum-exp rounded to bfloat16 would weigh the parts percents wrong."""
    q, k, v = operands(queries=64, keys=512, dtype=jnp.bfloat16)
    joined = attend(q, [k[:, :100], k[:, 100:]], [v[:, :100], v[:, 100:]])
    assert joined.dtype == jnp.bfloat16
    assert error(joined, definition(q, k, v)) < 4e-3


@pytest.mark.parametrize("lengths", [None, (3, 50)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_blocked_equals_reference(many_blocks, causal, lengths):
    q, k, v = operands(queries=53, keys=53)
    given = None if lengths is None else jnp.array(lengths)

    def gradient(name):
        loss = lambda q, k, v: jnp.sum(
            jnp.sin(attend(q, k, v, causal=causal, lengths=given, implementation=name))
        )
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for ours, theirs in zip(gradient("blocked"), gradient("reference")):
        assert error(ours, theirs) < 2e-6


@pytest.mark.parametrize(
    "name", [n if n == "blocked" else pytest.param(n, marks=pytest.mark.slow) for n in HERE]
)
def test_gradient_through_a_join(many_blocks, name):
    """The residual carries gradient: without it the parts' keys get a wrong one."""
    q, k, v = operands(keys=40)
    loss = lambda q, ks, vs: jnp.sum(jnp.sin(attend(q, ks, vs, implementation=name)))
    whole = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    halves = jax.grad(loss, argnums=(0, 1, 2))(q, [k[:, :15], k[:, 15:]], [v[:, :15], v[:, 15:]])
    for ours, theirs in zip(halves, whole):
        ours = jnp.concatenate(ours, axis=1) if isinstance(ours, list) else ours
        assert error(ours, theirs) < 2e-6


def test_bfloat16_gradient_does_not_decay_with_the_number_of_blocks(many_blocks):
    """Gradients of keys are sums over blocks: added up in bfloat16 they lose a digit."""
    case = cases.Case("many blocks", 1, 2048, (64,), 1, 1, 16)
    given = cases.inputs(case, "bfloat16", seed=0)
    exact = cases.reference(case, given, 0)
    gradients = cases.functions(case, "blocked")[1](*given)
    out = attend(*given[:3], implementation="blocked")
    found = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients)))
    for part, (relative, _) in cases.errors(case, found, exact, 0).items():
        assert relative < 5e-3, part


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("case", cases.CASES["toy"][:-1], ids=lambda case: case.shape)
def test_equals_the_float64_reference(name, case):
    """What `launch.validate_kernels` asks of every implementation, at toy sizes."""
    given = cases.inputs(case, "float32", seed=0)
    forward, backward = cases.functions(case, name)
    found = dict(zip(("out", "dq", "dk", "dv"), (forward(*given[:3]), *backward(*given))))
    for head in range(case.kv_heads):
        exact = cases.reference(case, given, head)
        for part, (relative, largest) in cases.errors(case, found, exact, head).items():
            assert max(relative, largest) < 2e-6, part


def test_the_float64_reference_is_the_definition():
    case = cases.Case("text", 2, 9, (9,), 4, 2, 8, causal=True, lengths=(4, 9))
    q, keys, values, cotangent = cases.inputs(case, "float32", seed=0)
    wanted = definition(q, keys[0], values[0], True, (4, 9))
    np.testing.assert_allclose(
        cases.reference(case, (q, keys, values, cotangent), 1)["out"], wanted[:, :, 2:], atol=1e-12
    )


def test_large_scores_are_computed_in_blocks():
    """The score matrix of a 1024 x 1024 picture is never materialised, even on a CPU."""
    chosen = {}
    for tokens in (64, 4608):
        shape = jax.ShapeDtypeStruct((1, tokens, 24, 128), jnp.float32)
        jax.eval_shape(lambda q, n=tokens: chosen.update({n: choose(q, q)}), shape)
    if jax.default_backend() == "cpu":
        assert chosen == {64: "reference", 4608: "blocked"}
    assert chosen[4608] == "blocked"
    assert blocked.block_rows(1, 4608, 24, 4608) == 64


def test_block_rows_are_powers_of_two_within_bounds():
    assert blocked.block_rows(1, 100, 1, 100) == 64
    assert blocked.block_rows(64, 5000, 32, 50000) == 16
    assert blocked.block_rows(1, 10**6, 1, 1) == 1024


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"'flash' is unknown; choose from reference, blocked"):
        attend(*operands(), implementation="flash")


def test_masks_are_refused_for_several_key_arrays():
    q, k, v = operands(queries=53)
    for mask in ({"causal": True}, {"lengths": jnp.array([3, 4])}):
        with pytest.raises(ValueError, match="several key arrays are joined without masks"):
            attend(q, [k, k], [v, v], **mask)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN runs here")
def test_cudnn_says_what_it_needs():
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*float32 width 16 on cpu"):
        attend(*operands(), implementation="cudnn")


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_heads_together_equal_heads_in_turn(monkeypatch, many_blocks, causal):
    """The path of accelerators (heads together) and that of CPUs give the same, and gradients."""
    q, k, v = operands(keys=37)
    lengths = jnp.array([20, 37])

    def run():
        jax.clear_caches()
        total = lambda *x: attend(
            *x, causal=causal, lengths=lengths, implementation="blocked"
        ).sum()
        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    in_turn = run()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for ours, theirs in zip(run(), in_turn):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_cudnn_is_given_joined_keys_as_one_array(monkeypatch):
    """Its backward pass would leave out the gradient of the residual."""
    seen = []

    def spy(q, k, v, **options):
        seen.append((k.shape, options["residual"]))
        return attention.reference.attention(q, k, v, **options)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "cudnn", spy)
    q, k, v = operands()
    out = attend(q, [k, k[:, :5]], [v, v[:, :5]], implementation="cudnn")
    assert seen == [((2, 58, 2, 16), False)]
    whole = attend(q, [k, k[:, :5]], [v, v[:, :5]], implementation="reference")
    np.testing.assert_allclose(out, whole, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_an_offset_moves_the_causal_edge(many_blocks, name, kv_heads):
    """Queries that continue rows of 0, 5 and 11 cached keys, each row's later keys unseen."""
    q, k, v = operands(b=3, queries=20, keys=40, kv_heads=kv_heads)
    offset = jnp.array([0, 5, 11])
    out = attend(q, k, v, causal=True, offset=offset, implementation=name)
    for row, start in enumerate([0, 5, 11]):
        padded = jnp.zeros((1, start + 20, *q.shape[2:])).at[:, start:].set(q[row : row + 1])
        keys, values = (x[row : row + 1, : start + 20] for x in (k, v))
        exact = definition(padded, keys, values, causal=True)[:, start:]
        assert error(out[row : row + 1], exact) < 1e-6


def test_an_offset_needs_the_causal_edge():
    q, k, v = operands()
    with pytest.raises(ValueError, match="needs causal=True"):
        attend(q, k, v, offset=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_mesh_attends_blocks_where_they_lie(many_blocks, sizes):
    """Forward and backward exchange nothing: rows and heads stay on their devices."""
    mesh = parallel.make_mesh(sizes, jax.devices()[:8])
    place = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor", None))
    shape = lambda heads: jax.ShapeDtypeStruct((8, 64, heads, 16), jnp.float32, sharding=place)
    total = lambda q, k, v: attend(q, k, v, causal=True, implementation="blocked").sum()
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, (0, 1, 2)), out_shardings=(place,) * 3)
        text = gradient.lower(shape(8), shape(4), shape(4)).compile().as_text()
    program = hlo.Program(text)
    for body in (*program.loops().values(), program.inside(program.entry)):
        assert not hlo.collectives(body)
