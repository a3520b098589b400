"""The local backend: the protocol over the engine."""

import threading
from collections.abc import Sequence as Several
from typing import Any

import jax
from jax.sharding import Mesh

from clvr_jax.backends.local.engine import Engine
from clvr_jax.backends.local.grammar import Grammars
from clvr_jax.backends.local.output import Output
from clvr_jax.backends.local.reader import Reader
from clvr_jax.backends.local.sequence import Sequence
from clvr_jax.backends.local.work import Pending, Work
from clvr_jax.backends.protocol import (
    NO_TURN,
    Closed,
    InvalidRequest,
    Message,
    OnText,
    Options,
    Overloaded,
    Score,
    Session,
    TooLong,
)
from clvr_jax.generate import text
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.processor import Processor, Turn
from clvr_jax.typing import Params

_CPU_CACHE = 2 * 2**30
_SHARE = 0.8  # of the memory that the weights leave free


class LocalVlm:
    """A Qwen3 or Qwen3-VL on this machine's devices.

    Args:
      name: what it is called.
      nets: the networks.
      params: `{"language": ..., "visual": ...}`, the language model's prepared for serving.
      processor: of the checkpoint.
      cfg: sizes and special tokens of a model that sees, None for a text-only one.
      context: most tokens of a conversation; None for what the checkpoint declares.
      cache_bytes: for all keys and values; None for most of the memory that is free.
      max_rows: most turns generated at once; a power of two.
      mesh: where the parameters are spread, None for one device.

    Raises:
      ValueError: the context is longer than the checkpoint's, or the budget does not hold it.
    """

    def __init__(
        self,
        name: str,
        nets: text.Networks,
        params: Params,
        processor: Processor,
        cfg: Qwen3VLConfig | None = None,
        *,
        context: int | None = None,
        cache_bytes: int | None = None,
        max_rows: int = 16,
        mesh: Mesh | None = None,
    ):
        language = nets.language.cfg
        self.name, self.processor = name, processor
        self._grammars = Grammars(processor.tokenizer, language.vocab, processor.close)
        budget = _free_memory() if cache_bytes is None else cache_bytes
        self.context = language.max_positions if context is None else context
        if not 1 < self.context <= language.max_positions:
            raise ValueError(
                f"the context is {self.context} tokens, the checkpoint's positions end at "
                f"{language.max_positions}"
            )
        self.engine = Engine(
            nets,
            params,
            Reader(nets, params, cfg, processor.levels()),
            self._grammars,
            context=self.context,
            cache_bytes=budget,
            max_rows=max_rows,
            mesh=mesh,
        )

    def start(self) -> "LocalSession":
        """Return a new, empty conversation."""
        return LocalSession(self)

    def load(self) -> dict[str, int]:
        """Return how many turns run and wait, and what the caches take."""
        return self.engine.load()

    def close(self) -> None:
        """Cancel what runs and refuse new work."""
        self.engine.close()


class LocalSession(Session):
    """A conversation with a `LocalVlm`; see the protocol."""

    def __init__(self, vlm: LocalVlm):
        self._vlm, self._sequence = vlm, Sequence()
        self._last: Work | None = None  # what `take_back` takes back
        self._lock = threading.Lock()

    @property
    def ids(self) -> tuple[int, ...]:
        """The raw token ids so far, as read and sampled."""
        return tuple(self._sequence.ids)

    def submit(
        self,
        messages: Several[Message],
        options: Options = Options(),
        on_text: OnText | None = None,
    ) -> Pending:
        """Append messages and begin to generate; see the protocol.

        Raises:
          InvalidRequest: the request can never be answered.
          Overloaded: the model has been closed, or this session's last turn is not done.
        """
        self._claim()
        try:
            work = self._work(messages, options, on_text)
            self._vlm.engine.submit(work)
        except BaseException:
            self._sequence.running = False
            raise
        self._last = work
        return work.pending

    def score(self, messages: Several[Message], continuations: Several[str]) -> list[Score]:
        """Return the log-probability of each text as the next turn, its closing token left out.

        Raises:
          InvalidRequest: there is no text to score, or it does not fit the context.
        """
        self._claim()
        try:
            rows = self._score(messages, continuations)
        finally:
            self._sequence.running = False
        return [Score(float(row.sum()), tuple(map(float, row))) for row in rows]

    def take_back(self) -> None:
        """Forget the last turn; what was read before it stays in the cache. See the protocol.

        Raises:
          InvalidRequest: no turn has been asked, or it has been taken back already.
          Overloaded: the model has been closed, or this session's last turn is not done.
        """
        self._claim()
        try:
            work, self._last = self._last, None
            if work is None:
                raise InvalidRequest(NO_TURN)
            if work.mark is not None:  # it was not cancelled before it began
                self._vlm.engine.call(lambda: self._sequence.back_to(work.mark))
        finally:
            self._sequence.running = False

    def close(self) -> None:
        """Free what the session holds; a turn that runs is cancelled."""
        self._vlm.engine.drop(self._sequence)

    def _claim(self) -> None:
        with self._lock:  # two threads may ask at once
            if self._sequence.closed:
                raise Closed("the session has been closed")
            if self._sequence.running:
                raise Overloaded("the session's last turn is not done; wait for its result")
            self._sequence.running = True

    def _work(self, messages: Several[Message], options: Options, on_text: OnText | None) -> Work:
        vlm, seq = self._vlm, self._sequence
        turn = self._turn(messages)
        new = 0 if turn is None else len(turn.ids)
        _check_length(len(seq) + new, vlm.context)
        ends = vlm.processor.stops
        return Work(
            sequence=seq,
            turn=turn,
            options=options,
            output=Output(vlm.processor.tokenizer, ends, options.stop, on_text),
            pending=Pending(vlm.engine.wake, vlm.engine.inside),
            ends=ends,
            limit=min(options.max_tokens, vlm.context - len(seq) - new),
            matcher=vlm._grammars.compile(options),
        )

    def _score(self, messages: Several[Message], continuations: Several[str]) -> list[Any]:
        vlm, seq = self._vlm, self._sequence
        turn = self._turn(messages)
        tokenize = lambda words: vlm.processor.tokenizer.encode(words, add_special_tokens=False)
        ids = [tokenize(words) for words in continuations]
        if not ids or not all(ids):
            raise InvalidRequest("a continuation to score is empty")
        new = 0 if turn is None else len(turn.ids)
        _check_length(len(seq) + new + max(map(len, ids)), vlm.context)

        def run() -> list[Any]:
            mark = seq.mark()
            if turn is not None:
                seq.append(turn)
            try:
                return vlm.engine.score(seq, ids)
            except BaseException:
                seq.evict()
                raise
            finally:
                seq.back_to(mark)

        return vlm.engine.call(run)

    def _turn(self, messages: Several[Message]) -> Turn | None:
        """The new messages as tokens; None to continue the assistant's turn."""
        processor, seq = self._vlm.processor, self._sequence
        if not messages:
            if not seq.ids or seq.ids[-1] in processor.stops:
                raise InvalidRequest(
                    "no messages are given, and there is no unfinished assistant turn to continue"
                )
            return None
        given = [{"role": m.role, "parts": m.parts} for m in messages]
        try:
            if not seq.ids:
                return processor.first(given)
            return processor.later(given, seq.ids[-1] == processor.close)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error


def _check_length(tokens: int, context: int) -> None:
    """Refuse a conversation that leaves no room for a reply.

    Raises:
      TooLong: it does not.
    """
    if tokens >= context:
        raise TooLong(
            f"the conversation has {tokens} tokens with this turn, the context holds {context}; "
            "shorten it or start a new one"
        )


def _free_memory() -> int:
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return _CPU_CACHE
    return int(_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"])) * len(jax.local_devices())
