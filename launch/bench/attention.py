"""Attention at the shapes of the real models: cases, float64 reference, errors and speed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# relative error allowed in ||x - exact|| / ||exact||: forward, backward. bfloat16 keeps 8 bits and
# rounds the weights, the output and, backwards, the products of both.
TOLERANCE = {"bfloat16": (6e-3, 1.2e-2), "float32": (1e-5, 2e-5)}
_BLOCK = 512  # query rows of the reference at once


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call of a model.

    Attributes:
      name: what the model does there.
      b: batch.
      queries: query tokens.
      keys: tokens of every key array; several are attended as one.
      heads: query heads.
      kv_heads: key heads.
      width: head width.
      causal: whether query i sees keys 0..i.
      lengths: real keys of each row, or None.
    """

    name: str
    b: int
    queries: int
    keys: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    causal: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def flop(self) -> int:
        """Forward FLOPs; of the causal square half is counted, lengths are not."""
        full = 4 * self.b * self.queries * sum(self.keys) * self.heads * self.width
        return full // 2 if self.causal else full

    @property
    def shape(self) -> str:
        """Shape in a few characters."""
        keys = "+".join(map(str, self.keys))
        groups = "" if self.heads == self.kv_heads else f"/{self.kv_heads}"
        mask = " causal" * self.causal + (f" lengths {self.lengths}" if self.lengths else "")
        return f"{self.b} x {self.queries} x {keys}, {self.heads}{groups} x {self.width}{mask}"


def _joint(name: str, heads: int, width: int, text: int, picture: int) -> tuple[Case, ...]:
    """The transformer's calls for one picture and one reference of `picture` tokens."""
    own = text + picture
    plain = lambda what, q, *keys: Case(f"{name} {what}", 1, q, keys, heads, heads, width)
    return (
        plain("joint", own, own),
        plain("joint, 1 reference", own + picture, own + picture),
        plain("odd length", own - 1, own - 1),
        plain("reference alone (kv)", picture, picture),
        plain("cached reference, joined (kv)", own, own, picture),
        plain("cached reference, one array (kv)", own, own + picture),
    )


_TEXT = Case("text encoder", 3, 512, (512,), 32, 8, 128, causal=True, lengths=(20, 300, 512))
_VAE = Case("vae mid", 1, 16384, (16384,), 1, 1, 512)
_TINY = (
    *_joint("tiny", 4, 16, 32, 24),
    Case("tiny text", 3, 32, (32,), 4, 2, 16, causal=True, lengths=(1, 13, 32)),
    Case("tiny vae mid", 2, 96, (96,), 1, 1, 32),
    Case("blocked", 1, 1100, (1100,), 16, 16, 16),
)
CASES: dict[str, tuple[Case, ...]] = {
    "klein_4b": (*_joint("4b", 24, 128, 512, 4096), _TEXT, _VAE),
    "klein_9b": (*_joint("9b", 32, 128, 512, 4096), _TEXT, _VAE),
    "toy": _TINY,
}


def cases(shapes: str) -> list[Case]:
    """Return the cases of a variant, or of all, each once."""
    chosen = CASES.values() if shapes == "all" else (CASES[shapes],)
    return list(dict.fromkeys(case for group in chosen for case in group))


def inputs(case: Case, dtype: str, seed: int) -> tuple[Any, list[Any], list[Any], Any]:
    """Return queries, key arrays, value arrays and the output's cotangent on the device."""
    import jax

    keys = iter(jax.random.split(jax.random.key(seed), 2 + 2 * len(case.keys)))
    draw = lambda tokens, heads: jax.random.normal(
        next(keys), (case.b, tokens, heads, case.width), dtype
    )
    q, cotangent = draw(case.queries, case.heads), draw(case.queries, case.heads)
    pairs = [(draw(n, case.kv_heads), draw(n, case.kv_heads)) for n in case.keys]
    return q, [k for k, _ in pairs], [v for _, v in pairs], cotangent


def functions(case: Case, implementation: str) -> tuple[Callable, Callable]:
    """Return the jitted forward call and the jitted forward and backward call of a case.

    The second returns the gradients of sum(output * cotangent) in q, keys and values.
    """
    import jax
    import jax.numpy as jnp

    from clvr_jax.kernels.attention import attend

    lengths = None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32)

    def forward(q, k, v):
        return attend(q, k, v, causal=case.causal, lengths=lengths, implementation=implementation)

    def backward(q, k, v, cotangent):
        return jax.vjp(forward, q, k, v)[1](cotangent)

    return jax.jit(forward), jax.jit(backward)


def reference(case: Case, operands: tuple, head: int) -> dict[str, np.ndarray]:
    """Return output and gradients in float64 for one key head and the query heads that share it.

    Computed on the host, `_BLOCK` rows at a time, over all tokens.

    Args:
      case: the case.
      operands: what `inputs` returned; their rounded values are taken as exact.
      head: index of the key head.

    Returns:
      out and dq (b, l, r, k) for the r query heads of the group; dk and dv (b, m, k).
    """
    q, keys, values, cotangent = operands
    per = case.heads // case.kv_heads
    group = slice(head * per, (head + 1) * per)
    pick = lambda x, at: np.asarray(x[:, :, at], np.float64)
    q, cotangent = pick(q, group), pick(cotangent, group)
    k = np.concatenate([pick(x, head) for x in keys], axis=1)
    v = np.concatenate([pick(x, head) for x in values], axis=1)
    made = {"out": np.empty_like(q), "dq": np.empty_like(q)}
    made |= {"dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    scale = case.width**-0.5
    places = np.arange(k.shape[1])
    for i in range(case.b):
        for start in range(0, case.queries, _BLOCK):
            rows = slice(start, min(start + _BLOCK, case.queries))
            hidden = None
            if case.causal or case.lengths is not None:
                seen = case.lengths[i] if case.lengths is not None else len(places)
                hidden = places >= seen
                if case.causal:
                    hidden = hidden | (places > np.arange(rows.start, rows.stop)[:, None])
            for r in range(per):
                ours, given = q[i, rows, r], cotangent[i, rows, r]
                weights = ours @ k[i].T
                weights *= scale
                if hidden is not None:
                    weights[np.broadcast_to(hidden, weights.shape)] = -np.inf
                weights -= weights.max(-1, keepdims=True)
                np.exp(weights, out=weights)
                weights /= weights.sum(-1, keepdims=True)
                out = weights @ v[i]
                made["dv"][i] += weights.T @ given
                inner = given @ v[i].T
                inner -= np.sum(given * out, -1, keepdims=True)
                inner *= weights
                inner *= scale
                made["out"][i, rows, r], made["dq"][i, rows, r] = out, inner @ k[i]
                made["dk"][i] += inner.T @ ours
    return made


def errors(case: Case, results: dict[str, Any], exact: dict[str, np.ndarray], head: int):
    """Return {name: (||x - exact|| / ||exact||, max |x - exact| / max |exact|)} of one key head."""
    per = case.heads // case.kv_heads
    found = {}
    for name, wanted in exact.items():
        at = slice(head * per, (head + 1) * per) if name in ("out", "dq") else head
        arrays = results[name] if isinstance(results[name], list) else [results[name]]
        ours = np.concatenate([np.asarray(x[:, :, at], np.float64) for x in arrays], axis=1)
        gap = ours - wanted
        relative = np.linalg.norm(gap) / np.linalg.norm(wanted)
        found[name] = (float(relative), float(np.abs(gap).max() / np.abs(wanted).max()))
    return found
