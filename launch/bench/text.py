"""The text benchmark: look, prefill, decode and a second turn of a vision-language model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax import tree
from clvr_jax.backends.local.reader import PIECE, Reader
from clvr_jax.backends.local.sequence import Sequence, bucket
from clvr_jax.backends.local.work import Work
from clvr_jax.backends.protocol import Options
from clvr_jax.generate import text
from clvr_jax.models.qwen3.cache import token_bytes
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3_vl import config, model
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig
from clvr_jax.models.qwen3_vl.processor import Picture
from launch import build_vlm
from launch.bench import flops, machine
from launch.bench.timing import Timing, measure
from launch.bench.weights import random_params

MODELS = {
    **{name: cfg for name, cfg in config.VARIANTS.items() if name != "tiny"},
    "toy": config.VARIANTS["tiny"],
    # eight layers of width 1024: what the memory of a laptop's CPU can feed
    "mid": Qwen3VLConfig(
        Qwen3Config(8192, 1024, 8, 16, 8, 64, 3072, 5e6, 1e-6, False, 32768, (12, 10, 10)),
        VisionConfig(384, 6, 6, 1536, 16, 2, 2, 1024, 2304, (1, 3, 5)),
        image_token=8000,
        vision_start=8001,
        vision_end=8002,
        video_token=8003,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      model: a key of `MODELS`.
      prompt: tokens of the conversation that is read, and that decoding has behind it.
      turn: tokens of a second turn.
      picture: edge of the picture in pixels, a multiple of 32.
      batches: sequences that are decoded together.
      dtype: of weights, activations and cache.
    """

    model: str
    prompt: int = 2000
    turn: int = 256
    picture: int = 1024
    batches: tuple[int, ...] = (1, 8, 32)
    dtype: str = "bfloat16"


class Bench:
    """Our side: networks with random weights, and the calls that are timed."""

    def __init__(self, case: Case):
        self.case, self.cfg = case, MODELS[case.model]
        self.nets = build_vlm.networks(self.cfg)
        abstract = model.abstract_params(self.cfg, jnp.dtype(case.dtype))
        self.stacked = random_params(abstract, 0, config.STACKED)
        self.params: Any = None
        self.ids = np.random.default_rng(0).integers(1, self.cfg.image_token, case.prompt + PIECE)

    def prepare(self) -> None:
        """Lay the weights out for serving; the stacked ones are gone then."""
        self.params = build_vlm.prepare(self.cfg, self.stacked, None)
        self.reader = Reader(self.nets, self.params, self.cfg, np.zeros((3, 256), np.float32))

    def look(self) -> jax.Array:
        """Return the features of one picture."""
        side = self.case.picture // self.cfg.vision.patch
        width = self.cfg.vision.patch_width // self.cfg.vision.temporal_patch
        pixels = np.random.default_rng(1).integers(0, 256, (side * side, width), dtype=np.uint8)
        cells = side * side // self.cfg.vision.cell
        return self.reader.look(cells, [(0, Picture(pixels, (side, side)))])[0]

    def read(self, tokens: int, seq: Sequence | None = None) -> Sequence:
        """Read so many more tokens of a conversation."""
        seq = seq or Sequence()
        seq.ids.extend(self.ids[len(seq.ids) : len(seq.ids) + tokens].tolist())
        self.scores = jax.block_until_ready(self.reader.read(seq))
        return seq

    def rows(self, b: int, places: int) -> text.Rows:
        """Return a batch whose rows have all read the prompt; greedy, without end."""
        seq = self.read(self.case.prompt)
        endless = Options(max_tokens=2**30)
        work = Work(seq, None, endless, None, None, (), endless.max_tokens, None)
        one = text.settle(work.row(self.scores, self.cfg.text.vocab, seq.cache))
        return text.regroup(one, np.zeros(b, np.int32), places)

    def first_token(self) -> np.ndarray:
        """Look at a picture, read the prompt, and bring the first token to the host."""
        jax.block_until_ready(self.look())
        rows = self.rows(1, bucket(self.case.prompt + text.CHUNK))
        _, out = text.decode(self.nets, self.params["language"], rows, 1, np.ones(1, bool))
        return np.asarray(out.ids)

    def decoder(self, b: int, calls: int) -> Callable[[], np.ndarray]:
        """Return a call that continues a batch by CHUNK tokens each time."""
        # a call beyond the room that was made would be wrong, not only slow
        state = {"rows": self.rows(b, bucket(self.case.prompt + text.CHUNK * (calls + 2)))}
        keep = np.ones(b, bool)

        def call() -> np.ndarray:
            state["rows"], out = text.decode(
                self.nets, self.params["language"], state["rows"], text.CHUNK, keep
            )
            return np.asarray(out.ids)

        return call


def run(case: Case, repeat: int, peer: bool, threads: int | None = None) -> dict[str, Any]:
    """Measure a case; return the report of the result file.

    Args:
      case: what to measure.
      repeat: timed calls of every part.
      peer: measure transformers beside us.
      threads: for the peer on a CPU; None for as many as this process may use.
    """
    bench = Bench(case)
    theirs = None
    if peer:
        from launch.bench import text_peer

        theirs = text_peer.Peer(case, bench.cfg, bench.stacked, bench.ids, threads)
    bench.prepare()
    limit = {**machine.limits(case.dtype), **machine.memory_rate()}
    cfg = bench.cfg
    patches = (case.picture // cfg.vision.patch) ** 2
    report: dict[str, Any] = {"case": dataclasses.asdict(case), "limits": limit, "parts": {}}
    report["parameters"] = tree.count(model.abstract_params(cfg))

    def part(name: str, calls: dict[str, Callable[[], Any]], **costs: float) -> None:
        timings, results = measure(calls, repeat)
        report["parts"][name] = {
            who: _rates(timing, limit, **costs) for who, timing in timings.items()
        }
        own = report["parts"][name]["ours"]["median_ms"]
        for who, values in report["parts"][name].items():
            if who != "ours":
                values["ratio"] = round(values["median_ms"] / own, 3)
        return results

    beside = lambda call: {} if theirs is None else {"transformers": call}
    part(
        "look",
        {"ours": bench.look, **beside(lambda: theirs.look())},
        flop=flops.vision(cfg.vision, patches),
        tokens=patches // cfg.vision.cell,
    )
    part(
        "prefill",
        {"ours": lambda: bench.read(case.prompt).cache, **beside(lambda: theirs.prefill())},
        flop=flops.text_encoder(cfg.text, case.prompt),
        tokens=case.prompt,
    )
    part("picture and prompt to first token", {"ours": bench.first_token}, tokens=1)
    second = lambda: bench.read(case.turn, bench.read(case.prompt)).cache
    part("two turns, cache kept", {"ours": second}, tokens=case.prompt + case.turn)
    first = report["parts"]["prefill"]["ours"]["median_ms"]
    kept = report["parts"]["two turns, cache kept"]["ours"]["median_ms"] - first
    part(
        "second turn read anew",
        {"ours": lambda: bench.read(case.prompt + case.turn).cache},
        tokens=case.prompt + case.turn,
    )
    report["second_turn"] = {
        "kept_ms": round(kept, 3),
        "anew_ms": report["parts"]["second turn read anew"]["ours"]["median_ms"],
    }
    weights = decode_bytes(cfg.text, jnp.dtype(case.dtype).itemsize)
    for b in case.batches:
        cache = b * case.prompt * token_bytes(cfg.text, jnp.dtype(case.dtype).itemsize)
        results = part(
            f"decode {text.CHUNK} tokens, batch {b}",
            {
                "ours": bench.decoder(b, repeat + 3),
                **beside(lambda b=b: theirs.decode(b, text.CHUNK)),
            },
            gigabytes=text.CHUNK * (weights + cache) / 1e9,
            tokens=b * text.CHUNK,
        )
        if theirs is not None:
            same = theirs.same_tokens(b, bench.decoder(b, 1)())
            report["parts"][f"decode {text.CHUNK} tokens, batch {b}"]["same_tokens"] = same
        del results
    report["memory"] = machine.memory()
    return report


def decode_bytes(cfg: Qwen3Config, width: int) -> int:
    """Return the bytes of weights that one decode step reads: all but an untied embedding."""
    attention = cfg.width * cfg.head_width * (2 * cfg.heads + 2 * cfg.kv_heads)
    layer = attention + 3 * cfg.width * cfg.mlp_width
    return width * (cfg.layers * layer + cfg.vocab * cfg.width)


def _rates(
    timing: Timing,
    limit: dict[str, Any],
    flop: float = 0,
    gigabytes: float = 0,
    tokens: float = 0,
) -> dict[str, Any]:
    out = {**timing.report(), "tokens_per_s": round(tokens / timing.median, 2)}
    if flop:
        out["tflops"] = round(flop / timing.median / 1e12, 4)
        out["share_of_limit"] = round(out["tflops"] / limit["limit_tflops"], 4)
    if gigabytes:
        out["gb_per_s"] = round(gigabytes / timing.median, 2)
        out["share_of_limit"] = round(out["gb_per_s"] / limit["limit_gb_s"], 4)
    return out


def show(report: dict[str, Any]) -> None:
    """Print a text report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    env, limit, case = report["environment"], report["limits"], report["case"]
    console.print(
        f"{case['model']} {case['dtype']}, {report['parameters']:,} parameters, prompt "
        f"{case['prompt']}, second turn {case['turn']}, picture {case['picture']}",
        highlight=False,
    )
    console.print(f"{env['device']}, {env['processor']}, {machine.versions(env)}", highlight=False)
    table = Table(
        caption=f"limits {limit['limit_tflops']:.3g} TFLOP/s ({limit['limit_is']}), "
        f"{limit['limit_gb_s']:.4g} GB/s ({limit['bandwidth_is']})"
    )
    for name in ("part", "who"):
        table.add_column(name)
    for name in ("compile s", "median ms", "min ms", "tokens/s", "of limit", "x ours"):
        table.add_column(name, justify="right")
    for name, sides in report["parts"].items():
        for who in ("ours", "transformers"):
            if who in sides:
                p = sides[who]
                share = f"{p['share_of_limit']:.1%}" if "share_of_limit" in p else ""
                table.add_row(
                    name if who == "ours" else "",
                    who,
                    f"{p['compile_s']:.1f}" if who == "ours" else "",
                    f"{p['median_ms']:.2f}",
                    f"{p['min_ms']:.2f}",
                    f"{p['tokens_per_s']:.4g}",
                    share,
                    f"{p['ratio']:.2f}" if "ratio" in p else "",
                )
    console.print(table)
    turn = report["second_turn"]
    console.print(
        f"second turn: {turn['kept_ms']:.1f} ms with its cache kept, {turn['anew_ms']:.1f} ms read "
        "anew",
        highlight=False,
    )
    same = {k: p["same_tokens"] for k, p in report["parts"].items() if "same_tokens" in p}
    for name, share in same.items():
        console.print(f"{name}: {share:.0%} of greedy tokens agree", highlight=False)
