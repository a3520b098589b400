"""diffusers' FLUX.2 klein pipeline with our random weights, as its users run it.

Eager and through torch.compile, convolutions channels-last. The weights are carried over on the
device by the converter's own rule tables, so that the outputs can be compared.
"""

import copy
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers

from clvr_jax.generate.image import ImageModel
from clvr_jax.generate.prompt import render
from clvr_jax.models.flux2.config import transformer_to_json, vae_to_json
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3.config import to_json as text_to_json
from launch.bench.carry import carry, construct

_LAYERS = 36  # of the text encoder; the pipeline runs them all


class CompileTimeout(BaseException):
    """torch.compile took longer than its budget (torch wraps every `Exception` in its own)."""


class Tokenizer:
    """Feeds the pipeline the ids that ours is fed."""

    def __init__(self, ids: Any):
        self.ids = ids

    def apply_chat_template(self, messages, **_) -> str:
        """Return the rendered prompt of one user turn."""
        return render(messages[0]["content"])

    def __call__(self, text: str, max_length: int, **_) -> dict[str, torch.Tensor]:
        """Return one row of ids, padded in full, and its mask."""
        row = self.ids.encode(text)
        ids = torch.full((1, max_length), self.ids.pad_token_id, dtype=torch.int64)
        ids[0, : len(row)] = torch.tensor(row)
        mask = (torch.arange(max_length)[None] < len(row)).to(torch.int64)
        return {"input_ids": ids, "attention_mask": mask}


@dataclasses.dataclass
class Inputs:
    """What both sides are given.

    Attributes:
      prompts: plain prompts.
      pictures: reference images.
      noise: start of every picture (b, rows, cols, c), float32.
      fields: height, width, num_inference_steps and the like, by the pipeline's names.
      text_tokens: text length, padding included.
    """

    prompts: list[str]
    pictures: list[PIL.Image.Image]
    noise: np.ndarray
    fields: dict[str, Any]
    text_tokens: int


class Peer:
    """One way of running the pipeline; its calls return when their results are there."""

    def __init__(self, pipe: Any, inputs: Inputs):
        self.pipe, self.inputs = pipe, inputs
        self.device, self.dtype = pipe.transformer.device, pipe.transformer.dtype
        noise = torch.tensor(inputs.noise, device=self.device, dtype=self.dtype)
        self.noise = noise.permute(0, 3, 1, 2).contiguous()
        self.embeds = self._encode(inputs.prompts)
        self.guided = inputs.fields.get("guidance_scale", 1.0) > 1.0
        self.empty = self._encode([""] * len(inputs.prompts)) if self.guided else None
        self.latents = self._denoise()

    def parts(self) -> dict[str, Callable[[], None]]:
        """Return what can be timed alone; "denoise" includes encoding the references."""
        return {
            "text encode": lambda: self._ready(self._encode_all),
            "denoise": lambda: self._ready(self._denoise),
            "vae decode": lambda: self._ready(self._decode),
        }

    def generate(self) -> np.ndarray:
        """Return uint8 pictures (b, height, width, 3), from prompts and references."""
        i = self.inputs
        out = self._pipe(prompt=i.prompts, max_sequence_length=i.text_tokens, output_type="pt")[0]
        return (out * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _pipe(self, **fields) -> Any:
        i = self.inputs
        images = list(i.pictures) or None
        return self.pipe(image=images, latents=self.noise, return_dict=False, **i.fields, **fields)

    def _denoise(self) -> torch.Tensor:
        fields = {"prompt_embeds": self.embeds, "output_type": "latent"}
        if self.guided:
            fields["negative_prompt_embeds"] = self.empty
        return self._pipe(**fields)[0]

    @torch.no_grad()
    def _decode(self) -> torch.Tensor:
        return self.pipe.vae.decode(self.latents, return_dict=False)[0]

    def _encode_all(self) -> None:
        self._encode(self.inputs.prompts)
        if self.guided:  # as the pipeline does: once for every prompt
            self._encode([""] * len(self.inputs.prompts))

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> torch.Tensor:
        fields = {"device": self.device, "max_sequence_length": self.inputs.text_tokens}
        return self.pipe.encode_prompt(prompt=prompts, **fields)[0]

    def _ready(self, call: Callable[[], Any]) -> None:
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def build(model: ImageModel, pattern: str, guided: bool) -> Any:
    """Return the pipeline with our weights, on the GPU if JAX runs there.

    Raises:
      ValueError: the pipeline knows no such attention pattern, or torch sees no GPU.
    """
    import jax

    classes = {"full": diffusers.Flux2KleinPipeline, "kv": diffusers.Flux2KleinKVPipeline}
    if pattern not in classes:
        raise ValueError(f"diffusers has no attention pattern {pattern!r}; it has full and kv")
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise ValueError("JAX runs on a GPU that torch does not see; install torch for CUDA")
    if not gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    torch.set_float32_matmul_precision("high" if gpu else "highest")  # as JAX's default: TF32
    device = torch.device("cuda" if gpu else "cpu")
    nets, params = model.networks, model.params
    dtype = getattr(torch, str(jax.tree.leaves(params["transformer"])[0].dtype))
    networks = {
        "transformer": (nets.transformer.cfg, _transformer),
        "vae": (nets.vae.cfg, _vae),
        "text_encoder": (nets.text_encoder.cfg, _text_encoder),
    }
    made = {}
    for name, (cfg, make) in networks.items():
        made[name] = construct(make, cfg, device, dtype)
        carry(name, cfg, params[name], made[name])
    made["vae"].to(memory_format=torch.channels_last)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096
    )
    pipe = classes[pattern](
        scheduler=scheduler,
        tokenizer=Tokenizer(model.tokenizer),
        is_distilled=not guided,
        **made,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compiled(pipe: Any, mode: str) -> Any:
    """Return a pipeline over the same weights whose three networks go through torch.compile."""
    parts = {name: copy.copy(part) for name, part in pipe.components.items()}
    options = {"mode": mode, "dynamic": False}
    parts["transformer"].compile(**options)
    parts["text_encoder"] = _compiled_layers(pipe.text_encoder, options)
    for name in ("encode", "decode"):
        setattr(parts["vae"], name, torch.compile(getattr(pipe.vae, name), **options))
    made = type(pipe)(**parts, is_distilled=pipe.config.is_distilled)
    made.set_progress_bar_config(disable=True)
    return made


def _compiled_layers(encoder: Any, options: dict[str, Any]) -> Any:
    """A text encoder over the same weights, each layer compiled: one program serves them all."""
    made, inner = copy.copy(encoder), copy.copy(encoder.model)
    layers = [copy.copy(layer) for layer in encoder.model.layers]
    for layer in layers:
        layer.compile(**options)
    # a shallow copy shares the dict of its submodules
    made._modules, inner._modules = dict(encoder._modules), dict(encoder.model._modules)
    inner.layers, made.model = torch.nn.ModuleList(layers), inner
    return made


def warm(peer: Peer) -> Peer:
    """Call what has not been called yet, so that nothing is left to compile."""
    peer.generate()
    for call in peer.parts().values():
        call()
    return peer


def memory() -> dict[str, float]:
    """Return the peak of torch's GPU memory in GB; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {"torch_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}


def within_budget(call: Callable[[], Any], seconds: float) -> tuple[float, Any]:
    """Return the seconds that `call` took and its result.

    Raises:
      CompileTimeout: it was stopped after `seconds`.
    """

    def stop(signum, frame):
        raise CompileTimeout(f"torch.compile did not finish within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.perf_counter()
    try:
        result = call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return time.perf_counter() - start, result


def _transformer(cfg: Any) -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(**_fields(transformer_to_json(cfg)))


def _vae(cfg: Any) -> torch.nn.Module:
    return diffusers.AutoencoderKLFlux2(**_fields(vae_to_json(cfg)))


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "_class_name"}


def _text_encoder(cfg: Qwen3Config) -> torch.nn.Module:
    values = text_to_json(dataclasses.replace(cfg, layers=_LAYERS))
    for name in ("architectures", "model_type", "bos_token_id", "eos_token_id"):
        values.pop(name)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values, rope_parameters=rope))
