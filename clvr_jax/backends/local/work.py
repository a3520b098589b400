"""A turn that was asked for: what is wanted, how far it is, and who waits for it."""

import concurrent.futures
import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from clvr_jax.backends.local.grammar import Grammars, Matcher
from clvr_jax.backends.local.output import Output
from clvr_jax.backends.local.reader import room
from clvr_jax.backends.local.sequence import Sequence, bucket, power
from clvr_jax.backends.protocol import (
    Options,
    Reply,
    Times,
    TokenLogprob,
    Usage,
)
from clvr_jax.generate import text
from clvr_jax.generate.sampling import Sampling
from clvr_jax.models.qwen3_vl.processor import Turn


class Pending:
    """See `clvr_jax.backends.protocol.Pending`.

    Args:
      wake: makes the engine look at cancelled turns.
      inside: whether this is the engine's own thread.
    """

    def __init__(self, wake: Callable[[], None], inside: Callable[[], bool]):
        self.future: concurrent.futures.Future = concurrent.futures.Future()
        self.cancelled = False
        self._wake, self._inside = wake, inside

    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the reply; see the protocol."""
        if not self.future.done() and self._inside():
            raise RuntimeError(
                "a done callback waits for the thread that it runs in: submit the turn, and add a "
                "done callback to it as well"
            )
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Stop generating soon."""
        self.cancelled = True
        self._wake()

    def add_done_callback(self, call) -> None:
        """Call `call` with this once the reply or its error is there."""
        self.future.add_done_callback(lambda _: call(self))


@dataclasses.dataclass(eq=False)
class Work:
    """One turn.

    Attributes:
      sequence: the conversation.
      turn: what to append first; None continues the last assistant turn.
      options: how to generate.
      output: text so far; None where nobody reads it (benchmarks).
      pending: who waits; None likewise.
      ends: token ids that end it.
      limit: tokens that it may generate.
      matcher: its grammar, None for free text.
      mark: how the sequence was before it, None until it begins.
      seed: of its sampling.
      mask: bits of the tokens that its grammar allows next.
    """

    sequence: Sequence
    turn: Turn | None
    options: Options
    output: Output | None
    pending: Pending | None
    ends: tuple[int, ...]
    limit: int
    matcher: Matcher | None
    mark: tuple[int, int, int, int] | None = None
    seed: int = 0
    prompt: int = 0
    cached: int = 0
    begun: float = 0.0
    read: float = 0.0
    first: float = 0.0
    constrain: float = 0.0
    asked: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: list[TokenLogprob] = dataclasses.field(default_factory=list)
    mask: np.ndarray | None = None

    def __post_init__(self):
        given = self.options.seed
        self.seed = secrets.randbits(31) if given is None else given

    @property
    def places(self) -> int:
        """Cache places that the conversation may need until the turn's end."""
        if self.prompt:  # it has begun
            return self.prompt + self.limit
        new = 0 if self.turn is None else len(self.turn.ids)
        return len(self.sequence) + new + self.limit

    @property
    def grown(self) -> int:
        """Places of its row in a batch at the turn's end."""
        return bucket(self.places + text.CHUNK)

    @property
    def alone(self) -> int:
        """Places of its own cache until it joins a batch, padding of what is read included."""
        cache = self.sequence.cache
        have = 0 if cache is None else cache[0].keys.shape[2]
        return max(self.grown, have, room(self.sequence.cached, self.places - self.limit))

    def row(self, scores, vocab: int, cache) -> text.Rows:
        """Return the turn as a batch of one, its conversation read and `scores` after it."""
        o, seq = self.options, self.sequence
        seen = np.zeros((1, vocab), bool)
        if o.repetition_penalty != 1.0:
            seen[0, seq.ids] = True
        one = lambda value, dtype: np.full(1, value, dtype)
        stops = np.full((1, power(len(self.ends), 4)), -1, np.int32)
        stops[0, : len(self.ends)] = self.ends
        return text.Rows(
            cache=cache,
            lengths=one(seq.cached, np.int32),
            position=one(seq.position, np.int32),
            scores=scores,
            seen=seen,
            counts=np.zeros((1, vocab), np.int32),
            step=one(0, np.int32),
            limit=one(self.limit, np.int32),
            stops=stops,
            active=one(True, bool),
            sampling=Sampling(
                temperature=one(o.temperature, np.float32),
                top_k=one(min(o.top_k, vocab), np.int32),
                top_p=one(o.top_p, np.float32),
                min_p=one(o.min_p, np.float32),
                repetition=one(o.repetition_penalty, np.float32),
                presence=one(o.presence_penalty, np.float32),
                frequency=one(o.frequency_penalty, np.float32),
                seed=one(self.seed % 2**32, np.uint32),
            ),
        )

    def constrain_next(self) -> None:
        """Ask the grammar which tokens may come next."""
        if self.matcher is not None:
            start = time.perf_counter()
            self.mask = self.matcher.mask()
            self.constrain += time.perf_counter() - start

    def push(self, token: int) -> bool:
        """Take a generated token; return whether the turn has ended."""
        self.first = self.first or time.perf_counter()
        self.sequence.ids.append(token)
        if self.matcher is not None and token not in self.ends:
            start = time.perf_counter()
            self.matcher.push(token)
            self.constrain += time.perf_counter() - start
        return self.output.push(token) or len(self.output.ids) >= self.limit

    def note(self, grammars: Grammars, token: int, logprob: float, rivals: Any) -> None:
        """Keep what the model thought of a token, if that is wanted."""
        if self.options.logprobs is None or token in self.ends:
            return
        show = lambda raw: raw.decode("utf-8", "replace")
        raw = grammars.raw(token)
        best = [
            (show(grammars.raw(int(i))), grammars.raw(int(i)), float(p))
            for i, p in list(zip(*rivals))[: self.options.logprobs]
        ]
        self.tokens.append(TokenLogprob(show(raw), raw, logprob, tuple(best)))

    def reply(self) -> Reply:
        """Return the finished turn."""
        whole = self.output.finish()  # may find that it ends with a stop text
        finish = "stop" if self.output.ended else "length"
        if self.pending.cancelled and not self.output.ended:
            finish = "cancelled"
        now = time.perf_counter()
        first = self.first or now
        return Reply(
            text=whole,
            finish=finish,
            usage=Usage(self.prompt, self.cached, len(self.output.ids)),
            times=Times(
                queued=self.begun - self.asked,
                prefill=self.read - self.begun,
                first=first - self.asked,
                decode=now - self.read,
                constrain=self.constrain,
                total=now - self.asked,
            ),
            seed=self.seed,
            tokens=tuple(self.tokens),
        )
