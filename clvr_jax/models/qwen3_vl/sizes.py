"""The sizes that a Qwen3-VL model is built from."""

import dataclasses
import math

from clvr_jax.models.qwen3.config import Qwen3Config


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower.

    Attributes:
      width: width of the residual stream.
      layers: blocks.
      heads: attention heads.
      mlp_width: inner width of a block's MLP.
      patch: edge of a patch in pixels.
      temporal_patch: frames of a patch; a still is repeated.
      merge: edge of a cell in patches; a cell becomes one token.
      out_width: width of the decoder that reads the tokens.
      positions: rows of the position table, a square.
      deepstack: blocks, counted from 0, whose outputs go to the first decoder layers.
      in_channels: channels of a pixel.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int
    temporal_patch: int
    merge: int
    out_width: int
    positions: int
    deepstack: tuple[int, ...]
    in_channels: int = 3

    def __post_init__(self):
        if self.side**2 != self.positions:
            raise ValueError(f"positions must be a square, given {self.positions}")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} does not give {self.heads} heads of a multiple of 4 channels, "
                "which the rotation by row and column needs"
            )
        inside = range(self.layers)
        if any(i not in inside for i in self.deepstack) or list(self.deepstack) != sorted(
            set(self.deepstack)
        ):
            raise ValueError(
                f"deepstack {self.deepstack} must increase and stay within {self.layers} blocks"
            )

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def cell(self) -> int:
        """Patches that become one token."""
        return self.merge * self.merge

    @property
    def patch_width(self) -> int:
        """Numbers of one patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch * self.patch * self.patch

    @property
    def side(self) -> int:
        """Edge of the position table."""
        return math.isqrt(self.positions)


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """Sizes of a model, and the ids of the tokens that stand for pictures.

    Attributes:
      text: the decoder.
      vision: the vision tower.
      image_token: id that is replaced by the features of an image cell.
      vision_start: id before an image or a frame.
      vision_end: id after it.
      video_token: id that is replaced by the features of a video cell.
    """

    text: Qwen3Config
    vision: VisionConfig
    image_token: int
    vision_start: int
    vision_end: int
    video_token: int

    def __post_init__(self):
        text, vision = self.text, self.vision
        if text.mrope_section is None or sum(text.mrope_section) * 2 != text.head_width:
            raise ValueError(
                f"mrope_section {text.mrope_section} must be three numbers that add up to half of "
                f"head_width, {text.head_width}"
            )
        if vision.out_width != text.width:
            raise ValueError(
                f"the vision tower gives width {vision.out_width}, the decoder has {text.width}"
            )
        if len(vision.deepstack) > text.layers:
            raise ValueError(
                f"{len(vision.deepstack)} deepstack features need as many decoder layers, it has "
                f"{text.layers}"
            )
