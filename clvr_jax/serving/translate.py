"""From the wire to the backend's words: messages with pictures, and options."""

from collections.abc import Sequence

from clvr_jax.backends.protocol import Message, Options, Part
from clvr_jax.serving import images
from clvr_jax.serving.errors import invalid
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.wire import ChatMessage, ChatRequest

_ROLES = {"developer": "system"}


def messages_of(asked: Sequence[ChatMessage], limits: Limits) -> tuple[Message, ...]:
    """Return the messages with their pictures decoded; takes as long as decoding takes.

    Raises:
      ApiError: a picture is wrong, in the wrong place, or one too many.
    """
    found: list[Message] = []
    pictures = 0
    for i, message in enumerate(asked):
        parts: list[Part] = []
        for j, part in enumerate(message.content):
            if part.image_url is None:
                parts.append(part.text or "")
                continue
            path = f"messages[{i}].content[{j}].image_url"
            pictures += 1
            if message.role != "user":
                raise invalid(f"{path}: only user messages hold pictures", path, "invalid_value")
            if pictures > limits.max_images:
                text = f"{path} is picture {pictures}; at most {limits.max_images} are taken"
                raise invalid(text, path, "too_many_images")
            parts.append(images.decode(part.image_url.url, f"{path}.url", limits.max_pixels))
        found.append(Message(_ROLES.get(message.role, message.role), tuple(parts)))
    return tuple(found)


def options_of(asked: ChatRequest, limits: Limits, choice: int = 0) -> Options:
    """Return how to generate one of the choices; choice i has the request's seed plus i.

    Raises:
      InvalidRequest: the options exclude each other.
    """
    wanted = asked.response_format
    schema = None
    if wanted is not None and wanted.type == "json_object":
        schema = {"type": "object"}
    elif wanted is not None and wanted.json_schema is not None:
        schema = wanted.json_schema.schema_
    return Options(
        max_tokens=asked.max_completion_tokens or asked.max_tokens or limits.max_tokens_default,
        temperature=_or(asked.temperature, 1.0),
        top_k=max(asked.top_k or 0, 0),  # elsewhere -1 keeps all tokens
        top_p=_or(asked.top_p, 1.0),
        min_p=_or(asked.min_p, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, 1.0),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        seed=None if asked.seed is None else asked.seed + choice,
        stop=tuple(asked.stop or ()),
        schema=schema,
        grammar=asked.guided_grammar,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
