"""A picture under way, and again with other noise where it fails."""

import dataclasses
from collections.abc import Callable

from clvr_jax.backends.images import Drawn, ImageGenerator, Order


class Drawing:
    """One picture, ordered when this is made.

    Args:
      images: draws it.
      order: without its seed.
      seed: of each attempt, from 0 on.

    Raises:
      InvalidRequest: the order can never be drawn.
    """

    def __init__(self, images: ImageGenerator, order: Order, seed: Callable[[int], int]):
        self._images, self._order, self._seed = images, order, seed
        self._future = self._submit(0)

    def _submit(self, attempt: int):
        self._order = dataclasses.replace(self._order, seed=self._seed(attempt))
        return self._images.submit(self._order)

    def result(self, failed: Callable[[Exception, int], None]) -> tuple[Drawn, int]:
        """Wait for the picture; return it with the seed that it came of.

        Args:
          failed: told of a failure and its attempt; raises if there shall not be another.
        """
        attempt = 0
        while True:
            try:
                return self._future.result(), self._order.seed
            except Exception as error:
                failed(error, attempt)
            attempt += 1
            self._future = self._submit(attempt)
