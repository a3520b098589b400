"""Train a stage: image SFT or VLM SFT, on any number of devices and hosts.

  python -m launch.train --config=configs/image_sft.py:klein_4b --workdir=runs/image \
      --config.data.train=trajectories.jsonl
  python -m launch.train ... --dry_run --target=h20x8      # does it fit there, what does it cost
  python -m launch.train ... --resume                      # go on where it was, or begin

Writes checkpoints, metrics.jsonl, previews, the final config and what ran on what to --workdir.
SIGTERM saves and exits with 143. `launch/cluster/` runs the same command on SLURM, GKE and TPU VMs.
"""

import contextlib
import sys
from pathlib import Path

from absl import app, flags

from launch.runtime import config_flag, run, use_compile_cache

STAGES = ("image", "vlm", "world_vae", "world_klein", "world_vlm")
_CONFIG = config_flag("image_sft.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_RESUME = flags.DEFINE_bool("resume", False, "go on with the run in --workdir, if there is one")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "delete the run in --workdir and begin anew")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print sizes, sharding, FLOPs, memory and the first batch, then stop"
)
_TARGET = flags.DEFINE_string(
    "target", "here", "with --dry_run: a machine that need not be there, e.g. h20x8, v5e-64"
)
_OUT = flags.DEFINE_string(
    "out", None, "with --dry_run and a TPU slice: JSON file for what compiling for it found"
)


def main(argv) -> None:
    """Check everything that can be checked, then load, compile and train."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    config = _CONFIG.value
    if config.stage not in STAGES:
        raise ValueError(f"stage is {config.stage!r}; choose from {', '.join(STAGES)}")
    if _DRY_RUN.value:
        from launch.training import dry_run

        dry_run.show(config, _TARGET.value, _OUT.value)
        return
    if not _WORKDIR.value:
        raise ValueError("give --workdir, the folder of the run, or --dry_run")
    if not config.data.train:
        raise ValueError("give --config.data.train, a file or folder of trajectories")
    from launch.training import folder

    workdir = Path(_WORKDIR.value)
    config.weights = folder.pinned(workdir, config.weights, _RESUME.value)
    folder.prepare(workdir, config.to_dict(), _RESUME.value, _OVERWRITE.value)

    from launch import distributed

    distributed.initialize()
    use_compile_cache()
    import jax

    from clvr_jax.data.loader import LoadError
    from clvr_jax.train.loop import Interrupted
    from launch.training import compose
    from launch.training import run as training

    job, data, held_out, preview = compose.compose(config)
    first = jax.process_index() == 0
    try:
        with folder.held(workdir) if first else contextlib.nullcontext():
            training.train(
                job,
                config,
                workdir,
                data,
                held_out=held_out,
                preview_call=preview,
                resume=_RESUME.value,
                overwrite=_OVERWRITE.value,
                peak=compose.peak(),
            )
    except Interrupted as error:
        print(f"{error}; --resume goes on", file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except LoadError as error:
        raise ValueError(f"the data changed or cannot be read: {error}") from error
    if first:
        print(workdir)


if __name__ == "__main__":
    run(main)
