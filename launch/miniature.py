"""Make the miniature: every network from nothing, by the ordinary trainer, on a world of shapes.

  python -m launch.miniature --out=outputs/miniature [--preset=quick]

Each stage leaves a folder of its own, most of them by `launch.train`; a stage that is finished is
not done again, one that was interrupted goes on from its last checkpoint. At the end
`OUT/klein_long` is a pipeline as diffusers writes it, `OUT/vlm` a model as transformers does,
`OUT/klein_sft` and `OUT/vlm_sft` are adapters for them, fine-tuned on edits of renders and on
drawings of the closed loop, and `OUT/weights` has all in bfloat16.
"""

from pathlib import Path

from absl import app, flags

from launch.runtime import run, use_compile_cache

_OUT = flags.DEFINE_string("out", "outputs/miniature", "folder of all stages")
_PRESET = flags.DEFINE_enum("preset", "full", ["full", "quick"], "how long each stage trains")
_STAGES = flags.DEFINE_list(
    "stages",
    [],
    "only these of begin, vae, klein, klein_more, klein_long, edits, klein_sft, vlm_begin, "
    "vlm, trajectories, vlm_sft, weights; with commas between",
)
_SEED = flags.DEFINE_integer("seed", 0, "of first weights, training data and drawings")


def main(argv) -> None:
    """Run what is not there yet."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    from launch.recipe import Recipe

    use_compile_cache()
    Recipe(Path(_OUT.value), _PRESET.value, _SEED.value).run(_STAGES.value)


if __name__ == "__main__":
    run(main)
