"""Mistakes made in the reference, and how much they matter."""

import numpy as np
import torch

from tests.parity import vlm
from tests.parity.reference import relative_error


class Mistaken:
    """A toy model in which mistakes are made, and how far its answers then are from the right ones.

    Every mistake is made through a pytest monkeypatch and so undone after the test.
    """

    def __init__(self, name: str, patch):
        self.model = vlm.model(**vlm.MODELS[name])
        self.visual, self.text = self.model.model.visual, self.model.model.language_model
        self.batch = vlm.batch(vlm.EVERY, vlm.MODELS[name].get("patch", 4))
        self.right_logits = vlm.logits(self.model, self.batch)
        self.right_features = np.concatenate(vlm.features(self.model, self.batch))
        self.right_positions, _ = vlm.rope_index(self.model, self.batch)
        self.patch = patch

    def weight(self, owner: torch.nn.Module, name: str, value: torch.Tensor) -> None:
        """Use another parameter, of any shape."""
        weight = torch.nn.Parameter(value, requires_grad=False)
        self.patch.setitem(owner._parameters, name, weight)

    def forward(self, owner: torch.nn.Module, function) -> None:
        """Have another function compute what a module does."""
        self.patch.setattr(owner, "forward", function)

    def logits(self, **more) -> float:
        """Relative error of the logits."""
        return relative_error(vlm.logits(self.model, self.batch, **more), self.right_logits)

    def with_positions(self, positions: np.ndarray) -> float:
        """Relative error of the logits with other positions (b, l, 3)."""
        positions = torch.from_numpy(np.ascontiguousarray(positions)).permute(2, 0, 1)
        return self.logits(position_ids=positions)

    def with_deepstack(self, change) -> float:
        """Relative error of the logits after `change(embeddings, image mask, parts)`."""

        def hook(_, args, given):
            mask, parts = given["visual_pos_masks"], given["deepstack_visual_embeds"]
            embeds, parts = change(given["inputs_embeds"].clone(), mask, parts)
            return args, {**given, "inputs_embeds": embeds, "deepstack_visual_embeds": parts}

        hook = self.text.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return self.logits()
        finally:
            hook.remove()

    def parts(self) -> np.ndarray:
        """Relative error of each part of the image features: the main one, then DeepStack's."""
        wrong = np.concatenate(vlm.features(self.model, self.batch))
        pairs = zip(wrong.swapaxes(0, 1), self.right_features.swapaxes(0, 1), strict=True)
        return np.array([relative_error(part, right) for part, right in pairs])
