"""Conversations to token ids and patches, on the host, turn by turn.

transformers' tokenizer, chat template and PIL image processor do what they can do; nothing here
needs torch. What they lack is added: a turn that follows others is rendered and tokenised on its
own, so that what was said before, and the ids that were sampled, are never touched again.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clvr_jax.models.qwen3_vl.config import VisionConfig
from clvr_jax.models.qwen3_vl.vision import Grid
from clvr_jax.typing import UInt8

IMAGE = "<|image_pad|>"
VIDEO = "<|video_pad|>"
_MARK = "\u241e"  # stands for an assistant turn whose ids exist already
_STRANGE = (VIDEO, IMAGE)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A resized image as the vision tower reads it.

    Attributes:
      patches: rows of (channel, y, x) pixels, cell by cell, not normalised.
      grid: rows and columns in patches.
    """

    patches: UInt8[np.ndarray, "p pixels"]
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Turn:
    """New tokens of a conversation.

    Attributes:
      ids: token ids, every image as many times its token as it has cells.
      pictures: (index of its first token, image) of every image among them, in order.
    """

    ids: np.ndarray
    pictures: tuple[tuple[int, Picture], ...] = ()


class Processor:
    """What turns messages into tokens for one checkpoint.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      template: its chat template (Jinja).
      images: transformers' PIL image processor; None for text-only models.
      template_options: further names the template knows, e.g. {"enable_thinking": False}.

    Attributes:
      stops: token ids that end an assistant turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        images: Any = None,
        stops: Sequence[int] = (),
        template_options: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.template, self.images = tokenizer, template, images
        self.stops = tuple(stops) or (tokenizer.eos_token_id,)
        self.options = dict(template_options or {})
        self._image = tokenizer.convert_tokens_to_ids(IMAGE) if images is not None else None

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = True) -> str:
        """Return the text of a conversation by the checkpoint's template.

        Args:
          messages: {"role": ..., "parts": [text or image, ...]}.
          prompt: whether the beginning of an assistant turn follows.

        Raises:
          ValueError: the template refuses the messages.
        """
        given = [
            {"role": message["role"], "content": self._content(message["parts"])}
            for message in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(
                given,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.options,
            )
        except Exception as error:  # jinja2's own classes; the text is the template's
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def first(self, messages: Sequence[Mapping[str, Any]]) -> Turn:
        """Return a whole conversation up to the assistant's turn."""
        return self._turn(self.render(messages), messages)

    def later(self, messages: Sequence[Mapping[str, Any]], ended: bool) -> Turn:
        """Return what follows an assistant turn whose ids the caller holds.

        Args:
          messages: the new messages.
          ended: whether those ids end with the token that closes a turn.

        Raises:
          ValueError: the template does not keep earlier turns apart from later ones.
        """
        text = self._after(messages)
        close = self.tokenizer.decode([self.close])
        if ended and text.startswith(close):
            text = text[len(close) :]
        return self._turn(text, messages)

    @functools.cached_property
    def close(self) -> int:
        """The token that closes an assistant turn: the stop that the template writes behind one.

        A tokenizer's own end may be another, e.g. <|endoftext|> of a base model.
        """
        try:
            text = self._after([])
        except ValueError:  # said again, with its messages, when a turn is rendered
            return self.stops[0]
        names = {stop: self.tokenizer.decode([stop]) for stop in self.stops}
        written = (stop for stop, name in names.items() if name and text.startswith(name))
        return next(written, self.stops[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, special tokens left out."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def levels(self) -> np.ndarray | None:
        """Return (channel, 256) float32: every grey level as transformers normalises it."""
        if self.images is None:
            return None
        grey = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[:, None]
        scaled = self.images.rescale(grey, self.images.rescale_factor)
        mean, std = self.images.image_mean, self.images.image_std
        return np.asarray(self.images.normalize(scaled, mean, std), np.float32)[:, 0]

    def picture(self, image: Image.Image) -> Picture:
        """Resize an image as the checkpoint's preprocessor_config.json says, and cut it.

        Raises:
          ValueError: the model reads no images, or the image is broken or too long for its width.
        """
        if self.images is None:
            raise ValueError("this model reads text only")
        try:
            image = ImageOps.exif_transpose(image)  # reads the file; transformers turns it as well
        except (OSError, SyntaxError) as error:  # Pillow's name for a broken PNG
            raise ValueError(f"an image cannot be read: {error}") from error
        if image.mode.startswith("I;16"):  # Pillow would cut at 255, which is nearly all white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if min(image.size) < 1 or max(image.size) > 200 * min(image.size):
            raise ValueError(
                f"an image of {image.size[0]} x {image.size[1]} pixels: the longer side may be at "
                "most 200 times the shorter"
            )
        # normalisation waits for the device: uint8 is a quarter of the bytes
        out = self.images(image, do_rescale=False, do_normalize=False)
        rows, cols = (int(n) for n in out["image_grid_thw"][0][1:])
        patches = np.asarray(out["pixel_values"])
        time = self.images.temporal_patch_size
        stills = patches.reshape(rows * cols, 3, time, -1)[:, :, 0]
        return Picture(stills.reshape(rows * cols, -1).astype(np.uint8), (rows, cols))

    def _after(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes after an assistant turn's text."""
        mark = _MARK
        while any(mark in part for m in messages for part in m["parts"] if isinstance(part, str)):
            mark += _MARK
        before = [{"role": "user", "parts": ["."]}, {"role": "assistant", "parts": [mark]}]
        whole = self.render([*before, *messages])
        if whole.count(mark) != 1:
            raise ValueError("the chat template does not keep an earlier assistant turn as it was")
        return whole.split(mark)[1]

    def _content(self, parts: Sequence[Any]) -> Any:
        if self.images is None:  # Qwen3's text template renders lists as nothing
            if any(not isinstance(part, str) for part in parts):
                raise ValueError("this model reads text only; a message holds an image")
            return "".join(parts)
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]

    def _turn(self, text: str, messages: Sequence[Mapping[str, Any]]) -> Turn:
        images = [part for m in messages for part in m["parts"] if not isinstance(part, str)]
        texts = [part for m in messages for part in m["parts"] if isinstance(part, str)]
        if any(token in text for token in _STRANGE for text in texts):
            raise ValueError(f"a text holds {IMAGE} or {VIDEO}; give pictures as pictures")
        for m in messages:
            if m["role"] == "system" and not all(_within(part, text) for part in m["parts"]):
                raise ValueError(
                    "the chat template does not show a system message where it stands; most show "
                    "it only as a conversation's first message"
                )
        if images and text.count(IMAGE) != len(images):
            raise ValueError(
                f"the chat template shows {text.count(IMAGE)} of {len(images)} images; pictures "
                "belong in user messages"
            )
        pictures = [self.picture(image) for image in images]
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        if not pictures:
            return Turn(ids)
        times = np.ones(len(ids), np.int64)
        times[ids == self._image] = [len(p.patches) // self.images.merge_size**2 for p in pictures]
        starts = (np.cumsum(times) - times)[ids == self._image]
        return Turn(np.repeat(ids, times), tuple(zip(starts.tolist(), pictures)))


def _within(part: Any, text: str) -> bool:
    return not isinstance(part, str) or part.strip() in text


def load(folder: str | Path, vision: VisionConfig | None, **template_options: Any) -> Processor:
    """Return the processor whose files lie beside a checkpoint.

    Args:
      folder: with tokenizer, template, and preprocessor_config.json for models that see.
      vision: sizes of the vision tower, None for text-only models.
      template_options: further names the template knows.

    Raises:
      ValueError: a file is missing, or disagrees with the model's sizes.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers reads: {error}") from error
    template = _template(folder) or tokenizer.chat_template
    if not template:
        raise ValueError(
            f"{folder} has no chat template: neither chat_template.jinja nor chat_template.json, "
            "and none in tokenizer_config.json"
        )
    images = _image_processor(folder, vision) if vision is not None else None
    return Processor(tokenizer, template, images, _stops(folder, tokenizer), template_options)


def _template(folder: Path) -> str | None:
    """The processor's own template, which differs from the tokenizer's in older checkpoints."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").exists():
        return json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return None


def _image_processor(folder: Path, vision: VisionConfig) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    file = folder / "preprocessor_config.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist; it says how images are resized")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    if not (images.do_resize and images.do_rescale and images.do_normalize) or (
        abs(images.rescale_factor * 255 - 1) > 1e-9
    ):
        raise ValueError(
            f"{file}: pictures must be resized, divided by 255 and normalised; it says do_resize "
            f"{images.do_resize}, do_rescale {images.do_rescale}, rescale_factor "
            f"{images.rescale_factor}, do_normalize {images.do_normalize}"
        )
    for name, ours in (
        ("patch_size", vision.patch),
        ("temporal_patch_size", vision.temporal_patch),
        ("merge_size", vision.merge),
    ):
        if getattr(images, name) != ours:
            raise ValueError(f"{file}: {name} is {getattr(images, name)}, config.json says {ours}")
    return images


def _stops(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a turn: the tokenizer's first, then those of generation_config.json."""
    stops = [tokenizer.eos_token_id]
    file = folder / "generation_config.json"
    if file.exists():
        named = json.loads(file.read_text()).get("eos_token_id")
        stops += named if isinstance(named, list) else [named]
    stops = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    if not stops:
        raise ValueError(f"{folder}: neither the tokenizer nor {file.name} names an end of a turn")
    return stops
