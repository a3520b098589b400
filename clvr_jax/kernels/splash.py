"""JAX's splash attention on TPUs, a Pallas kernel: scores never leave the chip."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # head widths are filled up to a multiple
BLOCKS = (512, 256, 128)
TOKENS = 512  # fewer are left to XLA
INTERPRET = False  # tests run the kernel's text where there is no TPU


def supports(q) -> bool:
    """Whether this can run: a TPU, bfloat16 or float32."""
    here = INTERPRET or jax.default_backend() == "tpu"
    return here and q.dtype in (jnp.bfloat16, jnp.float32)


def pays(q, k) -> bool:
    """Whether this runs and there are tokens enough for its blocks."""
    return supports(q) and min(q.shape[1], k.shape[1]) >= TOKENS


def attention(q, k, v, *, causal=False, lengths=None, offset=None, segments=None, residual=False):
    """Return (output (b, l, h, k), None).

    Blocks that causality hides are skipped, those of other segments are not. Queries are scaled
    before the product, which in bfloat16 rounds them once more.

    Raises:
      ValueError: the operands cannot run on this device, an offset or a residual is asked for, or
        causal queries are not as many as keys.
    """
    if not supports(q):
        raise ValueError(
            "splash attention needs a TPU and bfloat16 or float32; "
            f"got {q.dtype} on {jax.default_backend()}"
        )
    if residual:
        raise ValueError("splash attention has no residual here; concatenate the keys instead")
    if offset is not None or (causal and q.shape[1] != k.shape[1]):
        raise ValueError("splash attention has no offset here; use blocked or reference")
    length, width = q.shape[1], q.shape[-1]
    rows, columns = block_of(length), block_of(k.shape[1])
    ids = _segments(q, k, -length % rows, -k.shape[1] % columns, causal, lengths, segments)
    scaled = q * jnp.asarray(width**-0.5, q.dtype)
    q, k, v = _filled(scaled, rows), _filled(k, columns), _filled(v, columns)
    shape = (q.shape[2], k.shape[2])
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    run = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        interpret=INTERPRET,
    )
    out = jax.vmap(run)(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)[:, :length, :, :width], None


def block_of(length: int) -> int:
    """Return the largest block that a sequence fills but for a sixteenth, or the smallest."""
    return next((block for block in BLOCKS if -length % block <= length // 16), BLOCKS[-1])


def _filled(x, block: int):
    """Return (b, l, h, k) as (b, h, l, k), tokens and width filled up with zeros."""
    fill = ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, -x.shape[-1] % LANES))
    return jnp.swapaxes(jnp.pad(x, fill), 1, 2)


def _segments(q, k, more_rows: int, more_columns: int, causal: bool, lengths, segments):
    """Return the ids of queries and keys, filled-up ones included; None where all see all."""
    if segments is not None:  # queries beyond the end go with the last one, keys with none
        rows = jnp.pad(segments[0], ((0, 0), (0, more_rows)), mode="edge")
        columns = jnp.pad(segments[1], ((0, 0), (0, more_columns)), constant_values=-1)
        return splash.SegmentIds(rows, columns)
    if lengths is None and (causal or not more_columns):
        return None  # what is filled up lies beyond the causal edge
    real = jnp.full(len(q), k.shape[1]) if lengths is None else lengths
    columns = jnp.arange(k.shape[1] + more_columns) < real[:, None]
    rows = jnp.ones((len(q), q.shape[1] + more_rows), jnp.int32)
    return splash.SegmentIds(rows, columns.astype(jnp.int32))
