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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clvr_jax.backends.local.batch import Batch
from clvr_jax.backends.local.grammar import Grammars
from clvr_jax.backends.local.parking import Parking
from clvr_jax.backends.local.reader import PIECE, Reader, cache_places
from clvr_jax.backends.local.sequence import Sequence, bucket
from clvr_jax.backends.local.work import Work
from clvr_jax.backends.protocol import Closed
from clvr_jax.generate import text
from clvr_jax.models.qwen3 import cache
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
        width = jax.tree.leaves(params["language"])[0].dtype.itemsize
        self._token_bytes = cache.token_bytes(nets.language.cfg, width)
        least = cache_places(context) * self._token_bytes
        if least > cache_bytes:
            raise ValueError(
                f"the cache budget is {cache_bytes / 2**30:.2f} GiB, one conversation of {context} "
                f"tokens takes {least / 2**30:.2f}; raise the budget or lower the context"
            )
        if max_rows < 1 or max_rows & (max_rows - 1):
            raise ValueError(f"max_rows is {max_rows}; it must be a power of two")
        self.max_rows, self.cache_bytes = max_rows, cache_bytes
        self._reader, self._grammars, self._mesh = reader, grammars, mesh
        self._batch = Batch(nets, params["language"])
        self._waiting: collections.deque[Work] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Any]] = collections.deque()
        self._parked = Parking()
        self._reading: tuple[Work, Iterator[tuple[int, Any]]] | None = None
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
        if self.inside():  # e.g. a done callback
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

    def inside(self) -> bool:
        """Whether this is the engine's own thread."""
        return threading.current_thread() is self._thread

    def load(self) -> dict[str, int]:
        """Return how many turns run and wait, and what the caches take."""
        return {
            "running": len(self._batch.works) + (self._reading is not None),
            "waiting": len(self._waiting),
            "cache_bytes": self._held(),
            "evictions": self.evictions,
        }

    @property
    def evictions(self) -> int:
        """How often a waiting conversation has lost its cache."""
        return self._parked.evictions

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
        if not self.inside():
            self._thread.join()

    def score(self, seq: Sequence, continuations: list[list[int]]) -> list[Any]:
        """Return log-probabilities of the tokens of each continuation (in the engine's thread)."""
        self._parked.discard(seq)
        seq.again()
        before_last = len(seq) - 1  # the last token is read together with what it predicts
        self._make_room(bucket(len(seq) + max(map(len, continuations)) + PIECE))
        if before_last > seq.cached:
            self._reader.read(seq, before_last)
        scores = [self._reader.score(seq, ids) for ids in continuations]
        self._park(seq)
        return scores

    def _run(self) -> None:
        mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        try:
            with mesh:
                while self._wait():
                    try:
                        self._do_calls()
                        self._admit()
                        self._decode()
                    except Exception as error:
                        logging.exception("the engine failed between two calls")
                        self._fail_running(error)
        finally:
            with self._changed:
                self._closing = True
            self._fail_all(Closed("the model has been closed"))

    def _wait(self) -> bool:
        """Wait for something to do; return false when the engine is closed."""
        idle = lambda: not (self._calls or self._waiting or self._reading or self._batch.works)
        with self._changed:
            while idle() and not self._closing:
                self._changed.wait()
            return not self._closing

    def _do_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _admit(self) -> None:
        """Read for turns that begin; after a piece's tokens it is the others' turn."""
        self._give_up()
        read = 0
        while read < PIECE and (self._reading or self._begin()):
            read += self._read()

    def _give_up(self) -> None:
        """Settle turns that nobody wants any more before they are read."""
        with self._changed:
            unwanted = [work for work in self._waiting if self._unwanted(work)]
            for work in unwanted:
                self._waiting.remove(work)
        for work in unwanted:
            work.begun = work.read = time.perf_counter()
            self._finish(work)
        if self._reading and self._unwanted(self._reading[0]):
            work, self._reading = self._reading[0], None
            work.read = time.perf_counter()
            work.sequence.back_to(work.mark)
            self._finish(work)
            self._park(work.sequence)

    def _begin(self) -> bool:
        """Begin to read for the turn that has waited longest, if there is one and room for it."""
        if not self._waiting or not self._fits(self._waiting[0]):
            return False
        work = self._waiting.popleft()
        seq = work.sequence
        self._parked.discard(seq)
        work.begun, work.mark = time.perf_counter(), seq.mark()
        try:
            if work.turn is not None:
                seq.append(work.turn)
            else:
                seq.again()
            work.prompt, work.cached = len(seq), seq.cached
            self._reading = work, self._reader.pieces(seq)
            self._make_room()
        except Exception as error:
            self._fail_reading(work, error)
        return True

    def _fits(self, work: Work) -> bool:
        """Whether a turn may run beside the others; alone it always may."""

        def fits() -> bool:
            rows, places = self._batch.needs(work)
            # what it reads lies beside the batch until it joins
            size = (places + work.alone) * self._token_bytes
            return rows <= self.max_rows and size <= self.cache_bytes

        if not self._batch.works or fits():
            return True
        self._batch.shrink(tight=True)
        return fits()

    def _read(self) -> int:
        """Read one piece; with the last of them the turn joins the batch. Return its tokens."""
        if self._reading is None:  # it failed at once
            return 0
        work, pieces = self._reading
        seq = work.sequence
        try:
            tokens, scores = next(pieces)
            if seq.cached == len(seq):
                work.read = time.perf_counter()
                own, seq.cache = seq.cache, None
                self._batch.add(work, scores, own)
                self._reading = None
        except Exception as error:
            self._fail_reading(work, error)
            return 0
        return tokens

    def _fail_reading(self, work: Work, error: Exception) -> None:
        logging.exception("a turn failed while its conversation was read")
        self._reading = None
        self._undo(work, error)
        if self._batch.broken:  # it failed while it joined
            self._fail_running(error)

    def _decode(self) -> None:
        for work in self._batch.works:
            if self._unwanted(work):
                self._retire(work)
                continue
            try:
                work.constrain_next()
            except Exception as error:
                self._batch.remove(work, keep=False)
                self._undo(work, error)
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
            self._undo(work, error)
            return
        if ended:
            self._retire(work)

    def _retire(self, work: Work) -> None:
        seq = work.sequence
        try:
            seq.cache = self._batch.remove(work, keep=not seq.closed)
        except Exception:  # the reply is there all the same; the next turn reads anew
            logging.exception("a conversation's cache could not be kept")
            seq.evict()
        if not work.output.ids:
            seq.back_to(work.mark)  # as if it had been cancelled before it began
        self._finish(work)
        self._park(seq)

    def _undo(self, work: Work, error: Exception) -> None:
        """Let a turn fail and its session be as it was; a failed call may have taken the cache."""
        work.sequence.back_to(work.mark)
        work.sequence.evict()
        self._settle(work, error)

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
        if self._reading is not None:
            works.append(self._reading[0])
        self._batch.clear()
        self._reading = None
        for work in works:
            self._undo(work, error)

    def _fail_all(self, error: Exception) -> None:
        self._fail_running(error)
        while self._waiting:
            self._settle(self._waiting.popleft(), error)
        while self._calls:
            self._calls.popleft()[1].set_exception(error)
        self._parked.clear()

    def _park(self, seq: Sequence) -> None:
        """Keep a waiting conversation's cache, as far as the budget allows."""
        if seq.closed or seq.cache is None or not seq.cached:
            self._unpark(seq)
            return
        self._parked.add(seq)
        self._make_room()

    def _unpark(self, seq: Sequence) -> None:
        self._parked.discard(seq)
        if not any(work.sequence is seq for work in self._batch.works):
            seq.evict()

    def _make_room(self, places: int = 0) -> None:
        """Evict the least recently used: turns run to their ends, and `places` are free."""
        self._parked.shrink(self.cache_bytes - (self._reserved() + places) * self._token_bytes)

    def _reserved(self) -> int:
        """Places that running turns, and one that is being read, may come to need."""
        work = None if self._reading is None else self._reading[0]
        places = self._batch.needs(work)[1]
        return places + work.alone if work is not None and self._batch.works else places

    def _held(self) -> int:
        rows, places = self._batch.size
        reading = self._reading  # once: other threads ask as well
        own = None if reading is None else reading[0].sequence.cache
        return rows * places * self._token_bytes + self._parked.nbytes() + cache.nbytes(own)
