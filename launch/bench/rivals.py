"""Other implementations measured in the same run, in turns with ours."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.bench.timing import Timing

# their denoising call encodes the references itself
_OURS_OF = {"denoise": ("reference encode", "reference cache", "denoise")}


class Rivals:
    """diffusers eager and compiled, or nobody.

    Args:
      model: our networks and weights, which the peers take over.
      case: what is measured (`launch.bench.image.Case`).
      mode: None for nobody, "none" for eager, or a torch.compile mode for eager and compiled.
      budget: seconds that torch.compile may take.
    """

    def __init__(self, model: Any, case: Any, mode: str | None, budget: float):
        self.peers: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self.times: dict[str, dict[str, Timing]] = {}
        if mode is None:
            return
        from launch.bench import image, peer

        s = case.settings
        fields = {"height": s.height, "width": s.width, "num_inference_steps": s.steps}
        if s.pattern == "full":
            fields["guidance_scale"] = s.guidance
        inputs = peer.Inputs(
            image.prompts_of(case),
            image.pictures_of(case),
            np.asarray(image.noise_of(model, case)),
            fields,
            s.text_tokens,
        )
        pipe = peer.build(model, s.pattern, guided=s.guidance != 1.0)
        self.peers["diffusers"] = peer.Peer(pipe, inputs)
        if mode != "none":
            name = f"diffusers, torch.compile {mode}"
            try:
                seconds, made = peer.within_budget(
                    lambda: peer.warm(peer.Peer(peer.compiled(pipe, mode), inputs)), budget
                )
                self.peers[name] = made
                self.notes[name] = {"compile_s": round(seconds, 1)}
            except peer.CompileTimeout as error:
                self.notes[name] = {"error": str(error)}
        gc.collect()

    def part(self, name: str) -> dict[str, Callable[[], None]]:
        """Return the calls that stand beside our part of this name."""
        return {who: p.parts()[name] for who, p in self.peers.items() if name in p.parts()}

    def whole(self) -> dict[str, Callable[[], np.ndarray]]:
        """Return the calls from prompts to pixels."""
        return {who: p.generate for who, p in self.peers.items()}

    def record(self, name: str, timings: dict[str, Timing]) -> None:
        """Keep the timings of a part."""
        self.times[name] = timings

    def report(
        self, parts: dict[str, Any], total: dict[str, Any], pixels: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """Return the section `peers` of a result file; empty without peers.

        Ratios are their median over ours: above one, we are faster.
        """
        if not self.peers and not self.notes:
            return {}
        ours = {
            name: sum(parts[p]["median_ms"] for p in _OURS_OF.get(name, (name,)) if p in parts)
            for name in self.times
            if name != "end to end"
        }
        ours["end to end"] = total["median_ms"]
        section = {}
        for who in {**self.peers, **self.notes}:
            section[who] = dict(self.notes.get(who, {}))
            if who not in self.peers:
                continue
            for name, timings in self.times.items():
                if who in timings:
                    timing = timings[who].report()
                    timing.pop("compile_s")
                    timing["ratio"] = round(timing["median_ms"] / ours[name], 3)
                    section[who][name] = timing
            section[who]["output"] = _difference(pixels["ours"], pixels[who])
        from launch.bench import peer

        return {"peers": section, "peers_memory": peer.memory()}


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Grey levels between two uint8 pictures, and their error in units of the contrast."""
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return {
        "largest_level": float(gap.max()),
        "mean_level": round(float(gap.mean()), 4),
        "share_above_one_level": round(float((gap > 1).mean()), 6),
        "mean_over_std": round(float(gap.mean() / max(theirs.std(), 1e-9)), 5),
    }
