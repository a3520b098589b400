"""The stages of the miniature, in order, and the folder in which each leaves what it made."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from launch import fresh
from launch.folders import (
    CHAT_TEMPLATE,
    SEEING,
    VLM_TEMPLATE,
    aside,
    preprocessor,
    write_component,
    write_model,
    write_pipeline,
)
from launch.pictures import write_text

# optimiser steps of each training by preset; "full" has those of its config
STEPS: dict[str, dict[str, int]] = {
    "full": {},
    "quick": {
        "vae": 800,
        "klein": 1200,
        "klein_more": 600,
        "klein_long": 300,
        "vlm": 1000,
        "klein_sft": 50,
        "vlm_sft": 100,
    },
}
EDITS = {"full": 40000, "quick": 200}  # of renders, that klein is fine-tuned on
PROMPTS = {"full": 250, "quick": 10}  # of each kind, whose drawings the VLM is fine-tuned on
_EDITS, _TRAJECTORIES, _RECORD = "edits.jsonl", "train.jsonl", "recipe.json"
_LOST = 0.02  # share of drawings that may fail
_STATISTICS = 2048  # pictures that the VAE's latents are normalised by


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All stages, each in a folder of its own.

    Attributes:
      out: folder of everything.
      preset: of `STEPS`.
      seed: of first weights, training data and drawings.

    Raises:
      ValueError: the preset is unknown.
    """

    out: Path
    preset: str = "full"
    seed: int = 0

    def __post_init__(self):
        if self.preset not in STEPS:
            raise ValueError(f"preset {self.preset!r} is unknown; choose from {', '.join(STEPS)}")

    @property
    def stages(self) -> dict[str, Callable[[Path], None]]:
        """What makes the folder of each stage, in order."""
        return {
            "begin": self.begin,
            "vae": self.vae,
            "klein": self.klein,
            "klein_more": self.klein_more,
            "klein_long": self.klein_long,
            "edits": self.edits,
            "klein_sft": self.klein_sft,
            "vlm_begin": self.vlm_begin,
            "vlm": self.vlm,
            "trajectories": self.trajectories,
            "vlm_sft": self.vlm_sft,
            "weights": self.weights,
        }

    def run(self, only: Sequence[str] = ()) -> None:
        """Make what is not there yet.

        Args:
          only: names of stages; none for all.

        Raises:
          ValueError: a name is unknown, or what is there was begun with another preset or seed.
          ChildProcessError: a training or the writing of its weights failed; it printed why.
        """
        unknown = [name for name in only if name not in self.stages]
        if unknown:
            raise ValueError(f"unknown stages {unknown}; there are {', '.join(self.stages)}")
        record = self._known()
        for name, make in self.stages.items():
            if only and name not in only:
                continue
            folder = self.out / name
            if folder.exists():
                print(f"{folder}: there already", flush=True)
                continue
            began = time.perf_counter()
            try:
                make(folder)
            finally:
                self._record(record, name, time.perf_counter() - began)

    def _known(self) -> dict[str, Any]:
        """The record of what was made here before, begun if there is none."""
        file, own = self.out / _RECORD, {"preset": self.preset, "seed": self.seed}
        if not file.exists():
            record = {**own, "stages": {}}
            write_text(file, json.dumps(record, indent=2) + "\n")
            return record
        record = json.loads(file.read_text())
        if "stages" not in record:
            raise ValueError(f"{file} is of an earlier version; choose another --out")
        lines = [f"--{k}={record[k]}, {v} given" for k, v in own.items() if record[k] != v]
        if lines:
            raise ValueError(
                f"{self.out} was begun with {' and '.join(lines)}; go on with what it was begun "
                "with, or choose another --out"
            )
        return record

    def _record(self, record: dict[str, Any], stage: str, seconds: float) -> None:
        """Add what a stage cost, all its starts that were not killed together, and on what."""
        from launch.bench.machine import environment

        made = (self.out / stage).exists()
        seconds += record["stages"].get(stage, {}).get("seconds", 0)
        if made:
            print(f"{self.out / stage}: made in {seconds:.0f} s", flush=True)
        cost = {"seconds": round(seconds), "made": made}
        record["stages"][stage] = {**cost, **environment("launch.miniature")}
        write_text(self.out / _RECORD, json.dumps(record, indent=2) + "\n")

    def begin(self, folder: Path) -> None:
        """Write a klein of random weights with a trained tokenizer."""
        from clvr_jax.miniature import tokenizer

        weights = self._fresh("transformer", "vae", "text_encoder")
        words = tokenizer.train(tokenizer.corpus(), CHAT_TEMPLATE, SEEING)
        with aside(folder) as partial:
            write_pipeline(partial, weights, words, distilled=False)

    def vlm_begin(self, folder: Path) -> None:
        """Write a Qwen3-VL of random weights with the same tokenizer."""
        from launch import build

        config, tree = self._fresh("vlm")["vlm"]
        words = build.load_tokenizer(self.out / "begin" / "tokenizer")
        words.chat_template = VLM_TEMPLATE
        vision = config.vision
        side = vision.patch * vision.merge
        reads = preprocessor(vision, side**2, (16 * side) ** 2)
        with aside(folder) as partial:
            write_model(partial, config, tree, words, reads)

    def vlm(self, folder: Path) -> None:
        """Train the Qwen3-VL, and write it."""
        self._exported(folder, self._train("vlm", self.out / "vlm_begin"), only="vlm")

    def vae(self, folder: Path) -> None:
        """Train the VAE, measure its latents, and write a klein with it."""
        from clvr_jax.miniature import autoencoder, samples
        from clvr_jax.miniature.pictures import rendered
        from clvr_jax.models.flux2.vae import Vae
        from conversion.load import load
        from launch import build

        trained = self._train("vae", self.out / "begin")
        found = build.inspect_weights(str(trained)).found.components["vae"]
        params = load(found.open(), found.abstract(), ())
        rows = range(_STATISTICS)
        drawings = [samples.drawing(samples.generator(self.seed, row), 0).target for row in rows]
        pictures = rendered(drawings, _STATISTICS)
        params = autoencoder.with_statistics(Vae(found.config), params, pictures)
        with aside(folder) as partial:
            shutil.copytree(self.out / "begin", partial)
            shutil.rmtree(partial / "vae")
            write_component(partial / "vae", "vae", found.config, params)

    def klein(self, folder: Path) -> None:
        """Train transformer and text encoder, and write the pipeline."""
        self._exported(folder, self._train("klein", self.out / "vae"))

    def klein_more(self, folder: Path) -> None:
        """Train both further from their moving averages, on other data, and write the pipeline."""
        run = self._train("klein_more", self.out / "klein", seed=self.seed + 1)
        self._exported(folder, run)

    def klein_long(self, folder: Path) -> None:
        """Train both once more from their moving averages, with longer texts."""
        run = self._train("klein_long", self.out / "klein_more", seed=self.seed + 2)
        self._exported(folder, run)

    def edits(self, folder: Path) -> None:
        """Render edits to fine-tune klein on.

        A klein that learns its own edits learns their flaws, and forgets what no drawing asks for;
        see the weights' README for what that cost.
        """
        from launch import world_data

        with aside(folder) as partial:
            partial.mkdir()
            world_data.edits(partial / _EDITS, EDITS[self.preset], self.seed)

    def klein_sft(self, folder: Path) -> None:
        """Fine-tune klein's transformer on edits of renders, and write its adapters."""
        self._tuned(folder, "klein_sft", "image_sft.py", "klein_long", self.out / "edits" / _EDITS)

    def trajectories(self, folder: Path) -> None:
        """Draw prompts in the loop, as the teacher directs it; keep what ended well and is allowed.

        Nothing held out is asked for in what is kept, and no prompt of another split.
        """
        from clvr_jax.miniature import splits
        from launch.drawing.folder import RESULT, SOME_FAILED

        asked, drawn = self.out / "runs" / "prompts.txt", self.out / "runs" / "drawings"
        prompts = splits.training(PROMPTS[self.preset])
        write_text(asked, "".join(f"{prompt.text}\n" for prompt in prompts))
        draw = [
            *(sys.executable, "-m", "launch.generate", f"--weights={self.out / 'klein_long'}"),
            *("--vlm=teacher", f"--prompts_file={asked}", f"--out={drawn}", "--resume"),
            *("--config.batch=32", "--config.loop.concurrency=64", f"--seeds={self.seed}"),
        ]
        if _call(draw, "drawing", {SOME_FAILED}):
            results = [json.loads(file.read_text()) for file in drawn.glob(f"*/{RESULT}")]
            lost = sum(result["error"] is not None for result in results)
            if lost > _LOST * len(prompts):
                raise ChildProcessError(f"{lost} of {len(prompts)} drawings failed; it printed why")
            print(f"{lost} drawings failed and are left out", flush=True)
        prune = [sys.executable, "-m", "launch.data", "prune", str(drawn)]
        with aside(folder) as partial:
            partial.mkdir()
            pruned, target = partial / "pruned.jsonl", partial / _TRAJECTORIES
            _call([*prune, str(pruned), "--vlm=teacher", "--verify"], "choosing drawings")
            lines = pruned.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _may_train(line)]
            write_text(target, "".join(kept))
            pruned.unlink()
            print(
                f"left out {len(lines) - len(kept)} of {len(lines)} trajectories: a step of theirs "
                "asks for something held out, or for less than its prompt, which then is of "
                "another split",
                flush=True,
            )

    def vlm_sft(self, folder: Path) -> None:
        """Fine-tune the Qwen3-VL on drawings, and write its adapters."""
        drawings = self.out / "trajectories" / _TRAJECTORIES
        self._tuned(folder, "vlm_sft", "vlm_sft.py", "vlm", drawings)

    def weights(self, folder: Path) -> None:
        """Write all once more in bfloat16, as they come with the package."""
        with aside(folder) as partial:
            partial.mkdir()
            for name, stage, only in (("klein", "klein_long", ""), ("vlm", "vlm", "vlm")):
                self._exported(partial / name, self.out / stage, "--dtype=bfloat16", only=only)
                tuned, base = f"{name}_sft", f"--base=../{name}"
                self._adapters(partial / tuned, tuned, stage, base, "--dtype=bfloat16")

    def _fresh(self, *names: str) -> dict[str, tuple[Any, Any]]:
        """First weights of components at the miniature's sizes."""
        from conversion.components import KINDS

        return fresh.weights({n: KINDS[n].variants["miniature"] for n in names}, self.seed)

    def _train(
        self, stage: str, weights: Path, seed: int | None = None, config: str = "", **more: object
    ) -> Path:
        """Run `launch.train`, or go on with it; return the folder of the run."""
        run = self.out / "runs" / stage
        given = {"weights": weights, "seed": self.seed if seed is None else seed, **more}
        if stage in STEPS[self.preset]:
            given["steps"] = STEPS[self.preset][stage]
        command = [
            *(sys.executable, "-m", "launch.train"),
            f"--config=configs/{config or f'miniature.py:{stage}'}",
            *(f"--workdir={run}", "--resume"),
            *(f"--config.{name}={value}" for name, value in given.items()),
        ]
        _call(command, f"the training of {stage}")
        return run

    def _tuned(self, folder: Path, stage: str, config: str, base: str, data: Path) -> None:
        """Fine-tune what the stage `base` left, and write the adapters."""
        self._train(stage, self.out / base, config=f"{config}:miniature", **{"data.train": data})
        self._adapters(folder, stage, base)

    def _adapters(self, folder: Path, stage: str, base: str, *options: str) -> None:
        """Write the adapters of a stage's run as PEFT's folder."""
        _clear(folder)
        run, weights = str(self.out / "runs" / stage), f"--weights={self.out / base}"
        command = [sys.executable, "-m", "conversion.lora", run, str(folder), "--to=peft", weights]
        _call([*command, *options], f"writing {folder}")

    def _exported(self, folder: Path, source: Path, *options: str, only: str = "") -> None:
        """Write a run or a folder in the released layout; `only` one part, as a model by itself."""
        target = folder
        if only:
            target = folder.with_name(f"{folder.name}.parts")
        _clear(target)
        command = [sys.executable, "-m", "conversion", str(source), str(target), *options]
        command.append("--to=diffusers")
        _call(command, f"writing {folder}")
        if only:
            (target / only).rename(folder)
            target.rmdir()


def _may_train(line: str) -> bool:
    """Whether all steps of a trajectory, as a line of JSON, may be learnt from."""
    from clvr_jax.data.trajectory import Trajectory
    from clvr_jax.miniature import splits

    steps = Trajectory.model_validate_json(line).steps
    return all(splits.may_train(step.action) for step in steps)


def _clear(target: Path) -> None:
    """Remove what a start that was killed has left of a folder that is written anew."""
    for left in (target, target.with_name(f"{target.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)


def _call(command: Sequence[str], what: str, accepted: Container[int] = ()) -> int:
    """Run a command of this repository; its output goes where ours does. Return its exit status.

    SIGTERM is passed on to it, so that a training saves; an exception here ends it.

    Args:
      command: to run.
      what: it does, for the error.
      accepted: statuses besides 0 that are no error.

    Raises:
      ChildProcessError: it ended with another status.
    """
    print(" ".join(command[1:]), flush=True)
    process = subprocess.Popen(command)
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise SystemExit(128 + stopped[0])
    if code and code not in accepted:
        raise ChildProcessError(f"{what} ended with exit code {code}; it printed why")
    return code
