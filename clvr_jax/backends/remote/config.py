"""Where a remote model is, how hard to try, what to spend and what to keep."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

# extra_body is merged over the request, so these names would silently override Options
RESERVED = {
    *("model", "messages", "n", "stream", "stream_options", "response_format", "seed", "stop"),
    *("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
}
POSITIVE = (
    *("context", "timeout", "total_timeout", "max_attempts", "first_delay", "max_delay"),
    *("max_in_flight", "requests_per_minute", "tokens_per_minute"),
)
MONEY = ("price_input", "price_cached_input", "price_output", "budget_cost", "budget_tokens")


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
    """A model behind an OpenAI-compatible chat completions endpoint.

    Attributes:
      model: its name at the endpoint.
      base_url: of the API, up to and with the version, e.g. http://localhost:8000/v1.
      key_env: name of the environment variable that holds the API key; None for endpoints that
        want none ("none" is sent). The key itself is kept in the HTTP client only: it reaches no
        config, cache, transcript, error or log.
      context: most tokens of a conversation; None if not known.
      timeout: seconds without a byte from the endpoint after which a try has failed.
      total_timeout: seconds for all tries of one turn with the waits between them, from when the
        rate limits let the first one go.
      max_attempts: most tries of one turn.
      first_delay: seconds before the second try; doubles with each further one. Between half and
        all of it is waited, at random, so that many callers do not return at once.
      max_delay: longest of these delays. The endpoint's Retry-After may ask for more.
      max_in_flight: most turns that are worked on at the same time; more wait their turn.
      requests_per_minute: rate limit of tries; None for none. A tenth of a minute's worth (at
        least one) may go at once.
      tokens_per_minute: rate limit of prompt and completion tokens; None for none. Before the
        reply, tokens are estimated (`Request.tokens`), with max_tokens for the completion.
      max_tokens_field: what the endpoint calls Options.max_tokens.
      sampling_extensions: the endpoint knows top_k, min_p and repetition_penalty (vLLM, SGLang,
        llama.cpp) and gets them with every request, so that defaults of its own (vLLM takes them
        from the model's generation_config.json) cannot replace those of Options. False sends
        each of them only where Options asks for more than nothing; OpenAI's own API refuses them.
      extra_body: further fields of every request, e.g. {"chat_template_kwargs": {...}}. They are
        part of the cache key and of transcripts: no secrets here.
      jpeg_quality: send pictures as JPEG of this quality (transparent pixels on white); None
        sends PNG, which loses nothing.
      cache: folder for replies; None for none. Replies that were sampled without a seed are not
        kept, since a repeated sample should differ.
      cache_unseeded: keep those too.
      transcript: JSON Lines file to which every exchange is appended; None for none.
      price_input: US dollars per million prompt tokens.
      price_cached_input: the same for prompt tokens that the endpoint had cached; None if equal.
      price_output: US dollars per million generated tokens.
      budget_cost: US dollars that may be spent; None for no limit.
      budget_tokens: tokens, prompt and completion, that may be used; None for no limit.

    Raises:
      ValueError: a value is out of range, or the key's environment variable is not set.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_env: str | None = "OPENAI_API_KEY"
    context: int | None = None
    timeout: float = 120.0
    total_timeout: float = 600.0
    max_attempts: int = 6
    first_delay: float = 0.5
    max_delay: float = 60.0
    max_in_flight: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    sampling_extensions: bool = False
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    jpeg_quality: int | None = None
    cache: str | Path | None = None
    cache_unseeded: bool = False
    transcript: str | Path | None = None
    price_input: float = 0.0
    price_cached_input: float | None = None
    price_output: float = 0.0
    budget_cost: float | None = None
    budget_tokens: int | None = None

    def __post_init__(self):
        if not self.model:
            raise ValueError("model is empty; give the model's name at the endpoint")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url is {self.base_url!r}; expected http(s)://host[:port]/v1")
        if url.username or url.password or url.query:
            # the URL is part of cache keys, transcripts and errors, so it is not shown here either
            raise ValueError(
                f"base_url for {url.hostname} holds a user, password or query; a key belongs into "
                "the environment variable that key_env names"
            )
        self._check_numbers()
        if self.max_tokens_field not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(
                f"max_tokens_field is {self.max_tokens_field!r}; expected max_tokens or "
                "max_completion_tokens"
            )
        if taken := sorted(set(self.extra_body) & RESERVED):
            raise ValueError(f"extra_body sets {', '.join(taken)}; Options and this config do that")
        if self.budget_cost is not None and not (self.price_input or self.price_output):
            raise ValueError(
                "budget_cost is set, but the prices are 0, so it would never be reached; set "
                "price_input and price_output, or use budget_tokens"
            )
        self.api_key()

    def _check_numbers(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name in MONEY:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}; it must be between 1 and 100")

    def api_key(self) -> str:
        """Return the key from the environment, "none" where the endpoint wants none.

        Raises:
          ValueError: the variable is not set or empty.
        """
        if self.key_env is None:
            return "none"
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise ValueError(
                f"the environment variable {self.key_env} with the API key for {self.base_url} is "
                f"not set; `export {self.key_env}=...` before the start, or set key_env to the "
                "variable that holds it, or to None if the endpoint wants no key"
            )
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{self.key_env} holds characters that no HTTP header can carry")
        return key

    def identity(self) -> dict[str, Any]:
        """Return what of this config decides a reply; cache keys and transcripts hold it."""
        return {
            "model": self.model,
            "base_url": self.base_url.rstrip("/"),
            "images": "png" if self.jpeg_quality is None else f"jpeg {self.jpeg_quality}",
            "sampling_extensions": self.sampling_extensions,
            "extra_body": dict(self.extra_body),
        }

    def cost(self, prompt: int, cached: int, completion: int) -> float:
        """Return the price in US dollars of these tokens; `cached` are part of `prompt`."""
        cached_price = self.price_input
        if self.price_cached_input is not None:
            cached_price = self.price_cached_input
        dollars = (prompt - cached) * self.price_input + cached * cached_price
        return (dollars + completion * self.price_output) / 1e6
