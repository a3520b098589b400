"""How fast requests may go: token buckets for requests and for tokens per minute."""

import threading
from collections.abc import Callable

from clvr_jax.backends.remote.errors import Cancelled

Clock = Callable[[], float]
# waits for some seconds or until the event is set, as threading.Event.wait does
Pause = Callable[[threading.Event, float], object]


class Bucket:
    """A token bucket; thread-safe.

    Whoever takes from it is told at once how long to wait, and what is taken is gone, so that
    callers are served in order of arrival and never meet again to compete.
    """

    def __init__(self, per_minute: float, capacity: float, clock: Clock):
        self._rate = per_minute / 60
        self._capacity = capacity
        self._level = capacity
        self._clock = clock
        self._then = clock()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Take `amount` and return the seconds to wait before using it.

        More than the bucket holds may be taken: it goes when the bucket is full, and those who
        come later wait for the rest.
        """
        with self._lock:
            self._refill()
            wait = max(0.0, (min(amount, self._capacity) - self._level) / self._rate)
            self._level -= amount
            return wait

    def give_back(self, amount: float) -> None:
        """Return what was not used; a negative amount takes more, without waiting."""
        with self._lock:
            self._refill()
            self._level = min(self._capacity, self._level + amount)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._then) * self._rate)
        self._then = now


class Limits:
    """Requests and tokens per minute; thread-safe."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Clock,
        pause: Pause,
    ):
        """Take limits, or None for none.

        Args:
          requests_per_minute, tokens_per_minute: see RemoteConfig.
          clock: monotonic seconds.
          pause: how to wait.
        """
        # six seconds' worth may go at once: smooth within the window of a minute that servers use
        self._requests = requests_per_minute and Bucket(
            requests_per_minute, max(1.0, requests_per_minute / 10), clock
        )
        self._tokens = tokens_per_minute and Bucket(
            tokens_per_minute, tokens_per_minute / 10, clock
        )
        self._pause = pause

    def admit(self, tokens: int, stop: threading.Event) -> None:
        """Wait until a request of about `tokens` tokens may be sent.

        Raises:
          Cancelled: `stop` was set; nothing is used up.
        """
        wait = 0.0
        if self._requests:
            wait = self._requests.take(1.0)
        if self._tokens:
            wait = max(wait, self._tokens.take(float(tokens)))
        if wait > 0:
            self._pause(stop, wait)
        if stop.is_set():
            if self._requests:
                self._requests.give_back(1.0)
            self.correct(tokens, 0)
            raise Cancelled

    def correct(self, tokens: int, used: int) -> None:
        """Say how many tokens a request that was admitted for `tokens` has used."""
        if self._tokens:
            self._tokens.give_back(float(tokens - used))
