"""cuDNN's fused attention on NVIDIA GPUs: half precision, head widths up to 128."""

import functools

import jax
import jax.numpy as jnp


@functools.cache
def _backend() -> str:
    return jax.default_backend()


def supports(q, k) -> bool:
    """Whether this can run: GPU, bf16 or f16, head width <= 128 and a multiple of 8."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return _backend() == "gpu" and half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def attention(q, k, v, *, causal=False, lengths=None, residual=False):
    """Return (output (b, l, h, k), residual (b, l, h) or None).

    Lengths go to the kernel as lengths: a boolean mask would become a dense bias.

    Raises:
      ValueError: the operands cannot run on this device.
    """
    if not supports(q, k):
        raise ValueError(
            "cudnn attention needs an NVIDIA GPU, bfloat16 or float16, and a head width that is a "
            f"multiple of 8 up to 128; got {q.dtype} width {q.shape[-1]} on {_backend()}"
        )
    if not residual:
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
        )
        return out, None
    if causal or lengths is not None:
        raise ValueError("cudnn attention returns its residual for unmasked attention only")
    # jax.nn.dot_product_attention rounds the residual to the operands' dtype; joining partial
    # attentions with a bfloat16 log-sum-exp is off by percents
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    out, lse = dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True)
    return out, jnp.transpose(lse, (0, 2, 1))
