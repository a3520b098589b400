"""Compile sampling for TPU chips that are not there: does it fit, what does it exchange.

  pip install -e ".[tpu]"
  python -m launch.compile --topology=v5e:2x4 --model=klein_9b --mesh=fsdp=2,tensor=4

Uses JAX's ahead-of-time topologies, so it runs on any x86-64 Linux machine. Nothing is executed:
memory and collectives come from the compiled programs, times are not known.
"""

import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

from absl import flags

from launch.runtime import run

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "TPU generation and slice, e.g. v6e:2x2")
_MODEL = flags.DEFINE_enum("model", "klein_4b", ["klein_4b", "klein_9b"], "sizes of the weights")
_MESH = flags.DEFINE_list("mesh", ["tensor=-1"], "axis=size,... over data, fsdp, tensor")
_SIZE = flags.DEFINE_string("size", "1024x1024", "height x width in pixels")
_STEPS = flags.DEFINE_integer("steps", 4, "denoising steps", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1, "pictures at once", lower_bound=1)
_REFERENCES = flags.DEFINE_integer("references", 0, "references of --size", lower_bound=0)
_PROGRAMS = flags.DEFINE_list("programs", ["text", "denoise"], "of text, denoise, encode, decode")
_OUT = flags.DEFINE_string("out", None, "JSON file for the report")

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def main(argv) -> None:
    """Compile each program and print what it needs of every chip."""
    size = re.fullmatch(r"(\d+)x(\d+)", _SIZE.value)
    axes = [re.fullmatch(r"(\w+)=(-?\d+)", text) for text in _MESH.value]
    unknown = set(_PROGRAMS.value) - {"text", "denoise", "encode", "decode"}
    if size is None or None in axes or unknown or len(argv) > 1:
        raise ValueError("give --size=1024x1024, --mesh=fsdp=2,tensor=4 and known --programs")
    devices = _topology(_TOPOLOGY.value)

    import jax

    from clvr_jax import parallel

    mesh = parallel.make_mesh({axis[1]: int(axis[2]) for axis in axes}, devices)
    # what chooses by device must see the chip's platform, not this machine's
    with mock.patch.object(jax, "default_backend", lambda: "tpu"), jax.set_mesh(mesh):
        rows = [_compiled(*item) for item in _lowered(mesh, int(size[1]), int(size[2]))]
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


def _topology(name: str):
    """The devices of a TPU slice that need not exist."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax.experimental import topologies

    single = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **single).devices
    except Exception as error:  # JAX raises several kinds for a missing library or an unknown name
        raise ValueError(
            f'no topology {name!r}: {error}. Names look like v5e:2x4; pip install -e ".[tpu]"'
        ) from error


def _lowered(mesh, height: int, width: int):
    """Yield (name, lowered program) with shapes and shardings only."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from clvr_jax import parallel
    from clvr_jax.generate import image as generation
    from clvr_jax.tree import flatten, unflatten
    from launch import build
    from launch.bench.image import networks

    nets = networks(_MODEL.value)

    def placed(tree):
        places = flatten(parallel.shardings(tree, mesh))
        return unflatten(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
                for path, leaf in flatten(tree).items()
            }
        )

    def array(*shape, dtype=jnp.bfloat16):
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    params = {k: placed(tree) for k, tree in build.abstract(nets, jnp.bfloat16).items()}
    settings = generation.Settings(height=height, width=width, steps=_STEPS.value)
    layout = generation.layout_of(nets, settings, [(height, width)] * _REFERENCES.value)
    b, s, cfg = _BATCH.value, settings.text_tokens, nets.transformer.cfg
    noise = array(b, *layout.noise, cfg.channels, dtype=jnp.float32)
    programs = {
        "text": lambda: generation.encode_text.lower(
            nets, params["text_encoder"], array(b, s, dtype=jnp.int32), array(b, dtype=jnp.int32)
        ),
        "denoise": lambda: generation.denoise.lower(
            nets,
            layout,
            settings.steps,
            settings.rounding,
            params["transformer"],
            {},
            noise,
            array(b, s, cfg.text_width),
            array(1, layout.image_tokens - layout.noise_tokens, cfg.channels),
            None,
            None,
            array(dtype=jnp.float32),
        ),
        "encode": lambda: generation.encode_image.lower(
            nets, params["vae"], array(1, height, width, 3, dtype=jnp.float32), jnp.bfloat16
        ),
        "decode": lambda: generation.decode.lower(
            nets, params["vae"], array(b, *layout.noise, cfg.channels)
        ),
    }
    for name in _PROGRAMS.value:
        yield name, programs[name]()


def _compiled(name: str, lowered) -> dict:
    """Compile one program; print and return bytes per chip and collectives."""
    import time

    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    # a loop's body is printed once: these are instructions, not executions
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in _COLLECTIVES}
    row = {
        "program": name,
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "collectives": {kind: n for kind, n in counts.items() if n},
        "compile_seconds": round(seconds, 1),
    }
    print(
        f"{name}: {row['arguments_gib']} GiB of weights and inputs, {row['temporary_gib']} GiB of "
        f"temporaries per chip; {row['collectives'] or 'no collectives'}; compiled in "
        f"{row['compile_seconds']} s",
        flush=True,
    )
    return row


if __name__ == "__main__":
    run(main)
