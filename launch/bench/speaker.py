"""A vision-language model of random weights that directs a drawing by a script.

Every token of a turn is generated, under the loop's grammar where it asks for one; the turn that
the loop is then told is the script's, since random weights do not come to an action.
"""

import dataclasses
import random
import string
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from clvr_jax.backends.local import LocalVlm
from clvr_jax.backends.protocol import Message, OnText, Options, Pending, Reply
from clvr_jax.data.turns import STOP, Action
from clvr_jax.models.qwen3_vl import config, model
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.processor import Processor
from clvr_jax.typing import Params
from launch import build_vlm
from launch.bench.weights import random_params
from launch.folders import SEEING, VLM_TEMPLATE, preprocessor, with_picture_tokens
from launch.toy import byte_tokenizer


@dataclasses.dataclass(frozen=True)
class Script:
    """What a trajectory says: a picture, edits of the last one, the end.

    Attributes:
      generations: pictures of it.
      tokens: that each turn writes.
      verdict: tokens of the last turn, which stops.
    """

    generations: int
    tokens: int
    verdict: int

    def turn(self, number: int) -> tuple[str, int]:
        """Return what turn `number`, counted from 1, says, and how many tokens it writes."""
        if number > self.generations:
            return STOP, self.verdict
        action = Action(kind="generate", prompt="a cup")
        if number > 1:
            action = Action(kind="edit", prompt="a saucer under it", references=(number - 1,))
        return action.line(), self.tokens


class Said(NamedTuple):
    """A turn as it was generated, and the seconds that its words and pictures took before that."""

    reply: Reply
    prepare: float


class Speaker:
    """A local model whose sessions say a script; a `Vlm` for `clvr_jax.closed_loop.Loop`.

    Attributes:
      turns: of each session so far.
    """

    def __init__(self, vlm: LocalVlm, script: Script):
        self.name, self.context, self._vlm, self._script = vlm.name, vlm.context, vlm, script
        self.turns: list[list[Said]] = []

    def start(self) -> "_Session":
        """Return a new conversation."""
        self.turns.append(said := [])
        return _Session(self._vlm.start(), self._script, said)

    def load(self) -> dict[str, int]:
        """Return how much the model has to do."""
        return self._vlm.load()

    def close(self) -> None:
        """Close the model."""
        self._vlm.close()


class _Session:
    def __init__(self, session: Any, script: Script, turns: list[Said]):
        self._session, self._script, self._turns = session, script, turns

    def submit(self, messages: Sequence[Message], options: Options, on_text: OnText) -> "_Answer":
        text, tokens = self._script.turn(len(self._turns) + 1)
        began = time.perf_counter()
        options = dataclasses.replace(options, max_tokens=tokens)
        pending = self._session.submit(messages, options, on_text)
        return _Answer(pending, text, tokens, self._turns, time.perf_counter() - began)

    def close(self) -> None:
        self._session.close()


@dataclasses.dataclass
class _Answer:
    pending: Pending
    text: str
    tokens: int
    turns: list[Said]
    prepare: float

    def result(self, timeout: float | None = None) -> Reply:
        reply = self.pending.result(timeout)
        if reply.usage.completion != self.tokens:
            raise RuntimeError(f"a turn wrote {reply.usage.completion} of {self.tokens} tokens")
        self.turns.append(Said(reply, self.prepare))
        return dataclasses.replace(reply, text=self.text, finish="stop")

    def cancel(self) -> None:
        self.pending.cancel()


def build(cfg: Qwen3VLConfig, dtype: Any, **limits: Any) -> LocalVlm:
    """Return a model of random weights that hardly ever ends a turn by itself.

    Args:
      cfg: sizes; the tokens of pictures are taken from the tokenizer.
      dtype: of the weights.
      limits: of `LocalVlm`.
    """
    tokenizer = byte_tokenizer(SEEING, VLM_TEMPLATE, words(cfg.text.vocab - 256 - len(SEEING)))
    cfg = with_picture_tokens(cfg, tokenizer)
    stops = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    params = random_params(model.abstract_params(cfg, jnp.dtype(dtype)), 0, config.STACKED)
    params = _endless(params, stops, cfg.text.tied)
    return LocalVlm(
        "random",
        build_vlm.networks(cfg),
        build_vlm.prepare(cfg, params, None),
        Processor(tokenizer, VLM_TEMPLATE, _images(cfg), stops),
        cfg,
        **limits,
    )


def words(count: int) -> list[str]:
    """Return so many different made-up words: a vocabulary whose masks cost what real ones do."""
    rng, found = random.Random(0), dict[str, None]()
    while len(found) < count:
        found["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))] = None
    return list(found)


def _endless(params: Params, stops: tuple[int, ...], tied: bool) -> Params:
    """Parameters under which a stop scores 0, far from the likeliest tokens."""
    name, leaf = ("embed_tokens", "embedding") if tied else ("lm_head", "kernel")
    head = params["language"][name][leaf]
    at = jnp.asarray(stops)
    head = head.at[at].set(0) if tied else head.at[:, at].set(0)
    language = params["language"] | {name: params["language"][name] | {leaf: head}}
    return params | {"language": language}


def _images(cfg: Qwen3VLConfig) -> Any:
    """What takes pictures as they are, if their sides are multiples of a cell's."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    fields = preprocessor(cfg.vision, 4096, 4096**2)
    del fields["image_processor_type"]
    return Qwen2VLImageProcessorPil(**fields)
