"""Toy VAEs and text encoders of the reference with random, non-degenerate weights."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.parity.reference import normal, randomize


@functools.cache
def vae(
    widths: tuple[int, ...] = (8, 16, 16, 16),
    decoder_widths: tuple[int, ...] | None = None,
    layers: int = 1,
    latent: int = 4,
    groups: int = 4,
    seed: int = 0,
) -> AutoencoderKLFlux2:
    """A toy VAE whose latents differ in scale by channel and whose pictures have contrast.

    The running statistics of the latent BatchNorm are near, not at, those of the encoder's output;
    some variances are so small that its epsilon of 1e-4 shows.
    """
    levels = len(widths)
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        decoder_block_out_channels=decoder_widths,
        layers_per_block=layers,
        latent_channels=latent,
        norm_num_groups=groups,
    ).eval()
    model.requires_grad_(False)
    randomize(model, seed, {"conv2": 0.7, "to_q": 1.5, "to_k": 1.5})
    factor = 2 ** (levels - 1)
    rng = np.random.default_rng(seed + 1)
    images = torch.from_numpy(rng.uniform(-1, 1, (4, 3, 8 * factor, 8 * factor))).float()
    scales = torch.from_numpy(np.geomspace(0.02, 2.0, latent)).float()
    mean = model.encode(images).latent_dist.mean
    gain = scales / mean.std((0, 2, 3))
    model.quant_conv.weight[:latent] *= gain[:, None, None, None]
    model.quant_conv.bias[:latent] *= gain
    latents = Flux2KleinPipeline._patchify_latents(model.encode(images).latent_dist.mean)
    spread = latents.var((0, 2, 3))
    jitter = torch.from_numpy(rng.uniform(0.5, 2.0, spread.shape)).float()
    shift = torch.from_numpy(rng.normal(0, 0.3, spread.shape)).float()
    model.bn.running_var.copy_(spread * jitter)
    model.bn.running_mean.copy_(latents.mean((0, 2, 3)) + shift * spread.sqrt())
    pictures = model.decode(_denormalized(model, normal(4, 4, 4, 4 * latent, seed=seed))).sample
    gain = 0.45 / pictures.std((0, 2, 3))
    model.decoder.conv_out.weight *= gain[:, None, None, None]
    model.decoder.conv_out.bias.sub_(pictures.mean((0, 2, 3))).mul_(gain)
    return model


def _denormalized(model: AutoencoderKLFlux2, latents: np.ndarray) -> torch.Tensor:
    """Normalised (b, rows, cols, 4 * latent) to what the reference decoder takes (b, c, h, w)."""
    x = torch.from_numpy(latents).to(model.dtype).permute(0, 3, 1, 2)
    deviation = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps)
    x = x * deviation.to(x.dtype)[:, None, None] + model.bn.running_mean.to(x.dtype)[:, None, None]
    return Flux2KleinPipeline._unpatchify_latents(x)


@torch.no_grad()
def encode(model: AutoencoderKLFlux2, images: np.ndarray) -> np.ndarray:
    """Images (b, H, W, 3) in [-1, 1] to normalised latents (b, rows, cols, 4 * latent)."""
    x = torch.from_numpy(images).to(model.dtype).permute(0, 3, 1, 2)
    pipe = Flux2KleinPipeline.__new__(Flux2KleinPipeline)
    object.__setattr__(pipe, "vae", model)
    return pipe._encode_vae_image(x, None).permute(0, 2, 3, 1).float().numpy()


@torch.no_grad()
def decode(model: AutoencoderKLFlux2, latents: np.ndarray) -> np.ndarray:
    """Normalised latents (b, rows, cols, 4 * latent) to unclamped images (b, H, W, 3)."""
    return model.decode(_denormalized(model, latents)).sample.permute(0, 2, 3, 1).float().numpy()


@functools.cache
def text_encoder(
    layers: int = 29,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_width: int = 12,
    vocab: int = 384,
    tied: bool = True,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A toy Qwen3 with grouped heads whose width is not width / heads."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_width,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    model = Qwen3ForCausalLM(config).eval()
    randomize(model, seed, {"o_proj": 0.4, "down_proj": 0.6})
    return model.requires_grad_(False)


@torch.no_grad()
def text_features(
    model: Qwen3ForCausalLM,
    ids: np.ndarray,
    lengths: np.ndarray,
    layers: Sequence[int] = (9, 18, 27),
) -> np.ndarray:
    """Hidden states of the chosen layers side by side, as the reference pipeline stacks them."""
    mask = torch.from_numpy(np.arange(ids.shape[1])[None] < lengths[:, None]).long()
    out = model(
        torch.from_numpy(ids).long(),
        attention_mask=mask,
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.cat([out.hidden_states[k] for k in layers], dim=-1).float().numpy()
