"""What a vision-language model is to everything above it: sessions that are told and asked.

A session is a conversation that only grows. `submit` appends messages and asks for the assistant's
next turn; the reply becomes part of the session. What was said before is not sent, rendered or
computed again where the backend can avoid it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

Part = str | Image.Image
OnText = Callable[[str], None]


class InvalidRequest(ValueError):
    """A request that can never be answered: too long, an unreadable image, a broken schema."""


class TooLong(InvalidRequest):
    """A conversation that leaves no room for a reply in the model's context."""


class Overloaded(RuntimeError):
    """The backend has too much to do now; the same request may succeed later."""


class Closed(Overloaded):
    """The model or the session has been closed."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
      role: who speaks.
      parts: texts and pictures in order; pictures in user messages only.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The texts of this message, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures of this message, in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))


def system(*parts: str) -> Message:
    """Return a system message."""
    return Message("system", parts)


def user(*parts: Part) -> Message:
    """Return a user message of texts and pictures."""
    return Message("user", parts)


def assistant(*parts: str) -> Message:
    """Return an assistant message, for conversations that did not happen here."""
    return Message("assistant", parts)


@dataclasses.dataclass(frozen=True)
class Options:
    """How one turn is generated.

    Attributes:
      max_tokens: most tokens to generate.
      temperature: 0 is greedy.
      top_k: keep this many likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
      min_p: keep tokens with at least this share of the likeliest one's probability.
      repetition_penalty: divides positive logits of tokens that occur in the conversation so far,
        and multiplies negative ones; 1 is none.
      presence_penalty: subtracted once from logits of tokens that this turn has generated.
      frequency_penalty: subtracted as often as this turn has generated them.
      seed: of the sampling, any whole number of 64 bits; None draws one.
      stop: texts at whose first occurrence the turn ends; they are not part of the reply.
      schema: a JSON schema that the text must satisfy.
      grammar: a grammar in Lark syntax (llguidance's) that the text must follow.
      logprobs: None for none; n for the log-probability of every token and of its n best rivals.
    """

    max_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    logprobs: int | None = None

    def __post_init__(self):
        ranges = {
            "max_tokens": (1, None),
            "temperature": (0, None),
            "top_k": (0, None),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "logprobs": (0, MAX_LOGPROBS),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                wanted = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InvalidRequest(f"{name} is {value}; it must be {wanted}")
        if self.top_p == 0:
            raise InvalidRequest("top_p is 0; it must be above 0 (temperature=0 is greedy)")
        if not self.repetition_penalty > 0:
            raise InvalidRequest(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0"
            )
        if self.schema is not None and self.grammar is not None:
            raise InvalidRequest("both schema and grammar are given; give one of them")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop contains an empty text; it would end every turn at once")


MAX_LOGPROBS = 20
NO_TURN = "there is no turn to take back: none has been asked since the last one was taken back"


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One generated token and what the model thought of it, before any sampling option.

    Attributes:
      text: the token's text; bytes that are no text on their own appear as U+FFFD.
      raw: its bytes.
      logprob: its natural log-probability.
      rivals: (text, bytes, logprob) of the likeliest tokens, best first.
    """

    text: str
    raw: bytes
    logprob: float
    rivals: tuple[tuple[str, bytes, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of one turn.

    Attributes:
      prompt: tokens of the conversation before the reply, image tokens included.
      cached: those of them that did not have to be computed.
      completion: generated tokens.
      cost: price of the turn in US dollars; 0 for local models.
    """

    prompt: int
    cached: int
    completion: int
    cost: float = 0.0


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one turn.

    Attributes:
      queued: until its computation began.
      prefill: on reading the new messages.
      first: from submission to the first token.
      decode: on generating.
      constrain: of decode, on grammar masks on the host.
      total: from submission to the last token.
    """

    queued: float = 0.0
    prefill: float = 0.0
    first: float = 0.0
    decode: float = 0.0
    constrain: float = 0.0
    total: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """One assistant turn.

    Attributes:
      text: what was said, without stop texts and special tokens.
      finish: stop (by itself or at a stop text), length (max_tokens or the context), or cancelled.
      usage: tokens.
      times: seconds.
      seed: the seed that was used; None where the backend does not say.
      tokens: the generated tokens, where Options.logprobs asks for them.
      attempts: tries that it took (remote backends).
    """

    text: str
    finish: Literal["stop", "length", "cancelled"]
    usage: Usage
    times: Times = Times()
    seed: int | None = None
    tokens: tuple[TokenLogprob, ...] = ()
    attempts: int = 1


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probability of a given continuation of a conversation.

    Attributes:
      logprob: natural log-probability of the whole continuation.
      tokens: of each of its tokens.
    """

    logprob: float
    tokens: tuple[float, ...]


@runtime_checkable
class Pending(Protocol):
    """A turn that is being generated."""

    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the reply.

        Raises:
          InvalidRequest: the request can never be answered.
          Overloaded: there was too much to do, or a remote endpoint could not be had.
          RuntimeError: something broke; a remote backend's budget is spent.
          TimeoutError: it is not there after `timeout` seconds; it goes on being generated.
        """
        ...

    def cancel(self) -> None:
        """Stop generating soon.

        The reply, and the session, hold what was generated; its finish is "cancelled".
        """
        ...

    def add_done_callback(self, call: Callable[["Pending"], None]) -> None:
        """Call `call` with this, in any thread, once the reply or its error is there."""
        ...


@runtime_checkable
class Session(Protocol):
    """A conversation with one model; one turn at a time."""

    def submit(
        self,
        messages: Sequence[Message],
        options: Options = Options(),
        on_text: OnText | None = None,
    ) -> Pending:
        """Append messages and begin to generate the assistant's turn.

        May take as long as preparing the pictures takes. A failed turn leaves the session as it
        was before. A reply's done callback may submit the next turn.

        Args:
          messages: what is new. Empty continues the last assistant turn where it stopped (local
            models only).
          options: how to generate.
          on_text: called in some thread with each new piece of the reply; the pieces join to the
            reply's text. It must return quickly.

        Raises:
          InvalidRequest: the request can never be answered.
          Overloaded: the backend cannot take it now, or this session's last turn is not done.
        """
        ...

    def ask(
        self,
        messages: Sequence[Message],
        options: Options = Options(),
        on_text: OnText | None = None,
    ) -> Reply:
        """Submit and wait; see `submit`."""
        return self.submit(messages, options, on_text).result()

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[Score]:
        """Return the log-probability of each text as the assistant's next turn.

        The session stays as it was.

        Raises:
          InvalidRequest, Overloaded: see `submit`; also where the backend cannot score.
        """
        ...

    def take_back(self) -> None:
        """Forget the last turn, its messages and its reply, as if it had not been asked.

        After a turn that failed there is nothing to forget, and the session stays as it is.

        Raises:
          InvalidRequest: no turn has been asked, or it has been taken back already.
          Overloaded: the last turn is not done.
        """
        ...

    def close(self) -> None:
        """Free what the session holds."""
        ...


@runtime_checkable
class Vlm(Protocol):
    """A vision-language model.

    Attributes:
      name: what it is called, e.g. in transcripts and by the server.
      context: most tokens that a conversation may hold, None where the backend does not say.
    """

    name: str
    context: int | None

    def start(self) -> Session:
        """Return a new, empty conversation."""
        ...

    def load(self) -> dict[str, int]:
        """Return at least how many turns are "running" and "waiting"."""
        ...

    def close(self) -> None:
        """Refuse new work, cancel what runs, free memory; may be called twice."""
        ...
