"""Work of the image stage: the klein transformer, its frozen text encoder and VAE."""

import dataclasses

from clvr_jax import lora, tree
from clvr_jax.models.flux2.config import STACKED, TransformerConfig, VaeConfig
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3.config import Qwen3Config
from launch.bench import flops
from launch.bench.flops import Training
from launch.plan import activations as formulas
from launch.plan.activations import Line, Ways
from launch.plan.job import Job, largest_layer


@dataclasses.dataclass(frozen=True)
class Image:
    """A micro-batch of pictures of one layout.

    Attributes:
      cfg: of the transformer.
      text: of the text encoder, as many layers as are run.
      vae: of the VAE.
      layout: of a row; the largest of the run, for memory.
      rows: all devices together.
      remat: policy of the transformer's blocks.
      precomputed: features and latents come with the data: no text encoder, no VAE.
    """

    cfg: TransformerConfig
    text: Qwen3Config
    vae: VaeConfig
    layout: Layout
    rows: int
    remat: str = "none"
    precomputed: bool = False
    stacked: tuple[str, ...] = STACKED

    def flops(self, job: Job) -> dict[str, Training]:
        """Return the FLOPs of one micro-batch by part."""
        parts = flops.image_training(
            self.cfg,
            self.text,
            self.vae,
            self.layout,
            share=job.share,
            adapters=self._adapters(job),
            remat=self.remat,
            precomputed=self.precomputed,
        )
        return {name: part * self.rows for name, part in parts.items()}

    def activations(self, job: Job, ways: Ways) -> list[Line]:
        """Return what one device holds besides arrays of known shape."""
        c, w = self.cfg, job.itemsize
        rows = self.rows // ways.rows
        tokens = rows * (self.layout.text + self.layout.image_tokens) / ways.context
        widths = {"d": c.width, "h": c.width, "m": c.mlp_width}
        stack = lambda label, count, table: formulas.layers(
            label, count, tokens, table, self.remat, widths, ways, w
        )
        lines = stack("double blocks", c.double_blocks, formulas.KLEIN_DOUBLE)
        lines += stack("single blocks", c.single_blocks, formulas.KLEIN_SINGLE)
        lines += formulas.gathered(largest_layer(job), ways.shards, bool(job.trained))
        features = rows * self.layout.text * self.text.width * 3
        lines.append(Line("text features", features * w, "3 x width a text token"))
        if not self.precomputed:
            lines += self._encoders(rows, ways, w)
        return lines

    def describe(self) -> str:
        """Return one line: rows, tokens, pictures."""
        layout, factor = self.layout, self.vae.factor
        height, width = (side * factor for side in layout.noise)
        return (
            f"{self.rows} pictures a micro-batch, {height} x {width} with "
            f"{len(layout.references)} references: {layout.text} text + {layout.image_tokens} "
            f"image tokens, remat {self.remat}"
        )

    def _encoders(self, rows: int, ways: Ways, w: int) -> list[Line]:
        t, factor = self.text, self.vae.factor
        queries, keys = t.heads * t.head_width, t.kv_heads * t.head_width
        token = (6 * t.width + (3 * queries + 2 * keys + 3 * t.mlp_width) / ways.tensor) * w
        layer = 2 * (2 * t.width * (queries + keys) + 3 * t.width * t.mlp_width) * w // ways.tensor
        size = int(rows * self.layout.text * token) + layer
        text = Line("text encoder at work", size, "a layer forward, two layers' weights", False)
        places = max(
            rows_ * cols * factor**2 for rows_, cols in (self.layout.noise, *self.layout.references)
        )
        # the outermost level in and out, and its norm in float32
        size = rows * places * self.vae.widths[0] * (2 * w + 2 * 4)
        how = f"{self.vae.widths[0]} channels of every pixel, 2 in float32 and 2 not"
        return [text, Line("VAE at work", size, how, kept=False)]

    def _adapters(self, job: Job) -> int:
        """Forward FLOPs of the adapters of a row, by the tokens that each sees."""
        text, image = self.layout.text, self.layout.image_tokens
        total = 0
        for path, (a, b) in lora.pairs(job.adapters).items():
            tokens = 1  # modulation and time see one vector
            if "single_blocks" in path:
                tokens = text + image
            elif "txt" in path and "modulation" not in path:
                tokens = text
            elif "img" in path and "modulation" not in path:
                tokens = image
            total += 2 * tokens * tree.count({"a": a, "b": b})
        return total
