"""Models written in the layouts of released ones: diffusers' pipelines, transformers' folders."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# special tokens of Qwen's tokenizers, in the order of their numbers here; with those of pictures
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
SEEING = (*SPECIAL, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VLM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# a picture of any size is resized to 4096 to 65536 pixels: 4 to 64 tokens
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.42.1",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def with_picture_tokens(config: Any, tokenizer: Any) -> Any:
    """Return a Qwen3-VL's config with the numbers that a tokenizer has for pictures."""
    number = tokenizer.convert_tokens_to_ids
    return dataclasses.replace(
        config,
        image_token=number("<|image_pad|>"),
        video_token=number("<|video_pad|>"),
        vision_start=number("<|vision_start|>"),
        vision_end=number("<|vision_end|>"),
    )


def preprocessor(vision: Any, least: int, most: int) -> dict[str, Any]:
    """Return preprocessor_config.json for a vision tower; pictures are resized to these pixels."""
    return PREPROCESSOR | {
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.temporal_patch,
        "size": {"shortest_edge": least, "longest_edge": most},
    }


def write_pipeline(
    out: Path, weights: Mapping[str, tuple[Any, Any]], tokenizer: Any, *, distilled: bool
) -> None:
    """Write a klein folder as diffusers does, into a folder that is not there yet.

    Args:
      out: the folder.
      weights: (config, parameter tree) of transformer, vae and text_encoder; all leaves of one
        type, which the files have.
      tokenizer: a Hugging Face tokenizer.
      distilled: what the pipeline says of its transformer.
    """
    for name, (config, tree) in weights.items():
        write_component(out / name, name, config, tree)
    (out / "scheduler").mkdir()
    _write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(out / "model_index.json", INDEX | {"is_distilled": distilled})
    tokenizer.save_pretrained(out / "tokenizer")


def write_model(
    out: Path, config: Any, tree: Any, tokenizer: Any, preprocessor: Mapping[str, Any]
) -> None:
    """Write a Qwen3-VL folder as transformers does, into a folder that is not there yet.

    Args:
      out: the folder.
      config: sizes.
      tree: parameters.
      tokenizer: with a chat template.
      preprocessor: content of preprocessor_config.json.
    """
    write_component(out, "vlm", config, tree)
    _write_json(out / "preprocessor_config.json", preprocessor)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = {"do_sample": True, "temperature": 0.7, "eos_token_id": stops}
    _write_json(out / "generation_config.json", generation)
    tokenizer.save_pretrained(out)


def write_component(out: Path, name: str, config: Any, tree: Any) -> None:
    """Write one component into a folder that is not there yet; see `write_pipeline`."""
    from conversion.components import Component
    from conversion.sinks import write_mapped
    from conversion.sources import TreeSource

    component = Component(name, "diffusers", out, config)
    out.mkdir(parents=True)
    (out / "config.json").write_text(component.config_text())
    table, stem = component.table("diffusers"), component.kind.stem
    write_mapped(out, TreeSource(tree), table, component.abstract(), stem=stem)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """Give a temporary sibling to write, which becomes `out` when all went well.

    Raises:
      FileExistsError: `out` is there already.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    os.replace(partial, out)
