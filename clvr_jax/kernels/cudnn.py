"""cuDNN's fused attention on NVIDIA GPUs: half precision, head widths up to 128."""

import jax
import jax.numpy as jnp


def supports(q) -> bool:
    """Whether this can run: GPU, bf16 or f16, head width <= 128 and a multiple of 8."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def attention(q, k, v, *, causal=False, lengths=None, offset=None, segments=None, residual=False):
    """Return (output (b, l, h, k), None).

    Lengths go to the kernel as lengths. Segments cannot: they become a boolean mask, which JAX
    gives to cuDNN as a dense bias of b x 1 x l x m numbers of q's dtype (128 MiB a row of 8192
    tokens, the same for all heads), read by every head instead of skipping what is not seen.

    Raises:
      ValueError: the operands cannot run on this device, or a residual is asked for.
    """
    if not supports(q):
        raise ValueError(
            "cudnn attention needs an NVIDIA GPU, bfloat16 or float16, and a head width that is a "
            f"multiple of 8 up to 128; got {q.dtype} width {q.shape[-1]} on {jax.default_backend()}"
        )
    if residual:
        raise ValueError("cudnn attention has no residual here; concatenate the keys instead")
    if offset is not None and segments is None:
        raise ValueError("cudnn attention has no offset here; use blocked or reference")
    mask = None
    if segments is not None:
        mask = segments[0][:, :, None] == segments[1][:, None]
    if offset is not None:
        last = offset[:, None] + jnp.arange(q.shape[1])
        mask, causal = mask & (jnp.arange(k.shape[1]) <= last[..., None]), False
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[:, None],
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out, None
