"""The engine: one thread that reads, generates for all turns at once, and keeps the caches.

Everything on the device happens in that thread. Between two decode calls it takes in new turns,
lets finished ones go, and does what else was asked. Caches of waiting conversations are kept
within a memory budget; the least recently used is given up and read anew when it is needed.
"""

import collections
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clvr_jax.backends.local.batch import Batch, parked_bytes
from clvr_jax.backends.local.grammar import Grammars
from clvr_jax.backends.local.reader import PIECE, Reader
from clvr_jax.backends.local.sequence import Sequence, bucket
from clvr_jax.backends.local.work import Work
from clvr_jax.backends.protocol import Closed, InvalidRequest
from clvr_jax.generate import text
from clvr_jax.typing import Params


class Engine:
    """Runs turns of many sequences on one set of weights.

    Args:
      nets: the networks.
      params: their parameters, `{"language": ..., "visual": ...}`.
      reader: fills caches.
      grammars: makes token masks and token bytes.
      context: most tokens of a conversation.
      cache_bytes: for the keys and values of all conversations together.
      max_rows: most turns that are generated at once; a power of two.
      mesh: where the parameters are spread, None for one device.

    Raises:
      ValueError: the budget does not hold a single conversation of that length.
    """

    def __init__(
        self,
        nets: text.Networks,
        params: Params,
        reader: Reader,
        grammars: Grammars,
        *,
        context: int,
        cache_bytes: int,
        max_rows: int,
        mesh: Mesh | None,
    ):
        cfg = nets.language.cfg
        width = jax.tree.leaves(params["language"])[0].dtype.itemsize
        self._token_bytes = 2 * cfg.layers * cfg.kv_heads * cfg.head_width * width
        if bucket(context + PIECE) * self._token_bytes > cache_bytes:
            raise ValueError(
                f"the cache budget is {cache_bytes / 2**30:.2f} GiB, one conversation of {context} "
                f"tokens takes {bucket(context + PIECE) * self._token_bytes / 2**30:.2f}; raise "
                "the budget or lower the context"
            )
        if max_rows < 1 or max_rows & (max_rows - 1):
            raise ValueError(f"max_rows is {max_rows}; it must be a power of two")
        self.context, self.max_rows, self.cache_bytes = context, max_rows, cache_bytes
        self.evictions = 0
        self._reader, self._grammars, self._mesh = reader, grammars, mesh
        self._batch = Batch(nets, params["language"])
        self._waiting: collections.deque[Work] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Any]] = collections.deque()
        self._parked: set[Sequence] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="clvr-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Queue a turn.

        Raises:
          Closed: the engine is closed.
        """
        with self._changed:
            if self._closing:
                raise Closed("the model has been closed")
            self._waiting.append(work)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine's thread between decode calls; return its result.

        Raises:
          Closed: the engine is closed.
        """
        if threading.current_thread() is self._thread:  # e.g. a done callback
            return function()
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            if self._closing:
                raise Closed("the model has been closed")
            self._calls.append((function, future))
            self._changed.notify()
        return future.result()

    def wake(self) -> None:
        """Look at cancelled turns soon."""
        with self._changed:
            self._changed.notify()

    def load(self) -> dict[str, int]:
        """Return how many turns run and wait, and what the caches take."""
        return {
            "running": len(self._batch.works),
            "waiting": len(self._waiting),
            "cache_bytes": self._held(),
            "evictions": self.evictions,
        }

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence; a turn of it that is running is cancelled."""
        seq.closed = True
        with self._changed:  # not `call`: this may be the engine's own thread
            self._calls.append((lambda: self._unpark(seq), concurrent.futures.Future()))
            self._changed.notify()

    def close(self) -> None:
        """Cancel all turns and stop the thread; may be called from a done callback."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def score(self, seq: Sequence, continuations: list[list[int]]) -> list[Any]:
        """Return log-probabilities of the tokens of each continuation (in the engine's thread)."""
        self._parked.discard(seq)
        seq.again()
        before_last = len(seq) - 1  # the last token is read together with what it predicts
        if before_last > seq.cached:
            self._make_room(len(seq) + PIECE)
            self._reader.read(seq, before_last)
        scores = [self._reader.score(seq, ids) for ids in continuations]
        self._park(seq)
        return scores

    def _run(self) -> None:
        mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with mesh:
            while True:
                with self._changed:
                    while not (self._closing or self._calls or self._waiting or self._batch.works):
                        self._changed.wait()
                    if self._closing:
                        break
                self._do_calls()
                self._admit()
                self._decode()
        self._fail_all(Closed("the model has been closed"))

    def _do_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _admit(self) -> None:
        """Take in waiting turns; while others run, read no more than a piece's tokens at a time."""
        read = 0
        while self._waiting:
            work = self._waiting[0]
            busy = bool(self._batch.works)
            if self._unwanted(work):
                self._waiting.popleft()
                work.begun = work.read = time.perf_counter()
                self._finish(work)
                continue
            rows, places = self._batch.needs(work)
            full = rows > self.max_rows or rows * places * self._token_bytes > self.cache_bytes
            if busy and (full or read >= PIECE):
                return
            self._waiting.popleft()
            read += work.places - work.limit - work.sequence.cached
            self._start(work, rows * places)

    def _start(self, work: Work, places: int) -> None:
        """Read a turn's conversation and put it into the batch."""
        seq = work.sequence
        self._parked.discard(seq)
        work.begun, work.mark = time.perf_counter(), seq.mark()
        try:
            if work.turn is not None:
                seq.append(work.turn)
            else:
                seq.again()
            work.prompt, work.cached = len(seq), seq.cached
            self._make_room(places)
            scores = self._reader.read(seq)
            work.read = time.perf_counter()
            cache, seq.cache = seq.cache, None
            self._batch.add(work, scores, cache)
        except Exception as error:
            logging.exception("a turn failed while its conversation was read")
            seq.back_to(work.mark)
            seq.evict()  # the failed call may have taken the cache with it
            self._settle(work, error)

    def _decode(self) -> None:
        for work in self._batch.works:
            if self._unwanted(work):
                self._retire(work)
        works = self._batch.works
        if not works:
            return
        try:
            # the first token of a turn comes alone: somebody waits for it
            new = any(not work.output.ids for work in works)
            out = self._batch.step(1 if new else text.CHUNK)
        except Exception as error:
            logging.exception("a decode call failed")
            self._fail_running(error)
            return
        for work in works:
            self._take(work, self._batch.slot(work), out)
        if not self._waiting:
            self._batch.shrink()

    def _unwanted(self, work: Work) -> bool:
        if work.sequence.closed:
            work.pending.cancelled = True
        return work.pending.cancelled

    def _take(self, work: Work, row: int, out: text.Tokens) -> None:
        """Hand a turn its tokens; let it go when it has ended."""
        seq, ended = work.sequence, False
        emitted = out.ids[row][out.ids[row] >= 0].tolist()
        try:
            for i, token in enumerate(emitted):
                if not np.isfinite(out.logprobs[row, i]):
                    raise RuntimeError("the model's scores are not finite: are the weights whole?")
                rivals = out.rivals[row, i], out.rival_logprobs[row, i]
                work.note(self._grammars, token, float(out.logprobs[row, i]), rivals)
                seq.cached, seq.position = seq.cached + 1, seq.position + 1
                if work.push(token):
                    ended = True
                    break
        except Exception as error:
            self._batch.remove(work, keep=False)
            seq.back_to(work.mark)
            seq.evict()
            self._settle(work, error)
            return
        if ended:
            self._retire(work)

    def _retire(self, work: Work) -> None:
        seq = work.sequence
        seq.cache = self._batch.remove(work, keep=not seq.closed)
        self._finish(work)
        self._park(seq)

    def _finish(self, work: Work) -> None:
        try:
            reply = work.reply()
        except Exception as error:
            self._settle(work, error)
            return
        self._settle(work, None, reply)

    def _settle(self, work: Work, error: Exception | None, reply: Any = None) -> None:
        work.sequence.running = False
        if error is not None:
            work.pending.future.set_exception(error)
        else:
            work.pending.future.set_result(reply)

    def _fail_running(self, error: Exception) -> None:
        works = self._batch.works
        self._batch.clear()
        for work in works:
            work.sequence.back_to(work.mark)
            work.sequence.evict()
            self._settle(work, error)

    def _fail_all(self, error: Exception) -> None:
        self._fail_running(error)
        while self._waiting:
            self._settle(self._waiting.popleft(), error)
        while self._calls:
            self._calls.popleft()[1].set_exception(error)

    def _park(self, seq: Sequence) -> None:
        """Keep a waiting conversation's cache, as far as the budget allows."""
        if seq.closed or seq.cache is None:
            self._unpark(seq)
            return
        seq.touch()
        self._parked.add(seq)
        self._make_room(0)

    def _unpark(self, seq: Sequence) -> None:
        self._parked.discard(seq)
        if not any(work.sequence is seq for work in self._batch.works):
            seq.evict()

    def _make_room(self, places: int) -> None:
        """Evict the least recently used until so many more places are within the budget."""
        wanted = places * self._token_bytes
        for seq in sorted(self._parked, key=lambda seq: seq.used):
            if self._held() - self._running() + max(wanted, self._running()) <= self.cache_bytes:
                return
            self._parked.discard(seq)
            seq.evict()
            self.evictions += 1

    def _running(self) -> int:
        rows, places = self._batch.size
        return rows * places * self._token_bytes

    def _held(self) -> int:
        return self._running() + sum(parked_bytes(seq.cache) for seq in tuple(self._parked))


def check_length(tokens: int, context: int) -> None:
    """Refuse a conversation that leaves no room for a reply.

    Raises:
      InvalidRequest: it does not.
    """
    if tokens >= context:
        raise InvalidRequest(
            f"the conversation has {tokens} tokens with this turn, the context holds {context}; "
            "shorten it or start a new one"
        )
