"""Prompts to token ids, as klein's text encoder expects them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

TEXT_BUCKETS = (512, 1024, 2048)


def render(prompt: str) -> str:
    """Return the text that is tokenised: one user turn, no system turn, thinking switched off."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (b, length) int32, padded on the right in full, and the real lengths (b,).

    Args:
      tokenizer: a Hugging Face tokenizer.
      prompts: plain prompts; the empty prompt is the negative one.
      length: tokens of every row. It is part of the condition, since klein sees its padding.

    Raises:
      ValueError: a prompt does not fit; nothing is cut.
    """
    rows = [tokenizer.encode(render(prompt), add_special_tokens=False) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > length:
            larger = [n for n in TEXT_BUCKETS if n >= len(row)]
            raise ValueError(
                f"the prompt {prompt[:60]!r}... takes {len(row)} tokens with its template, "
                f"the text length is {length}; shorten it"
                + (f" or set the text length to {larger[0]}" if larger else "")
            )
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(row) for row in rows], np.int32)
