"""diffusers and transformers training the same model on the same step, as their users run them.

Eager PyTorch with fused AdamW, gradients clipped by their norm, checkpointed layers where ours are
rematerialised, adapters through PEFT. The first step has our weights, inputs, noise and noise
levels, so that losses can be compared; later steps repeat its draws.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import einops
import jax
import numpy as np
import torch

from clvr_jax.sft.image.loss import draw
from clvr_jax.typing import Params
from launch.bench import train_jobs
from launch.bench.carry import carry, construct
from launch.bench.train_jobs import Case, Work

# the layers whose kernels have adapters, as in the stages' configs
_ADAPTED = {
    "image": ("transformer_blocks.", "single_transformer_blocks."),
    "vlm": ("model.language_model.layers.",),
}


def name(case: Case) -> str:
    """Return the library of a case."""
    return "diffusers" if case.subject == "image" else "transformers"


def check(case: Case, work: Work) -> None:
    """Tell what the peer cannot run, before anything is made.

    Raises:
      ValueError: it cannot.
    """
    if work.job.mesh is not None:
        raise ValueError("the peer runs on one device; show JAX one, or leave --peer out")
    if case.subject == "image" and case.features != train_jobs.PRECOMPUTED:
        raise ValueError("the peer trains on text features and latents: --features=precomputed")
    if case.train != ".*":
        raise ValueError("the peer trains all parameters, or adapters; leave --train out")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise ValueError("JAX runs on a GPU that torch does not see; install torch for CUDA")


class Peer:
    """The reference model and its optimiser; a call makes one step.

    Args:
      case: what is measured.
      work: the same on our side.
      params: our weights, which are copied.
      seed: of our run.
    """

    def __init__(self, case: Case, work: Work, params: Params, seed: int):
        gpu = jax.default_backend() == "gpu"
        if not gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
        torch.set_float32_matmul_precision("high" if gpu else "highest")  # as JAX's default: TF32
        self.device = torch.device("cuda" if gpu else "cpu")
        self.case = case
        self.compute = torch.float32 if case.precision == "float32" else torch.bfloat16
        # masters in float32 as accelerate keeps them; what is frozen in the type to compute in
        wide = case.precision != "bfloat16" and not case.lora
        kind, make = (
            ("transformer", _transformer) if case.subject == "image" else ("vlm", _qwen3_vl)
        )
        dtype = torch.float32 if wide else self.compute
        self.model = construct(make, work.cfg, self.device, dtype).train()
        carry(kind, work.cfg, params, self.model)
        if case.remat != "none":
            _checkpointed(self.model)
        if case.lora:
            self._adapt(torch.bfloat16 if case.precision == "bfloat16" else torch.float32)
        else:
            self.model.requires_grad_(True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        given = work.job.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=given.learning_rate,
            betas=given.momentum,
            eps=given.eps,
            weight_decay=given.weight_decay,
            fused=True,
        )
        self.clip = given.clip_norm
        losses = self._image if case.subject == "image" else self._vlm
        self.losses: list[Callable[[], torch.Tensor]] = list(losses(work, seed))

    def __call__(self) -> None:
        """Make one step."""
        self._step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def loss(self) -> dict[str, float]:
        """Make one step; return its loss and gradient norm."""
        loss, norm = self._step()
        return {"loss": float(loss), "grad_norm": float(norm)}

    def report(self) -> dict[str, Any]:
        """Return what a result file says of the peer alone."""
        found: dict[str, Any] = {
            "trained": sum(p.numel() for p in self.trained),
            "threads": torch.get_num_threads(),
        }
        if self.device.type == "cuda":
            found["torch_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        return found

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros((), device=self.device)
        for loss in self.losses:
            with self._autocast():
                value = loss() / len(self.losses)
            value.backward()
            total += value.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _autocast(self) -> Any:
        mixed = self.case.precision == "mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def _adapt(self, dtype: torch.dtype) -> None:
        """Give every adapted layer a pair of new matrices, the second zero, as ours begin."""
        from peft import LoraConfig

        within = _ADAPTED[self.case.subject]
        layers = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and path.startswith(within)
        ]
        rank = self.case.lora
        self.model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def _tensor(self, x: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = np.asarray(x, np.float32) if np.dtype(x.dtype).kind not in "iu" else np.asarray(x)
        return torch.tensor(values, device=self.device, dtype=dtype)

    def _image(self, work: Work, seed: int) -> Iterator[Callable[[], torch.Tensor]]:
        """The flow-matching loss of every micro-batch, with our noise and levels of step 0."""
        layout, nets = work.step.static, work.networks
        key = jax.random.fold_in(jax.random.key(seed), 0)
        ids = self._ids(layout)
        for i in range(self.case.accumulation):
            rows = jax.tree.map(lambda x, i=i: x[i], work.arrays)
            count = len(rows["weights"])
            step_key = jax.random.fold_in(key, i)
            t, eps = draw(step_key, count, layout, nets, train_jobs.settings(work))
            t, eps = self._tensor(t), self._tensor(eps)
            tokens = lambda x: self._tensor(einops.rearrange(x, "b y x c -> b (y x) c"))
            x0 = tokens(rows["latents"])
            references = [tokens(x).to(self.compute) for x in rows["reference_latents"]]
            text = self._tensor(rows["text"], self.compute)
            sigma = t[:, None, None]
            x_t = ((1 - sigma) * x0 + sigma * eps).to(self.compute)
            inputs = {
                "hidden_states": torch.cat([x_t, *references], dim=1),
                "encoder_hidden_states": text,
                "timestep": t if self.compute == torch.float32 else t.to(self.compute),
                "img_ids": ids[1].expand(count, -1, -1),
                "txt_ids": ids[0].expand(count, -1, -1),
            }
            target = eps - x0
            yield lambda inputs=inputs, target=target: self._velocity_error(inputs, target)

    def _velocity_error(self, inputs: dict[str, torch.Tensor], target: torch.Tensor):
        out = self.model(**inputs, guidance=None, return_dict=False)[0][:, : target.shape[1]]
        return torch.nn.functional.mse_loss(out.float(), target)

    def _ids(self, layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (1, tokens, 4) of text and pictures, by the reference pipeline."""
        from diffusers import Flux2KleinPipeline as Pipeline

        text = Pipeline._prepare_text_ids(torch.zeros(1, layout.text, 1))
        picture = [Pipeline._prepare_latent_ids(torch.zeros(1, 1, *layout.noise))]
        if layout.references:
            references = [torch.zeros(1, 1, *size) for size in layout.references]
            picture.append(Pipeline._prepare_image_ids(references))
        return text.to(self.device), torch.cat(picture, dim=1).to(self.device)

    def _vlm(self, work: Work, seed: int) -> Iterator[Callable[[], torch.Tensor]]:
        """The mean cross-entropy of every micro-batch."""
        vision, count = work.cfg.vision, work.step.rows.shape[1]
        example = train_jobs.conversation(self.case, work.cfg)
        ids = self._tensor(example.ids).long()
        labels = torch.where(torch.tensor(example.trained, device=self.device), ids, -100)
        inputs = {"input_ids": ids.expand(count, -1), "labels": labels.expand(count, -1)}
        if example.pictures:
            grey = np.stack([picture.patches for _, picture in example.pictures])
            grey = einops.rearrange(grey, "f p (c places) -> (f p) c places", c=vision.in_channels)
            levels = work.job.stage.constants["levels"]
            values = levels[np.arange(len(levels))[:, None], grey]
            pixels = np.repeat(values[:, :, None], vision.temporal_patch, axis=2)
            pixels = self._tensor(pixels.reshape(len(pixels), -1), self.compute)
            grids = [(1, *picture.grid) for _, picture in example.pictures]
            inputs |= {
                "pixel_values": pixels.repeat(count, 1),
                "image_grid_thw": torch.tensor(grids, device=self.device).repeat(count, 1),
                "mm_token_type_ids": (inputs["input_ids"] == work.cfg.image_token).int(),
            }
        # every micro-batch holds the same conversation
        for _ in range(self.case.accumulation):
            yield lambda: self.model(**inputs, use_cache=False).loss


def _transformer(cfg: Any) -> torch.nn.Module:
    import diffusers

    from clvr_jax.models.flux2.config import transformer_to_json

    values = {k: v for k, v in transformer_to_json(cfg).items() if k != "_class_name"}
    return diffusers.Flux2Transformer2DModel(**values)


def _qwen3_vl(cfg: Any) -> torch.nn.Module:
    import transformers

    from clvr_jax.models.qwen3_vl.config import to_json

    values = {k: v for k, v in to_json(cfg).items() if k != "model_type"}
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**values))


def _checkpointed(model: Any) -> None:
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.enable_gradient_checkpointing()
