"""The local image model: orders that wait are drawn together, in batches of few sizes."""

import collections
import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from clvr_jax.backends.images import Drawn, NotFinite, Order
from clvr_jax.backends.protocol import Closed, InvalidRequest
from clvr_jax.generate import image as generation
from clvr_jax.generate.prompt import render
from clvr_jax.generate.references import prepare

_SEEDS = 2**32


class _Waiting(NamedTuple):
    """An order and what it needs; those of one shape can be drawn together."""

    order: Order
    references: tuple[np.ndarray, ...]
    shape: tuple[Any, ...]
    future: Future[Drawn]


class LocalImages:
    """A klein on this machine's devices, with a thread of its own.

    Args:
      name: what it is called.
      model: what samples.
      settings: how; `text_tokens` is chosen for each order.
      texts: text lengths that the weights were trained with, ascending.
      batch: most pictures drawn at once, a power of two.
      mesh: where the parameters are spread, None for one device.

    Raises:
      ValueError: the batch is no power of two, or there are no text lengths.
    """

    def __init__(
        self,
        name: str,
        model: generation.ImageModel,
        settings: generation.Settings,
        texts: Sequence[int],
        *,
        batch: int = 8,
        mesh: Any = None,
    ):
        if batch < 1 or batch & (batch - 1):
            raise ValueError(f"batch is {batch}; it must be a power of two")
        if not texts:
            raise ValueError("no text lengths; give those that the weights were trained with")
        self.name, self.texts = name, tuple(sorted(texts))
        self.evaluations = settings.evaluations
        self._model, self._settings, self._batch, self._mesh = model, settings, batch, mesh
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name=f"images {name}", daemon=True)
        self._thread.start()

    def check(self, order: Order) -> None:
        """Raise InvalidRequest if the order can never be drawn; see the protocol."""
        self._prepared(order)

    def submit(self, order: Order) -> Future[Drawn]:
        """Begin to draw; see the protocol.

        Raises:
          InvalidRequest: the text is longer than the weights take, a picture cannot be a
            reference, or the seed is out of range.
          Closed: this was closed.
        """
        references, shape = self._prepared(order)
        waiting = _Waiting(order, references, shape, Future())
        with self._changed:
            if self._closed:
                raise Closed(f"{self.name} has been closed")
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Refuse new orders, cancel those that wait, and end the thread after its batch."""
        with self._changed:
            self._closed = True
            while self._queue:
                self._queue.popleft().future.cancel()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _prepared(self, order: Order) -> tuple[tuple[np.ndarray, ...], tuple[Any, ...]]:
        """The references as values, and the shape of the order."""
        if not 0 <= order.seed < _SEEDS:
            raise InvalidRequest(f"the seed is {order.seed}; give one from 0 to {_SEEDS - 1}")
        factor = self._model.networks.vae.cfg.factor
        try:
            references = tuple(prepare(picture, factor) for picture in order.references)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return references, (self._text_tokens(order.text), *(image.shape for image in references))

    def _text_tokens(self, text: str) -> int:
        tokens = len(self._model.tokenizer.encode(render(text), add_special_tokens=False))
        for length in self.texts:
            if tokens <= length:
                return length
        raise InvalidRequest(
            f"the image model's text takes {tokens} tokens, at most {self.texts[-1]} are allowed: "
            f"{text[:60]!r}..."
        )

    def _work(self) -> None:
        while taken := self._take():
            running = [each for each in taken if each.future.set_running_or_notify_cancel()]
            if not running:
                continue
            try:
                self._draw(running)
            except BaseException as error:  # whoever waits must hear of it
                for each in running:
                    if not each.future.done():
                        each.future.set_exception(error)

    def _take(self) -> list[_Waiting]:
        """Wait for orders; return the oldest and all of its shape, or none at the end."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return []
                self._changed.wait()
            shape = self._queue[0].shape
            taken = [each for each in self._queue if each.shape == shape][: self._batch]
            for each in taken:
                self._queue.remove(each)
            return taken

    def _draw(self, taken: list[_Waiting]) -> None:
        """Draw what has one shape; a batch is filled up to a power of two, so that few compile."""
        size = 1 << (len(taken) - 1).bit_length()
        rows = [*taken, *[taken[-1]] * (size - len(taken))]
        settings = generation.dataclasses.replace(self._settings, text_tokens=taken[0].shape[0])
        mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        began = time.perf_counter()
        with mesh:
            pictures, finite = generation.generate_each(
                self._model,
                [each.order.text for each in rows],
                [each.references for each in rows],
                [each.order.seed for each in rows],
                settings,
            )
        seconds = time.perf_counter() - began
        for each, picture, good in zip(taken, pictures, finite, strict=False):
            if good:
                drawn = Drawn(Image.fromarray(picture), self.evaluations, seconds, len(taken))
                each.future.set_result(drawn)
            else:
                each.future.set_exception(
                    NotFinite(
                        f"the picture for seed {each.order.seed} has values that are no numbers"
                    )
                )
