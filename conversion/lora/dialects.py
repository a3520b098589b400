"""Tensor names of LoRA files in every dialect: whose module they adapt, and with what scale.

    transformer.<diffusers module>.lora_A.weight     diffusers and PEFT; alpha in the metadata
    diffusion_model.<BFL module>.lora_A.weight       BFL and ai-toolkit, perhaps <module>.alpha
    base_model.model.<module>.lora_A.weight          PEFT's own; alpha in adapter_config.json
    lora_unet_<BFL module with _>.lora_down.weight   kohya and musubi, with <module>.alpha

Where no alpha is given it equals the rank. Prefixes, module names and suffixes are understood in
any combination, since tools mix them. Reference: flux2_klein.md, section 6.4.
"""

import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from clvr_jax.weights import WeightsError

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"  # PEFT's folder
METADATA = "lora_adapter_metadata"  # diffusers' key in the safetensors header

_PREFIX = re.compile(r"^(base_model\.model\.|model\.)?(transformer\.|diffusion_model\.)?")
_FLAT_PREFIX = re.compile(r"^(lora_unet_|lora_transformer_|lycoris_)")
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<side>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|alpha)"
)
_NAMES = "lora_A and lora_B, or lora_down and lora_up"
_SIDES = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b", None: "alpha"}
_OTHER_NETWORKS = {
    r"\.lokr_": "LoKr (Kronecker) factors",
    r"\.hada_": "LoHa (Hadamard) factors",
    r"\.b?oft_": "orthogonal (OFT) factors",
    r"dora_scale|lora_magnitude_vector": "DoRA magnitudes",
    r"\.lora_mid\.": "Tucker-decomposed factors",
    r"\.diff$|\.diff_b$|\.set_weight$": "full weight differences",
    r"\.bias$": "biases",
}
_OTHER_MODELS = re.compile(r"text_encoder|text_model|lora_te|te\d?[._]|vae[._]|unet\.")


def parse(keys: Iterable[str], modules: Collection[str], file: str) -> dict[str, dict[str, str]]:
    """Return `{module: {"a": key, "b": key, "alpha": key}}` of a file's tensors, alpha optional.

    Args:
      keys: the names of all tensors.
      modules: every module that can be adapted, under its names in all checkpoint layouts.
      file: what errors call the file.

    Raises:
      WeightsError: there are no tensors, or a name belongs to another kind of network or model, to
        no known module, to a factor that has a tensor, or to a module without the other factor.
    """
    flat = {module.replace(".", "_"): module for module in modules}
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        for pattern, kind in _OTHER_NETWORKS.items():
            if re.search(pattern, key):
                raise WeightsError(file, key, kind, f"factors of a plain LoRA ({_NAMES})")
        match = _KEY.fullmatch(key)
        if match is None:
            raise WeightsError(file, key, "no LoRA tensor", f"a name with {_NAMES}, or .alpha")
        name = match["module"]
        if name not in modules:  # Qwen3-VL's own names begin with what is a prefix elsewhere
            name = _PREFIX.sub("", name, count=1)
        module = name if name in modules else flat.get(_FLAT_PREFIX.sub("", name, count=1))
        if module is None:
            raise WeightsError(file, key, *_unknown(name, modules))
        slots, side = found.setdefault(module, {}), _SIDES[match["side"]]
        if side in slots:
            found_too = f"{slots[side]} too, the same factor of {module}"
            raise WeightsError(file, key, found_too, "each factor once")
        slots[side] = key
    for module, slots in found.items():
        for side, name in (("a", "lora_A (lora_down)"), ("b", "lora_B (lora_up)")):
            if side not in slots:
                key = next(iter(slots.values()))
                raise WeightsError(file, key, "it alone", f"{name} of {module} beside it")
    if not found:
        raise WeightsError(file, None, "no tensors", "LoRA factors")
    return found


def _unknown(name: str, modules: Collection[str]) -> tuple[str, str, str]:
    """What is found, expected and advised about a name that is no module's."""
    if _OTHER_MODELS.match(name):
        return "another model's adapter (text encoder or VAE)", "this model's only", ""
    near = difflib.get_close_matches(_FLAT_PREFIX.sub("", name), modules, n=3, cutoff=0.5)
    hint = f", e.g. {', '.join(near)}" if near else ""
    return (
        f"an adapter of {name}",
        f"one of this model's linear layers{hint}",
        "was the file trained for this model and size?",
    )


def parse_config(text: str, file: str) -> dict[str, Any]:
    """Return PEFT's LoraConfig from JSON.

    Raises:
      WeightsError: it is not a JSON object.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightsError(file, "LoRA config", f"no JSON ({error})", "a JSON object") from error
    if not isinstance(config, dict):
        raise WeightsError(file, "LoRA config", f"JSON {type(config).__name__}", "a JSON object")
    return config


def scale(
    config: Mapping[str, Any], module: str, rank: int, alpha: float | None, file: str
) -> float:
    """Return what a module's product of factors is multiplied by: alpha / rank.

    Args:
      config: PEFT's LoraConfig, possibly empty.
      module: the module's name in the file's layout, which the config's patterns are about.
      rank: of its factors.
      alpha: value of its alpha tensor, if it has one.
      file: what errors call the file.

    Raises:
      WeightsError: the config asks for more than a plain LoRA or has another rank, two alphas
        disagree, or alpha is not finite.
    """
    for field in ("use_dora", "use_qalora", "lora_bias", "modules_to_save"):
        if config.get(field):
            raise WeightsError(file, "LoRA config", f"{field}={config[field]!r}", "a plain LoRA")
    stated = _patterned(config.get("rank_pattern"), module, config.get("r", rank))
    if stated != rank:
        raise WeightsError(file, module, f"rank {rank}", f"{stated}, as its config says")
    known = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if None not in (alpha, known) and not math.isclose(alpha, known, rel_tol=1e-2):
        raise WeightsError(file, module, f"an alpha tensor of {alpha}", f"its config's {known}")
    alpha = next((value for value in (alpha, known) if value is not None), rank)
    if not math.isfinite(alpha):
        raise WeightsError(file, module, f"alpha {alpha}", "a finite number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """First value whose pattern fits the end of a module's name, as PEFT matches it, or default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
