"""transformers' Qwen3-VL with our random weights, as its users run it: eager, `generate`."""

import os
from typing import Any

import numpy as np
import torch
import transformers

from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig, to_json
from launch.bench.carry import carry, construct


class Peer:
    """The reference model and the calls that stand beside ours.

    Args:
      case: what is measured.
      cfg: sizes.
      params: our weights, stacked.
      ids: tokens of the conversation.
      threads: of torch on a CPU.
    """

    def __init__(self, case: Any, cfg: Qwen3VLConfig, params: Any, ids: Any, threads: int | None):
        import jax

        gpu = jax.default_backend() == "gpu"
        if gpu and not torch.cuda.is_available():
            raise ValueError("JAX runs on a GPU that torch does not see; install torch for CUDA")
        if not gpu:
            torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high" if gpu else "highest")
        self.device = torch.device("cuda" if gpu else "cpu")
        self.dtype = getattr(torch, case.dtype)
        self.case, self.cfg = case, cfg
        values = to_json(cfg)
        make = lambda cfg: transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(**{k: v for k, v in values.items() if k != "model_type"})
        )
        self.model = construct(make, cfg, self.device, self.dtype)
        carry("vlm", cfg, params, self.model)
        self.model.generation_config.eos_token_id = None
        self.ids = torch.as_tensor(ids[: case.prompt][None], device=self.device)
        side = case.picture // cfg.vision.patch
        pixels = torch.rand(side * side, cfg.vision.patch_width, device=self.device)
        self.pixels = pixels.to(self.dtype) * 2 - 1
        self.grid = torch.tensor([[1, side, side]], device=self.device)
        self.last: dict[int, Any] = {}

    @torch.inference_mode()
    def look(self) -> None:
        """Features of one picture."""
        self.model.model.visual(self.pixels, grid_thw=self.grid)
        self._wait()

    @torch.inference_mode()
    def prefill(self) -> None:
        """Read the prompt and score the next token."""
        self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self._wait()

    @torch.inference_mode()
    def decode(self, b: int, tokens: int) -> None:
        """Continue a batch whose prompt has been read, one forward pass a token, greedily."""
        cache, scores, length = self.last.get(b) or self._start(b)
        made = []
        for _ in range(tokens):
            token = scores.argmax(-1, keepdim=True)
            made.append(token)
            out = self.model(
                input_ids=token,
                past_key_values=cache,
                use_cache=True,
                position_ids=torch.full((3, b, 1), length, device=self.device),
            )
            scores, length = out.logits[:, -1].float(), length + 1
        self.last[b] = cache, scores, length
        self.made = torch.cat(made, dim=1)
        self._wait()

    def same_tokens(self, b: int, ours: np.ndarray) -> float:
        """Return the share of the first tokens that agree with ours (b, n)."""
        self.last.pop(b)
        self.decode(b, ours.shape[1])
        self.last.pop(b)
        return float((self.made.cpu().numpy() == ours).mean())

    def _start(self, b: int) -> tuple[Any, torch.Tensor, int]:
        out = self.model(input_ids=self.ids.repeat(b, 1), use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].float(), self.case.prompt

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
