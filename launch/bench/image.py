"""The image benchmark: the compiled programs of `clvr_jax.generate.image`, alone and together."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from clvr_jax import tree
from clvr_jax.generate import image
from clvr_jax.generate.image import ImageModel, Networks, Settings
from clvr_jax.generate.prompt import tokenize
from clvr_jax.generate.references import prepare
from clvr_jax.models.flux2 import config as flux2
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.flux2.vae import Vae
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3.decoder import Decoder
from launch import build as root
from launch.bench import flops, machine, programs
from launch.bench.rivals import Rivals
from launch.bench.timing import Timing, measure
from launch.bench.weights import random_params

PROMPT_TOKENS = 60  # real tokens of the made-up prompt; the rest of the text length is padding


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      model: a key of `MODELS`.
      settings: size, steps, guidance, text length and pattern.
      references: reference images, each of the size of the picture.
      batch: pictures made together, each of its own prompt.
      dtype: of weights and activations.
      scan: stacked layers in one scan, or unrolled.
    """

    model: str
    settings: Settings
    references: int = 0
    batch: int = 1
    dtype: str = "bfloat16"
    scan: bool = True


MODELS = {
    "klein_4b": ("klein_4b", "klein", "qwen3_4b"),
    "klein_9b": ("klein_9b", "klein", "qwen3_8b"),
    "toy": ("tiny", "tiny", "tiny"),
    "mid": (
        flux2.TransformerConfig(
            8, 64, 2, 4, text_width=3 * 256, channels=64, rope_axes=(16, 16, 16, 16)
        ),
        flux2.VaeConfig(widths=(32, 64, 128, 128), latent_channels=16, layers_per_block=1),
        qwen3.Qwen3Config(4096, 256, 36, 8, 4, 32, 768, 1e6, 1e-6, tied=True),
    ),
}


class Ids:
    """Stands in for a tokenizer: a prompt of random ids, and a shorter one for the empty prompt."""

    pad_token_id = 0

    def __init__(self, vocab: int, length: int):
        rng = np.random.default_rng(0)
        self.ids = rng.integers(1, vocab, min(PROMPT_TOKENS, length)).tolist()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of a rendered prompt."""
        empty = "user\n<|im_end|>" in text
        return self.ids[: min(13, len(self.ids))] if empty else self.ids


def networks(model: str, scan: bool = True) -> Networks:
    """Return the networks of a key of `MODELS`, the text encoder cut where klein stops reading."""
    transformer, vae, text = MODELS[model]
    transformer = flux2.TRANSFORMER_VARIANTS.get(transformer, transformer)
    vae = flux2.VAE_VARIANTS.get(vae, vae)
    text = qwen3.VARIANTS.get(text, text).as_text_encoder()
    return Networks(Transformer(transformer, scan=scan), Decoder(text, scan=scan), Vae(vae))


def build(case: Case) -> ImageModel:
    """Return the networks with random weights on the default device.

    Raises:
      ValueError: the size of the picture is no multiple of the VAE's factor.
    """
    nets = networks(case.model, case.scan)
    image.layout_of(nets, case.settings)  # a wrong size is told before weights are made
    stacked = (*flux2.STACKED, *qwen3.STACKED)
    params = {
        name: random_params(abstract, seed, stacked if name != "vae" else ())
        for seed, (name, abstract) in enumerate(root.abstract(nets, jnp.dtype(case.dtype)).items())
    }
    if not case.scan:
        params = root.unrolled(params)
    tokenizer = Ids(nets.text_encoder.cfg.vocab, case.settings.text_tokens)
    return ImageModel(nets, jax.block_until_ready(params), tokenizer)


def prompts_of(case: Case) -> list[str]:
    """Return the prompts of a batch."""
    return [f"prompt {i}" for i in range(case.batch)]


def pictures_of(case: Case) -> list[PIL.Image.Image]:
    """Return the reference images: random pixels."""
    return list(_pictures(case.references, case.settings.height, case.settings.width))


@functools.cache
def _pictures(count: int, height: int, width: int) -> tuple[PIL.Image.Image, ...]:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return tuple(PIL.Image.fromarray(one) for one in pixels)


def costs(nets: Networks, settings: Settings, references: int, batch: int = 1) -> dict[str, int]:
    """Return the FLOPs of every compiled program of pictures, each of one prompt.

    Args:
      nets: the networks.
      settings: how they sample.
      references: of each, of the size of the picture.
      batch: pictures together.
    """
    size, guided = (settings.height, settings.width), settings.guidance != 1.0
    layout = image.layout_of(nets, settings, [size] * references)
    text = flops.text_encoder(nets.text_encoder.cfg, settings.text_tokens)
    found = {"text encode": (batch + guided) * text}
    if references:
        found["reference encode"] = references * flops.vae_encode(nets.vae.cfg, *size)
    if references and layout.rule.cacheable:
        found["reference cache"] = flops.references(nets.transformer.cfg, layout)
        layout = layout.with_cache()
    evaluation = flops.transformer(nets.transformer.cfg, layout)
    found["denoise"] = batch * settings.evaluations * evaluation
    found["vae decode"] = batch * flops.vae_decode(nets.vae.cfg, *size)
    return found


def components(model: ImageModel, case: Case, part: Callable[..., Any]) -> None:
    """Hand every compiled program to `part(name, call, flops)` in the order `generate` runs them.

    `part` returns the result of the call, which the next programs take.
    """
    nets, params, settings = model.networks, model.params, case.settings
    references = [prepare(picture) for picture in pictures_of(case)]
    layout = image.layout_of(nets, settings, [r.shape[:2] for r in references])
    guided = settings.guidance != 1.0
    cost = costs(nets, settings, len(references), case.batch)
    texts = prompts_of(case) + [""] * guided
    ids, lengths = map(jnp.asarray, tokenize(model.tokenizer, texts, settings.text_tokens))
    text = part(
        "text encode",
        lambda: image.encode_text(nets, params["text_encoder"], ids, lengths),
        cost["text encode"],
    )
    read = lambda: image.reference_tokens(nets, params["vae"], references, text.dtype)
    if references:
        tokens = part("reference encode", read, cost["reference encode"])
    else:
        tokens = read()
    cache = None
    if references and layout.rule.cacheable:
        cache = part(
            "reference cache",
            lambda: image.extend_cache(
                nets, layout, params["transformer"], model.adapters, tokens, None
            ),
            cost["reference cache"],
        )
        layout, tokens = layout.with_cache(), tokens[:, :0]
    denoise = functools.partial(
        image.denoise,
        nets,
        layout,
        settings.steps,
        settings.rounding,
        params["transformer"],
        model.adapters,
        noise_of(model, case),
        text[: case.batch],
        tokens,
        cache,
        text[case.batch :] if guided else None,
        jnp.float32(settings.guidance),
    )
    latents = part("denoise", denoise, cost["denoise"])
    part(
        "vae decode",
        lambda: image.decode(nets, params["vae"], latents),
        cost["vae decode"],
    )


def run(
    case: Case,
    repeat: int,
    peer_compile: str | None = None,
    peer_budget: float = 180,
    check_hlo: bool = False,
) -> dict[str, Any]:
    """Measure a case; return the report of the result file.

    Args:
      case: what to measure.
      repeat: timed calls of every part.
      peer_compile: None for no peer; "none" for eager diffusers beside us, or that and a
        torch.compile mode.
      peer_budget: seconds that torch.compile may take.
      check_hlo: report the copies of weights in the denoising program (compiles it once more).

    Raises:
      RuntimeError: a component's output is not finite.
      ValueError: the peer cannot run this case.
    """
    model = build(case)
    limit = machine.limits(case.dtype)
    rivals = Rivals(model, case, peer_compile, peer_budget)
    parts: dict[str, dict[str, Any]] = {}

    def part(name: str, call: Callable[[], Any], cost: int) -> Any:
        timings, results = measure({"ours": call, **rivals.part(name)}, repeat)
        _require_finite(name, results["ours"])
        parts[name] = describe(timings.pop("ours"), cost, limit)
        rivals.record(name, timings)
        if check_hlo and name == "denoise":
            copies = programs.weight_copies(call, model.params["transformer"], case.scan)
            parts[name]["weight_copies"] = copies
        return results["ours"]

    components(model, case, part)
    parts["denoise"]["step_ms"] = round(parts["denoise"]["median_ms"] / case.settings.steps, 4)
    whole = lambda: picture(model, case)
    timings, results = measure({"ours": whole, **rivals.whole()}, repeat)
    pixels = results["ours"]
    timing = timings.pop("ours")
    total = describe(timing, sum(one["flop"] for one in parts.values()), limit)
    total["compile_s"] = round(sum(one["compile_s"] for one in parts.values()), 3)
    total["images_per_s"] = round(case.batch / timing.median, 4)
    rivals.record("end to end", timings)
    return {
        "case": dataclasses.asdict(case),
        "limits": limit,
        "weights_gb": {k: round(tree.nbytes(v) / 1e9, 3) for k, v in model.params.items()},
        "components": parts,
        "end_to_end": total,
        "pixels": {"mean": float(pixels.mean()), "std": float(pixels.std())},
        "memory": machine.memory(),
        **rivals.report(parts, total, results),
    }


def picture(model: ImageModel, case: Case) -> np.ndarray:
    """Return pictures (b, height, width, 3), uint8, from prompts, reference images and noise."""
    references = [prepare(one) for one in pictures_of(case)]
    noise = noise_of(model, case)
    return image.generate(model, prompts_of(case), references, (0,), case.settings, noise)[:, 0]


def noise_of(model: ImageModel, case: Case) -> jax.Array:
    """Return the start of every picture, float32."""
    layout = image.layout_of(model.networks, case.settings)
    return image.draw_noise(model.networks, layout, range(case.batch))


def describe(timing: Timing, cost: int, limit: dict[str, Any]) -> dict[str, Any]:
    """Return a timing with its rates."""
    rate = cost / timing.median / 1e12
    return {
        **timing.report(),
        "flop": cost,
        "tflops": round(rate, 3),
        "share_of_limit": round(rate / limit["limit_tflops"], 4),
    }


def _require_finite(name: str, result: Any) -> None:
    for leaf in jax.tree.leaves(result):
        if not bool(jnp.isfinite(leaf.astype(jnp.float32)).all()):
            raise RuntimeError(f"{name}: the output is not finite; the timing would mean nothing")
