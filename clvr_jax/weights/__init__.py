"""Safetensors files, read as lazy views and written tensor by tensor, so that memory stays bounded.

Format: https://github.com/huggingface/safetensors#format; folders of several files as transformers
and diffusers write them. Headers are checked in full before any data is used.
"""

from clvr_jax.weights.blocks import is_finite
from clvr_jax.weights.header import WeightsError
from clvr_jax.weights.reader import SafetensorsReader, TensorInfo
from clvr_jax.weights.writer import write_safetensors

__all__ = ["SafetensorsReader", "TensorInfo", "WeightsError", "is_finite", "write_safetensors"]
