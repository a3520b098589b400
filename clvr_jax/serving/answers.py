"""Replies as OpenAI's clients read them, and what we add: `timings` and each choice's `seed`."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from clvr_jax import __version__
from clvr_jax.backends.protocol import Reply, TokenLogprob

_LEAST_LOGPROB = -9999.0  # OpenAI's number for impossible; JSON has no infinity


class Answer:
    """The frame of one answer: its id, its time and its model, in every chunk alike."""

    def __init__(self, model: str) -> None:
        self._frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"clvr_jax-{__version__}",
        }

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed, one choice for each reply."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": logprobs_of(reply.tokens),
                "finish_reason": reply.finish,
                "seed": reply.seed,
            }
            for i, reply in enumerate(replies)
        ]
        return {
            **self._frame,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(replies),
            "timings": timings_of(replies),
        }

    def chunk(self, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        """Return an event that carries a piece of the reply, and fields of its choice."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        return {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, reply: Reply) -> dict[str, Any]:
        """Return the event that ends the reply; log-probabilities come all at once with it."""
        logprobs = logprobs_of(reply.tokens)
        event = self.chunk({}, finish_reason=reply.finish, logprobs=logprobs, seed=reply.seed)
        return {**event, "timings": timings_of([reply])}

    def usage(self, reply: Reply) -> dict[str, Any]:
        """Return the event after the last that counts tokens."""
        return {
            **self._frame,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage_of([reply]),
        }


def usage_of(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return tokens; several replies to one prompt count the prompt once."""
    prompt = replies[0].usage.prompt
    completion = sum(reply.usage.completion for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": replies[0].usage.cached},
    }


def timings_of(replies: Sequence[Reply]) -> dict[str, float]:
    """Return the seconds of `Times`, of several replies the longest of each."""
    names = [field.name for field in dataclasses.fields(replies[0].times)]
    return {f"{name}_s": max(getattr(r.times, name) for r in replies) for name in names}


def logprobs_of(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Return OpenAI's structure of log-probabilities, None where none were asked for."""
    if not tokens:
        return None
    content = []
    for token in tokens:
        rivals = [_token(*rival) for rival in token.rivals]
        content.append({**_token(token.text, token.raw, token.logprob), "top_logprobs": rivals})
    return {"content": content, "refusal": None}


def _token(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(raw)}
