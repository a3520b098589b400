"""One try: a request to the chat completions endpoint and the reading of what comes back."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, Literal

import openai

from clvr_jax.backends.protocol import InvalidRequest, OnText, TokenLogprob, Usage
from clvr_jax.backends.remote.config import RemoteConfig
from clvr_jax.backends.remote.limits import Clock
from clvr_jax.backends.remote.request import Request, body
from clvr_jax.backends.remote.retry import BadReply, Diverged, reason_of

Finish = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one try brought.

    Attributes:
      text, finish, usage, tokens: as in a Reply.
      estimated: whether the usage is an estimate.
      first: clock at the first piece of text; None if it was not streamed.
    """

    text: str
    finish: Finish
    usage: Usage
    tokens: tuple[TokenLogprob, ...] = ()
    estimated: bool = False
    first: float | None = None


class Delivery:
    """Passes pieces of text on, each once, even if the stream has to be begun again."""

    def __init__(self, on_text: OnText):
        self._on_text = on_text
        self._position = 0
        self.text = ""

    def restart(self) -> None:
        """A stream begins; what was passed on before is expected to come again first."""
        self._position = 0

    def feed(self, piece: str) -> bool:
        """Pass on what is new of `piece`; False if it is not what was passed on before."""
        known = self.text[self._position : self._position + len(piece)]
        self._position += len(piece)
        if not piece.startswith(known):
            return False
        if new := piece[len(known) :]:
            self.text += new
            self._on_text(new)
        return True

    def end(self) -> bool:
        """The stream has ended; return whether all that was passed on before has come again."""
        return self._position >= len(self.text)


class Endpoint:
    """The HTTP client and its view of requests and replies; thread-safe."""

    def __init__(self, config: RemoteConfig, clock: Clock):
        self._config = config
        self._clock = clock
        # retries are counted and bounded by ours, so the client makes none
        self._client = openai.OpenAI(
            api_key=config.api_key(), base_url=config.base_url, max_retries=0
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def send(
        self, request: Request, seconds: float, stop: threading.Event, delivery: Delivery | None
    ) -> Answer:
        """Send `request` once.

        Args:
          request: what to send.
          seconds: after which it has failed.
          stop: ends a streamed reply early, as "cancelled".
          delivery: where text goes as it comes; None waits for the whole.

        Raises:
          openai.APIError, BadReply, Diverged: the try failed.
          InvalidRequest: the endpoint refused to say something, or cannot do what was asked.
        """
        fields = body(request, self._config)
        fields["timeout"] = min(self._config.timeout, seconds)
        if delivery is None:
            answer = self._whole(fields, request)
        else:
            delivery.restart()
            answer = self._streamed(fields, request, self._clock() + seconds, stop, delivery)
        if request.options.logprobs is not None and answer.text and not answer.tokens:
            raise Refused(
                f"{self._config.base_url} gave no log-probabilities for {self._config.model}",
                answer.usage,
                answer.estimated,
            )
        return answer

    def _whole(self, fields: dict[str, Any], request: Request) -> Answer:
        completion = self._create(fields)
        if isinstance(completion, str):  # the client's way to say that it is not JSON
            raise BadReply(f"not a chat completion: {completion[:200]!r}")
        with _reading():
            usage = self._usage(completion.usage)
        with _reading(usage):
            choice = completion.choices[0]
            text, refusal = choice.message.content or "", choice.message.refusal
            finish = self._finish(choice.finish_reason, text, refusal, usage)
            # few endpoints tell no usage; a budget needs some number all the same
            billed = usage or self._priced(request.tokens, 0, len(text) // 4)
            return Answer(text, finish, billed, _tokens(choice), usage is None)

    def _streamed(
        self,
        fields: dict[str, Any],
        request: Request,
        deadline: float,
        stop: threading.Event,
        delivery: Delivery,
    ) -> Answer:
        pieces: list[str] = []
        tokens: list[TokenLogprob] = []
        refusal, finish, usage, first = "", None, None, None

        def billed() -> Usage:
            # endpoints tell the usage last; until then a piece is about a token
            return usage or self._priced(request.tokens, 0, max(len(pieces), len(tokens)))

        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        with contextlib.closing(self._create(fields)) as chunks:
            iterator = iter(chunks)
            while not stop.is_set():
                with _reading(billed() if pieces else None, estimated=True):
                    try:
                        chunk = next(iterator, None)
                    except openai.APIConnectionError as error:
                        if finish is not None:
                            break  # only the usage is missing
                        why = f"the stream broke: {reason_of(error)}"
                        raise BadReply(why, billed(), usage is None) from None
                    if chunk is None:
                        break
                    usage = self._usage(chunk.usage) or usage
                    piece = ""
                    for choice in chunk.choices[:1]:
                        piece = choice.delta.content or ""
                        refusal += choice.delta.refusal or ""
                        finish = choice.finish_reason or finish
                        tokens += _tokens(choice)
                if piece:
                    first = self._clock() if first is None else first
                    pieces.append(piece)
                    if not delivery.feed(piece):
                        raise Diverged(len(delivery.text), billed(), usage is None)
                if self._clock() > deadline and finish is None:
                    raise BadReply("still streaming after total_timeout", billed(), usage is None)
        text = "".join(pieces)
        if stop.is_set() and finish is None:
            known = delivery.text if len(delivery.text) > len(text) else text
            return Answer(known, "cancelled", billed(), tuple(tokens), usage is None, first)
        if finish is None:  # a connection that closes early looks like an end to the client
            raise BadReply("the stream ended before the reply did", billed(), usage is None)
        if not delivery.end():
            raise Diverged(len(delivery.text), billed(), usage is None)
        said = self._finish(finish, text, refusal, usage)
        return Answer(text, said, billed(), tuple(tokens), usage is None, first)

    def _create(self, fields: dict[str, Any]) -> Any:
        try:
            return self._client.chat.completions.create(**fields)
        except ValueError as error:  # a body that calls itself JSON
            raise BadReply(f"not a chat completion: {error}") from None

    def _finish(
        self, reason: str | None, text: str, refusal: str | None, usage: Usage | None
    ) -> Finish:
        if reason == "content_filter" or (refusal and not text):
            raise Refused(
                f"{self._config.model} at {self._config.base_url} refused to answer "
                f"(finish_reason {reason}): {refusal or text or 'no reason given'}",
                usage,
            )
        if reason in ("abort", "error"):  # vLLM, SGLang: the server dropped it
            raise BadReply(f"the endpoint gave up (finish_reason {reason})", usage)
        return "length" if reason == "length" else "stop"

    def _usage(self, usage: Any) -> Usage | None:
        if usage is None:
            return None
        details = usage.prompt_tokens_details
        cached = (details and details.cached_tokens) or 0
        return self._priced(int(usage.prompt_tokens), int(cached), int(usage.completion_tokens))

    def _priced(self, prompt: int, cached: int, completion: int) -> Usage:
        return Usage(prompt, cached, completion, self._config.cost(prompt, cached, completion))


class Refused(InvalidRequest):
    """The endpoint answered, but not what was asked; `usage` is what it billed."""

    def __init__(self, message: str, usage: Usage | None, estimated: bool = False):
        super().__init__(message)
        self.usage = usage
        self.estimated = estimated


@contextlib.contextmanager
def _reading(usage: Usage | None = None, estimated: bool = False) -> Iterator[None]:
    """Turn what broken JSON and missing fields raise into BadReply."""
    try:
        yield
    except InvalidRequest:
        raise
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        what = f"not a chat completion: {type(error).__name__}: {error}"
        raise BadReply(what, usage, estimated) from None


def _tokens(choice: Any) -> tuple[TokenLogprob, ...]:
    content = choice.logprobs.content if choice.logprobs else None
    return tuple(
        TokenLogprob(*_text(token), token.logprob, tuple((*_text(r), r.logprob) for r in rivals))
        for token in content or ()
        for rivals in [token.top_logprobs or ()]
    )


def _text(token: Any) -> tuple[str, bytes]:
    if token.bytes is None:  # endpoints that do not tell them
        return token.token, token.token.encode()
    raw = bytes(token.bytes)
    return raw.decode(errors="replace"), raw
