"""Work of the VLM stage: Qwen3-VL on packed conversations."""

import dataclasses

from clvr_jax import lora, tree
from clvr_jax.models.qwen3_vl.config import STACKED, Qwen3VLConfig
from launch.bench import flops
from launch.bench.flops import Training
from launch.plan import activations as formulas
from launch.plan.activations import Line, Ways
from launch.plan.job import Job, largest_layer


@dataclasses.dataclass(frozen=True)
class Text:
    """A micro-batch of packed rows.

    Attributes:
      cfg: of the model.
      rows: all devices together.
      tokens: places of a row, padding included.
      segments: tokens of the conversations that a row holds; one that fills it, if not known.
      images: places for pictures in a row.
      patches: of one picture.
      chunk: tokens whose scores over the vocabulary exist at once.
      remat: policy of the layers of both halves.
    """

    cfg: Qwen3VLConfig
    rows: int
    tokens: int
    segments: tuple[int, ...] = ()
    images: int = 0
    patches: int = 0
    chunk: int = 512
    remat: str = "none"
    stacked: tuple[str, ...] = STACKED

    def flops(self, job: Job) -> dict[str, Training]:
        """Return the FLOPs of one micro-batch by part; vision adapters are left out."""
        language = {"language": job.adapters.get("language", {})}
        adapters = sum(
            2 * sum(self.segments or (self.tokens,)) * tree.count({"a": a, "b": b})
            for a, b in lora.pairs(language).values()
        )
        parts = flops.vlm_training(
            self.cfg.text,
            self.cfg.vision,
            self.segments or (self.tokens,),
            (self.patches,) * self.images,
            train_vision=job.trains("visual"),
            share=self._share(job),
            adapters=adapters,
            remat=self.remat,
        )
        return {name: part * self.rows for name, part in parts.items()}

    def activations(self, job: Job, ways: Ways) -> list[Line]:
        """Return what one device holds besides arrays of known shape."""
        c, w = self.cfg.text, job.itemsize
        rows = self.rows // ways.rows
        tokens = rows * self.tokens / ways.context
        widths = {
            "d": c.width,
            "h": c.heads * c.head_width,
            "g": c.kv_heads * c.head_width,
            "m": c.mlp_width,
        }
        lines = formulas.layers(
            "language layers", c.layers, tokens, formulas.LANGUAGE, self.remat, widths, ways, w
        )
        lines += formulas.gathered(largest_layer(job), ways.shards, bool(job.trained))
        if self.images:
            lines += self._vision(job, ways, rows, tokens)
        return [*lines, self._head(job, ways, rows)]

    def describe(self) -> str:
        """Return one line: rows, tokens, pictures."""
        held = f" in {len(self.segments)} conversations" if self.segments else ""
        return (
            f"{self.rows} rows a micro-batch of {self.tokens:,} tokens{held} and {self.images} "
            f"pictures of {self.patches:,} patches, remat {self.remat}"
        )

    def _vision(self, job: Job, ways: Ways, rows: int, tokens: float) -> list[Line]:
        v, w = self.cfg.vision, job.itemsize
        count = rows * self.images * self.patches
        widths = {"d": v.width, "h": v.width, "m": v.mlp_width}
        table = formulas.VISION
        lines = formulas.layers(
            "vision blocks", v.layers, count, table, self.remat, widths, ways, w
        )
        if not job.trains("visual"):  # forward only: nothing is kept
            lines = [line for line in lines if not line.kept]
        later = len(v.deepstack)
        cells = count // v.cell
        features = int((cells * (1 + later) + 2 * later * tokens) * v.out_width * w)
        how = f"{1 + later} features a cell; {later} a token, and their gradients"
        return [*lines, Line("picture features", features, how)]

    def _head(self, job: Job, ways: Ways, rows: int) -> Line:
        c, w = self.cfg.text, job.itemsize
        scores = rows * self.chunk * c.vocab * (2 * 4 + w)
        table = c.vocab * c.width * (w + (4 + w if job.trains("language") and job.trained else 0))
        how = f"{self.chunk} tokens' scores, twice in float32; the head whole, its gradient float32"
        return Line("cross-entropy at work", (scores + table) // ways.tensor, how, kept=False)

    def _share(self, job: Job) -> float:
        """Part of the language half that is trained."""
        count = lambda part: tree.count(part.get("language", {}))
        trained, fixed = count(job.trained), count(job.fixed)
        return trained / max(trained + fixed, 1)
