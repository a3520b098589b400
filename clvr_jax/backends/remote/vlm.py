"""A vision-language model behind an OpenAI-compatible endpoint."""

import random
import threading
import time
from collections.abc import Callable

from clvr_jax.backends.protocol import InvalidRequest, OnText, Options, Reply, Times
from clvr_jax.backends.remote.cache import DiskCache
from clvr_jax.backends.remote.config import RemoteConfig
from clvr_jax.backends.remote.endpoint import Answer, Delivery, Endpoint, Refused
from clvr_jax.backends.remote.errors import Cancelled
from clvr_jax.backends.remote.ledger import Ledger, Totals
from clvr_jax.backends.remote.limits import Limits, Pause
from clvr_jax.backends.remote.records import free
from clvr_jax.backends.remote.request import Request, Said
from clvr_jax.backends.remote.retry import BadReply, Retries
from clvr_jax.backends.remote.session import Conversation, Workers, cancelled
from clvr_jax.backends.remote.transcript import Transcript


class RemoteVlm:
    """The protocol's Vlm over chat completions; thread-safe.

    With `on_text` a reply is streamed and a cancel takes effect between two pieces. Without it a
    cancel only keeps a turn from being sent, or sent again: a reply that comes whole all the same
    is given as it is. A stream that breaks is begun again; its text goes on where it stopped, or
    the turn fails if the endpoint says something else the second time.

    Attributes:
      name: the model's name at the endpoint.
      context: see RemoteConfig.
    """

    def __init__(
        self,
        config: RemoteConfig,
        *,
        pause: Pause = threading.Event.wait,
        draw: Callable[[], float] = random.random,
    ):
        """Connect to nothing yet; the first turn does.

        Args:
          config: the endpoint.
          pause: how to wait between tries and for rate limits.
          draw: uniform in [0, 1), for the jitter of delays.
        """
        self.name: str = config.model
        self.context: int | None = config.context
        self._config = config
        self._endpoint = Endpoint(config, time.monotonic)
        self._retries = Retries(config, time.monotonic, pause, draw)
        self._limits = Limits(
            config.requests_per_minute, config.tokens_per_minute, time.monotonic, pause
        )
        self._ledger = Ledger(config)
        self._cache = DiskCache(config.cache) if config.cache else None
        self._transcript = Transcript(config.transcript) if config.transcript else None
        self._workers = Workers(config.max_in_flight, config.model, self._endpoint.close)

    def start(self) -> Conversation:
        """Return a new, empty conversation."""
        self._workers.check_open()
        return Conversation(self._workers, self._request, self._answer, self._config.jpeg_quality)

    def totals(self) -> Totals:
        """Return what was used so far, as a snapshot."""
        return self._ledger.totals()

    def load(self) -> dict[str, int]:
        """Return how many turns are being answered and how many wait."""
        return self._workers.load()

    def close(self) -> None:
        """Refuse new work and cancel what runs; may be called twice.

        Does not wait for replies that are under way without `on_text`.
        """
        self._workers.close()

    def _request(self, messages: tuple[Said, ...], options: Options) -> Request:
        if options.grammar is not None:
            raise InvalidRequest(
                "chat completions have no field for a Lark grammar; use Options(schema=...), or a "
                "local model"
            )
        request = Request(self._config.identity(), messages, options)
        _ = request.key  # a schema that is not JSON is refused now
        return request

    def _answer(
        self, request: Request, on_text: OnText | None, stop: threading.Event, submitted: float
    ) -> Reply:
        """Answer from the cache or the endpoint, and write down what happened.

        Raises:
          InvalidRequest, RemoteError, BudgetExceeded: there is no reply.
          OSError: there is one, but the transcript cannot be written.
        """
        options = request.options
        repeatable = options.temperature == 0 or options.seed is not None
        cache = self._cache if repeatable or self._config.cache_unseeded else None
        if cache and (stored := cache.load(request)):
            if on_text and stored.text:
                on_text(stored.text)
            self._ledger.count(cached=1)
            reply = free(stored, time.monotonic() - submitted)
        else:
            try:
                reply = self._generate(request, on_text, stop, submitted)
            except BaseException:
                self._ledger.count(failed=1)
                raise
            if cache and reply.finish != "cancelled":
                cache.store(request, reply)
        if self._transcript:
            self._transcript.append(request, reply)
        return reply

    def _generate(
        self, request: Request, on_text: OnText | None, stop: threading.Event, submitted: float
    ) -> Reply:
        prompt, completion = request.tokens, request.options.max_tokens
        delivery = Delivery(on_text) if on_text else None
        sent = submitted
        attempts = 0

        def attempt(number: int, seconds: float) -> Answer:
            nonlocal sent, attempts
            sent, attempts = time.monotonic(), number
            self._ledger.count(attempts=1)
            return self._try(request, seconds, stop, delivery)

        def admit() -> None:
            self._limits.admit(prompt + completion, stop)

        try:
            with self._ledger.reserve(prompt, completion, stop):
                answer = self._retries.run(attempt, admit, stop)
        except Cancelled:
            total = time.monotonic() - submitted
            text = delivery.text if delivery else ""
            queued = (sent if attempts else time.monotonic()) - submitted
            return cancelled(text, Times(queued=queued, total=total), attempts)
        self._ledger.count(replies=1)
        queued, total = sent - submitted, time.monotonic() - submitted
        first = total if answer.first is None else answer.first - submitted
        prefill = 0.0 if answer.first is None else first - queued
        return Reply(
            text=answer.text,
            finish=answer.finish,
            usage=answer.usage,
            times=Times(queued, prefill, first, decode=total - queued - prefill, total=total),
            seed=request.options.seed,
            tokens=answer.tokens,
            attempts=attempts,
        )

    def _try(
        self,
        request: Request,
        seconds: float,
        stop: threading.Event,
        delivery: Delivery | None,
    ) -> Answer:
        """Send once and settle what it used, whether it worked or not."""
        expected = request.tokens + request.options.max_tokens
        usage, estimated = None, False
        try:
            answer = self._endpoint.send(request, seconds, stop, delivery)
            usage, estimated = answer.usage, answer.estimated
            return answer
        except (BadReply, Refused) as error:
            usage, estimated = error.usage, error.estimated
            raise
        finally:
            if usage:
                self._ledger.spend(usage, estimated)
            self._limits.correct(expected, usage.prompt + usage.completion if usage else 0)
