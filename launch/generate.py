"""Make pictures from prompts and reference images, alone or directed by a vision-language model.

  python -m launch.generate --weights=FOLDER --prompt="a red cup on a table" --seeds=0,1
  python -m launch.generate --weights=FOLDER --prompt="make the cup blue" --image=cup.png
  python -m launch.generate --weights=FOLDER --prompt="..." --config=configs/generate.py:base
  python -m launch.generate --weights=FOLDER --vlm=FOLDER --prompt="..."     # the closed loop

`--mode=single` writes PNG files with prompt, seed, settings and weight fingerprint in their text,
a grid where there are several, and settings.json. The other modes ask a model (`--vlm`, or one
behind `--server`) and write a folder for every prompt, with its page: `loop` plans, draws, looks
and edits; `best_of` has the best of several pictures chosen; `rewrite` has the prompt written out;
`one_shot` asks nobody, to be compared with them. The exit status is 3 if some prompts failed and
all others are drawn.
"""

import dataclasses
import datetime
import json
import re
import sys
import time
from pathlib import Path

from absl import app, flags

from launch.runtime import config_flag, run, use_compile_cache

_CONFIG = config_flag("generate.py")
_VLM_CONFIG = config_flag("vlm.py", "vlm_config")
_MODE = flags.DEFINE_enum(
    "mode",
    None,
    ["single", "loop", "best_of", "rewrite", "one_shot"],
    "loop with a model to ask, else single",
)
_VLM = flags.DEFINE_string(
    "vlm", None, "Qwen3-VL folder or hub id; teacher: the miniature's scripted one"
)
_SERVER = flags.DEFINE_string("server", None, "or the base URL of an OpenAI-compatible server")
_NAME = flags.DEFINE_string("name", "", "the model's name there")
_KEY = flags.DEFINE_string("key_env", None, "environment variable with the server's API key")
_RESUME = flags.DEFINE_bool("resume", False, "go on with what is in --out (not --mode=single)")
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "diffusers folder, converted folder, or hub repository id", required=True
)
_TRANSFORMER = flags.DEFINE_string(
    "transformer", None, "another checkpoint for the transformer, e.g. a BFL single file"
)
_LORA = flags.DEFINE_multi_string("lora", [], "LoRA file, or FILE:SCALE; may be repeated")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "text file with one prompt per line")
_IMAGE = flags.DEFINE_multi_string("image", [], "reference image; may be repeated, order counts")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "one picture per seed and prompt: 0,1,2")
_OUT = flags.DEFINE_string("out", None, "folder for the pictures (default: outputs/DATE-TIME)")
_TARGET = flags.DEFINE_string(
    "target", "here", "with --dry_run: a machine that need not be there, e.g. h200x1, v6e-8"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print sizes, memory and sharding, then stop")


def main(argv) -> None:
    """Check everything that can be checked, then load, compile and draw."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; prompts are given with --prompt")
    prompts, seeds = _prompts(), _seeds()
    out = Path(_OUT.value or f"outputs/{datetime.datetime.now():%Y%m%d-%H%M%S}")
    for image in _IMAGE.value:
        if not Path(image).is_file():
            raise FileNotFoundError(f"reference image {image} does not exist")
    asks = _VLM.value is not None or _SERVER.value is not None
    mode = _MODE.value or ("loop" if asks else "single")
    if mode == "single":
        _single(prompts, seeds, out)
    else:
        _directed(mode, prompts, seeds, out)


def _directed(mode: str, prompts: list[str], seeds: list[int], out: Path) -> None:
    """Draw with a model to ask."""
    if mode != "one_shot" and (_VLM.value is None) == (_SERVER.value is None):
        raise ValueError(f"--mode={mode} asks a model: give either --vlm=FOLDER or --server=URL")
    for flag, value in (("image", _IMAGE.value), ("lora", _LORA.value)):
        if value:
            raise ValueError(f"--{flag} is for --mode=single; merge LoRA files with conversion")
    use_compile_cache()
    from launch.drawing import command

    command.draw(
        mode,
        prompts,
        seeds,
        out,
        command.Sources(
            _WEIGHTS.value, _TRANSFORMER.value, _VLM.value, _SERVER.value, _NAME.value, _KEY.value
        ),
        _CONFIG.value,
        _VLM_CONFIG.value,
        _RESUME.value,
        _DRY_RUN.value,
        _TARGET.value,
    )


def _single(prompts: list[str], seeds: list[int], out: Path) -> None:
    """Draw without any other model."""
    start = time.perf_counter()
    if _RESUME.value:
        raise ValueError("--resume is for modes that ask a model; choose another --out")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; choose another --out")
    cache = use_compile_cache()
    from clvr_jax.generate import image as generation
    from launch import build, pictures
    from launch.drawing.folder import slug

    weights = build.inspect_weights(_WEIGHTS.value, _TRANSFORMER.value)
    config = _CONFIG.value
    dtype = build.resolve_dtype(config.dtype)
    nets = build.networks(weights, config.attention, config.layers)
    references = pictures.read_references(_IMAGE.value, nets.vae.cfg.factor)
    settings = _settings(config, weights, prompts, [image.shape[:2] for image in references])
    layout = generation.layout_of(nets, settings, [image.shape[:2] for image in references])
    mesh = build.make_mesh(config.mesh, config.devices)
    if _DRY_RUN.value:
        build.describe(nets, layout, dtype, mesh)
        return

    import jax

    say = lambda text: print(text, file=sys.stderr, flush=True)
    say(
        f"{weights.found.kind} {weights.found.path}, {len(jax.devices())} x {jax.default_backend()}"
    )
    model = build.load_image_model(
        weights,
        dtype=dtype,
        mesh=mesh,
        attention=config.attention,
        layers=config.layers,
        loras=_loras(),
    )
    if settings.guidance != 1.0 and weights.distilled:
        say("note: these weights are distilled; guidance costs twice and is off-distribution")
    say(f"loaded in {time.perf_counter() - start:.1f} s (compile cache: {cache})")
    metadata = {
        "settings": generation.dataclasses.asdict(settings),
        "weights": build.weight_fingerprint(weights),
        "loras": _LORA.value,
        "references": _IMAGE.value,
    }
    files, sheet = [], []
    with build.use_mesh(mesh):
        for batch in pictures.batches(prompts, seeds, config.batch):
            began = time.perf_counter()
            images = generation.generate(model, batch.prompts, references, batch.seeds, settings)
            spent = time.perf_counter() - began
            for image, prompt, seed in pictures.flat(images, batch):
                file = out / f"{len(files):04d}-{slug(prompt)}-{seed}.png"
                pictures.write_png(file, image, {"prompt": prompt, "seed": seed, **metadata})
                files.append(file)
                sheet.append(image)
            total = len(prompts) * len(seeds)
            left = spent / (len(batch.prompts) * len(batch.seeds)) * (total - len(files))
            say(f"{len(files)}/{total} pictures, {spent:.1f} s this batch, about {left:.0f} s left")
    if len(files) > 1:
        pictures.write_grid(out / "grid.png", sheet, columns=len(seeds) if len(seeds) > 1 else None)
        files.append(out / "grid.png")
    run = {"prompts": prompts, "seeds": seeds, **metadata, "files": [file.name for file in files]}
    pictures.write_text(out / "settings.json", json.dumps(run, indent=2) + "\n")
    print(files[-1])


def _settings(config, weights, prompts: list[str], references: list[tuple[int, int]]):
    from clvr_jax.diffusion.schedule import ROUNDINGS
    from clvr_jax.generate.prompt import TEXT_BUCKETS
    from launch.drawing.models import settings_of

    settings = dataclasses.replace(
        settings_of(weights, config),
        text_tokens=_text_tokens(weights, prompts)
        if config.text_tokens == -1
        else config.text_tokens,
    )
    if references:
        height, width = references[0]
        settings = dataclasses.replace(
            settings,
            height=height if config.height == -1 else config.height,
            width=width if config.width == -1 else config.width,
        )
    known = sorted({*TEXT_BUCKETS, *weights.texts})
    if settings.text_tokens not in known:
        raise ValueError(
            f"text_tokens is {settings.text_tokens}; choose from {', '.join(map(str, known))}"
        )
    if settings.rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {settings.rounding!r}; choose from {ROUNDINGS}")
    if config.batch < 1:
        raise ValueError(f"batch is {config.batch}; it must be at least 1")
    if references and settings.pattern != weights.pattern:
        print(
            f"note: these weights were trained with the {weights.pattern!r} attention pattern, not "
            f"with {settings.pattern!r}; edits will be off-distribution",
            file=sys.stderr,
        )
    return settings


def _text_tokens(weights, prompts: list[str]) -> int:
    """The shortest text length the weights were trained with that all prompts fit into."""
    from clvr_jax.generate.prompt import render
    from launch.build import load_tokenizer

    if len(weights.texts) == 1:
        return weights.texts[0]
    rows = load_tokenizer(weights.found.shared["tokenizer"])(
        [render(prompt) for prompt in prompts], add_special_tokens=False
    )["input_ids"]
    longest = max(map(len, rows))
    return next((text for text in weights.texts if text >= longest), weights.texts[-1])


def _prompts() -> list[str]:
    prompts = list(_PROMPT.value)
    if _PROMPTS_FILE.value:
        lines = Path(_PROMPTS_FILE.value).read_text().splitlines()
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt was given; use --prompt=TEXT or --prompts_file=FILE")
    return prompts


def _seeds() -> list[int]:
    try:
        seeds = [int(seed) for seed in _SEEDS.value]
    except ValueError as error:
        raise ValueError(f"--seeds={','.join(_SEEDS.value)}: whole numbers are needed") from error
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"--seeds={','.join(_SEEDS.value)}: give numbers from 0 to 4294967295")
    return seeds


def _loras() -> list[tuple[str, float]]:
    loras = []
    for text in _LORA.value:
        match = re.fullmatch(r"(.+?)(?::(-?\d+(?:\.\d+)?))?", text)
        loras.append((match[1], float(match[2] or 1.0)))
    return loras


if __name__ == "__main__":
    run(main)
