"""The fixed prompt lists of each split: made from seeds, the same on every machine."""

import functools

import numpy as np

from clvr_jax.data.turns import Action
from clvr_jax.miniature.draws import HELD_OUT_KINDS, KINDS
from clvr_jax.miniature.held_out import Split, edits_held, plain, split_of
from clvr_jax.miniature.orders import by_place
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.prompts import Prompt, sample

COUNTS = {Split.TEST: 200, Split.DEV: 50, Split.HELD_OUT: 90}  # prompts of each kind
_SEEDS = {
    Split.TEST: 20_260_001,
    Split.DEV: 20_260_002,
    Split.HELD_OUT: 20_260_003,
    Split.TRAIN: 20_260_004,
}


@functools.cache
def prompts(split: Split) -> tuple[Prompt, ...]:
    """Return the fixed prompts of dev (600), test (2,400) or held-out (900), kind after kind.

    No text comes twice, nor one that differs from another by capitals or the full stop alone. Dev
    and test have all twelve kinds, held-out the ten that can name something held out. To take a
    part of a list that has all kinds, stride over it.

    Raises:
      ValueError: the training split, which has no end: draw from `prompts.sample`.
    """
    if split not in COUNTS:
        raise ValueError(
            f"the {split.value} split has no fixed list, its prompts are drawn without end: "
            "prompts.sample(rng), or training(count)"
        )
    kinds = HELD_OUT_KINDS if split is Split.HELD_OUT else KINDS
    found: dict[str, Prompt] = {}
    for kind in kinds:
        extend(found, split, kind, COUNTS[split])
    return tuple(found.values())


def training(count: int) -> tuple[Prompt, ...]:
    """Return so many training prompts of each kind, always the same ones, none twice."""
    found: dict[str, Prompt] = {}
    for kind in KINDS:
        extend(found, Split.TRAIN, kind, count)
    return tuple(found.values())


def may_train(action: Action) -> bool:
    """Say if a step of a drawing may be learnt from.

    A prompt must be of the training split, which a part of a training prompt need not be; an edit
    must name nothing held out.

    Raises:
      ValueError: its text cannot be read.
    """
    if action.kind == "edit":
        return not edits_held(parse_edit(by_place(action)))
    return split_of(parse_prompt(action.prompt), action.prompt) is Split.TRAIN


def extend(found: dict[str, Prompt], split: Split, kind: str, count: int) -> None:
    """Add `count` prompts of a kind to those found, by their plain texts; always the same ones."""
    rng = np.random.default_rng((_SEEDS[split], KINDS.index(kind)))
    most = len(found) + count
    while len(found) < most:
        prompt, _ = sample(rng, kind, split)
        found.setdefault(plain(prompt.text), prompt)
