"""cuDNN's fused attention on NVIDIA GPUs: half precision, head widths up to 128."""

import jax
import jax.numpy as jnp


def supports(q) -> bool:
    """Whether this can run: GPU, bf16 or f16, head width <= 128 and a multiple of 8."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def attention(q, k, v, *, causal=False, lengths=None, offset=None, residual=False):
    """Return (output (b, l, h, k), None).

    Lengths go to the kernel as lengths: a boolean mask would become a dense bias.

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
    if offset is not None:
        raise ValueError("cudnn attention has no offset here; use blocked or reference")
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out, None
