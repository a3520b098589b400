"""The miniature's tokenizer: byte-level BPE as Qwen's, with its special tokens, trained here."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from clvr_jax.miniature import edits, prompts, scenes
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.lessons import LONG, SHORT, lesson, some_task

VOCABULARY = 768


def train(texts: Iterable[str], template: str, special: Sequence[str]) -> Any:
    """Return a tokenizer (transformers) of at most `VOCABULARY` tokens; it encodes any text.

    Args:
      texts: what it is to be short for.
      template: the chat template, Jinja.
      special: tokens that are no text, numbered in this order from 0 on: the sizes of the models
        name some by number. The first one pads, the third one ends a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[0],
        eos_token=special[2],
        padding_side="right",
        chat_template=template,
    )


def corpus(count: int = 2000, seed: int = 0) -> list[str]:
    """Return texts of the world from a seed: prompts, edits, lessons, and what frames them.

    Args:
      count: prompts, and as many edits; a quarter as many lessons.
      seed: of all draws.
    """
    rng = np.random.Generator(np.random.PCG64([seed, count]))
    texts = ["system", "user", "assistant", "\n\n"] * count  # of the chat template
    for _ in range(count):
        texts.append(prompts.sample(rng, None, Split.TRAIN)[0].text)
        scene = scenes.sample(rng, Split.TRAIN, int(rng.integers(1, 8)))
        texts.append(edits.sample(rng, scene, None, Split.TRAIN)[1])
    for number in range(count // 4):
        task = some_task(rng, SHORT if number % 4 else LONG)
        texts += [message.text for message in lesson(rng, task).messages]
    return texts
