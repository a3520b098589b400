"""A conversation as it is sent, and as it is remembered: the same request has the same key."""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from clvr_jax.backends.protocol import InvalidRequest, Message, Options
from clvr_jax.backends.remote.config import RemoteConfig

_DEEP = ("I", "F")  # more than 8 bits; turning them into RGB would clip without a word


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture that no longer changes.

    Attributes:
      image: its pixels, RGB or RGBA, without metadata.
      digest: sha256 of mode, size and pixels, whatever file the picture came from.
      jpeg_quality: see RemoteConfig.
    """

    image: Image.Image
    digest: str
    jpeg_quality: int | None = None

    @functools.cached_property
    def png(self) -> bytes:
        """The pixels as a PNG file."""
        file = io.BytesIO()
        self.image.save(file, format="PNG")
        return file.getvalue()

    @functools.cached_property
    def url(self) -> str:
        """The data URL that is sent."""
        kind, data = "png", b""
        if self.jpeg_quality is None:
            data = self.png
        else:
            opaque = self.image
            if opaque.mode == "RGBA":
                white = Image.new("RGBA", opaque.size, "white")
                opaque = Image.alpha_composite(white, opaque).convert("RGB")
            file = io.BytesIO()
            opaque.save(file, format="JPEG", quality=self.jpeg_quality)
            kind, data = "jpeg", file.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def picture(image: Image.Image, jpeg_quality: int | None = None) -> Picture:
    """Return a copy of `image` fit for sending.

    Raises:
      InvalidRequest: it cannot be read, is empty, or has more than 8 bits per channel.
    """
    if image.mode.split(";")[0] in _DEEP or 0 in image.size:
        raise InvalidRequest(
            f"an image of mode {image.mode} and size {image.size}; expected at least one pixel and "
            "8 bits per channel (RGB, RGBA, L, P)"
        )
    try:
        mode = "RGBA" if image.has_transparency_data else "RGB"
        copy = image.copy() if image.mode == mode else image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequest(f"an image cannot be read: {error}") from error
    copy.info = {}  # colour profiles and texts would be sent with the pixels
    head = f"{mode} {copy.width}x{copy.height} ".encode("ascii")
    return Picture(copy, hashlib.sha256(head + copy.tobytes()).hexdigest(), jpeg_quality)


@dataclasses.dataclass(frozen=True)
class Said:
    """A message of a conversation, ready for sending.

    Attributes:
      role: who speaks.
      parts: texts and pictures in order.
    """

    role: str
    parts: tuple[str | Picture, ...]

    def record(self) -> dict[str, Any]:
        """Return this message for keys and transcripts, pictures by their digest."""
        parts = [
            {"text": part}
            if isinstance(part, str)
            else {"image": part.digest, "size": list(part.image.size)}
            for part in self.parts
        ]
        return {"role": self.role, "parts": parts}

    def wire(self) -> dict[str, Any]:
        """Return this message as chat completions want it."""
        if all(isinstance(part, str) for part in self.parts):
            # not every endpoint takes lists of parts where a text does
            return {"role": self.role, "content": "".join(map(str, self.parts))}
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": part.url}}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


def prepare(message: Message, jpeg_quality: int | None = None) -> Said:
    """Return a message ready for sending.

    Raises:
      InvalidRequest: it is empty, holds an unreadable picture, or pictures that are not a user's.
    """
    if not message.parts:
        raise InvalidRequest(f"a {message.role} message without parts")
    if message.images and message.role != "user":
        raise InvalidRequest(f"a picture in a {message.role} message; only users show pictures")
    parts = tuple(p if isinstance(p, str) else picture(p, jpeg_quality) for p in message.parts)
    return Said(message.role, parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One turn that is asked for.

    Attributes:
      endpoint: `RemoteConfig.identity`.
      messages: the whole conversation.
      options: how to generate.
    """

    endpoint: Mapping[str, Any]
    messages: tuple[Said, ...]
    options: Options

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """All that decides the reply, as JSON has it."""
        record = {
            "endpoint": dict(self.endpoint),
            "messages": [message.record() for message in self.messages],
            "options": dataclasses.asdict(self.options),
        }
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
            # tuples become lists, as they come back from files; lone surrogates cannot be sent
            return json.loads(text.encode())
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"the request cannot be written as JSON: {error}") from error

    @functools.cached_property
    def key(self) -> str:
        """The sha256 of `record`."""
        return key_of(self.record)

    @property
    def pictures(self) -> list[Picture]:
        """All pictures of the conversation, in order."""
        return [part for m in self.messages for part in m.parts if isinstance(part, Picture)]

    @property
    def tokens(self) -> int:
        """Roughly how many tokens the conversation has: a word piece per three characters of text
        (four is usual for English, fewer elsewhere), one per 32 x 32 pixels (Qwen3-VL's grid)."""
        texts = [part for m in self.messages for part in m.parts if isinstance(part, str)]
        sizes = [picture.image.size for picture in self.pictures]
        patches = sum(math.ceil(width / 32) * math.ceil(height / 32) for width, height in sizes)
        return sum(map(len, texts)) // 3 + 4 * len(self.messages) + patches


def key_of(record: Mapping[str, Any]) -> str:
    """Return the sha256 of a request's record."""
    # keys stay in order: that of a schema's properties is the order in which they are generated
    text = json.dumps(record, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def body(request: Request, config: RemoteConfig) -> dict[str, Any]:
    """Return the arguments of `client.chat.completions.create`, without `stream`."""
    o = request.options
    fields: dict[str, Any] = {
        "model": config.model,
        "messages": [message.wire() for message in request.messages],
        "temperature": o.temperature,  # always: endpoints' defaults differ
        "top_p": o.top_p,
        "presence_penalty": o.presence_penalty,
        "frequency_penalty": o.frequency_penalty,
        config.max_tokens_field: o.max_tokens,
    }
    if o.seed is not None:
        fields["seed"] = o.seed
    if o.stop:
        fields["stop"] = list(o.stop)
    if o.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": o.logprobs}
    if o.schema is not None:
        schema = {"name": "reply", "schema": dict(o.schema), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    extra = dict(config.extra_body)
    # -1 is how vLLM, SGLang and llama.cpp spell "all tokens"; SGLang refuses 0
    extensions = {
        "top_k": (o.top_k or -1, o.top_k != 0),
        "min_p": (o.min_p, o.min_p != 0),
        "repetition_penalty": (o.repetition_penalty, o.repetition_penalty != 1),
    }
    for name, (value, asked_for) in extensions.items():
        if asked_for or config.sampling_extensions:
            extra[name] = value
    if extra:
        fields["extra_body"] = extra
    return fields
