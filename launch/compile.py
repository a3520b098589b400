"""Compile for TPU chips that are not there: does it fit, what does it exchange.

  pip install -e ".[tpu]"
  python -m launch.compile --topology=v5e:2x4 --model=klein_9b --mesh=fsdp=2,tensor=4
  python -m launch.compile --topology=v5e:2x4 --model=qwen3_vl_8b --batch=1,8,32

Uses JAX's ahead-of-time topologies, so it runs on any x86-64 Linux machine. Nothing is executed:
memory and collectives come from the compiled programs, times are not known.
"""

import json
import re
import sys
from pathlib import Path

from absl import flags

from launch.runtime import run

_PROGRAMS_OF = {
    "klein": ["text", "denoise", "encode", "decode"],
    "qwen3_vl": ["look", "prefill", "continue", "decode"],
}
_COMPILED = {"klein": ["text", "denoise"], "qwen3_vl": _PROGRAMS_OF["qwen3_vl"]}
_MODELS = [
    *("klein_4b", "klein_9b"),
    *("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"),
]

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "TPU generation and slice, e.g. v6e:2x2")
_MODEL = flags.DEFINE_enum("model", "klein_4b", _MODELS, "sizes of the weights")
_MESH = flags.DEFINE_list("mesh", ["tensor=-1"], "axis=size,... over data, fsdp, tensor, context")
_SIZE = flags.DEFINE_string("size", "1024x1024", "height x width in pixels")
_STEPS = flags.DEFINE_integer("steps", 4, "klein: denoising steps", lower_bound=1)
_BATCH = flags.DEFINE_list("batch", ["1"], "pictures, or conversations, at once; one or several")
_REFERENCES = flags.DEFINE_integer("references", 0, "klein: references of --size", lower_bound=0)
_PLACES = flags.DEFINE_integer(
    "places", 4096, "qwen3_vl: tokens that a conversation's cache has room for", lower_bound=2048
)
_PROGRAMS = flags.DEFINE_list(
    "programs",
    None,
    "klein: of text, denoise, encode, decode (default: the first two); "
    "qwen3_vl: of look, prefill, continue, decode (default: all)",
)
_OUT = flags.DEFINE_string("out", None, "JSON file for the report")

# programs that no batch changes
_ALONE = {("klein", "encode"), *(("qwen3_vl", name) for name in ("look", "prefill", "continue"))}


def main(argv) -> None:
    """Compile each program and print what it needs of every chip."""
    family = _MODEL.value.rpartition("_")[0]
    programs = _PROGRAMS.value or _COMPILED[family]
    size = re.fullmatch(r"(\d+)x(\d+)", _SIZE.value)
    axes = [re.fullmatch(r"(\w+)=(-?\d+)", text) for text in _MESH.value]
    batches = [re.fullmatch(r"[1-9]\d*", text) for text in _BATCH.value]
    unknown = set(programs) - set(_PROGRAMS_OF[family])
    if None in (size, *axes, *batches) or unknown or len(argv) > 1:
        raise ValueError(
            "give --size=1024x1024, --mesh=fsdp=2,tensor=4, --batch=1,8 and --programs out of "
            + ", ".join(_PROGRAMS_OF[family])
        )
    import jax

    from clvr_jax import parallel
    from launch import aot

    devices = aot.topology(_TOPOLOGY.value)
    mesh = parallel.make_mesh({axis[1]: int(axis[2]) for axis in axes}, devices)
    rows = []
    with aot.as_if_on("tpu"), jax.set_mesh(mesh):
        for batch in (int(match[0]) for match in batches):
            lower = _programs(mesh, (int(size[1]), int(size[2])), batch)
            for name in programs:
                alone = (family, name) in _ALONE
                if batch == int(batches[0][0]) or not alone:
                    labels = {} if alone or len(batches) == 1 else {"batch": batch}
                    rows.append(_compiled(name, lower[name], **labels))
    report = {
        "command": "python -m launch.compile " + " ".join(sys.argv[1:]),
        "topology": _TOPOLOGY.value,
        "chips": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "jax": jax.__version__,
        "programs": rows,
    }
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(report, indent=2) + "\n")


def _programs(mesh, size: tuple[int, int], batch: int):
    """Return calls that lower each program from shapes and shardings alone."""
    if _MODEL.value.startswith("klein"):
        from launch.aot import image

        return image.programs(
            _MODEL.value, mesh, size, _STEPS.value, batch, references=_REFERENCES.value
        )
    from launch.aot import text

    return text.programs(_MODEL.value, mesh, size, batch, _PLACES.value)


def _compiled(name: str, lower, **labels) -> dict:
    """Compile one program; print and return bytes per chip and collectives."""
    from launch import aot

    found = aot.compiled(lower)
    row = {
        "program": name,
        **labels,
        "arguments_gib": round(found.arguments / 2**30, 2),
        "temporary_gib": round(found.temporary / 2**30, 2),
        "collectives": found.collectives,
        "compile_seconds": round(found.seconds, 1),
    }
    said = "".join(f", {label} {value}" for label, value in labels.items())
    print(
        f"{name}{said}: {row['arguments_gib']} GiB of weights and inputs, {row['temporary_gib']} "
        f"GiB of temporaries per chip; {row['collectives'] or 'no collectives'}; compiled in "
        f"{row['compile_seconds']} s",
        flush=True,
    )
    return row


if __name__ == "__main__":
    run(main)
