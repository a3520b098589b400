"""FLUX.2's autoencoder, channels last, with the 2x2 patches and the latent BatchNorm inside.

Latents here are what the transformer speaks: (b, rows, cols, 4 c), patchified and normalised.
Reference: BFL `autoencoder.py`; diffusers does patches and BatchNorm in its pipeline instead.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from clvr_jax.kernels.attention import attend
from clvr_jax.models.flux2.config import VaeConfig
from clvr_jax.models.layers import Conv, GroupNorm, Linear
from clvr_jax.typing import Array, Float, Images, Params

Picture = Float[Array, "b height width c"]
Resampled = Float[Array, "b _ _ _"]  # another size or width


class Vae(nn.Module):
    """Encoder to the posterior mean, decoder back to pixels."""

    cfg: VaeConfig

    def setup(self):
        c = self.cfg
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = Linear(2 * c.latent_channels, bias=True)  # 1x1
        self.post_quant_conv = Linear(c.latent_channels, bias=True)
        self.bn = LatentNorm(c)

    def encode(self, images: Images) -> Float[Array, "b rows cols latent"]:
        """Return normalised latents; the posterior mean, never a sample.

        Args:
          images: values in [-1, 1], sides multiples of `cfg.factor`.

        Raises:
          ValueError: a side is not a multiple of the factor.
        """
        mean, _ = self.posterior(images)
        return self.bn.normalise(patches(mean))

    def posterior(self, images: Images) -> tuple[Resampled, Resampled]:
        """Return mean and log variance of the latent picture, neither patchified nor normalised.

        Args, Raises: as `encode`.
        """
        factor = self.cfg.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"image sides must be multiples of {factor}, got {images.shape[1:3]}; crop first"
            )
        moments = self.quant_conv(self.encoder(images))
        channels = self.cfg.latent_channels
        # the bounds of the reference, for training alone
        return moments[..., :channels], jnp.clip(moments[..., channels:], -30.0, 20.0)

    def decode(self, latents: Float[Array, "b rows cols latent"]) -> Images:
        """Return pixels around [-1, 1], not clamped."""
        z = self.bn.restore(latents)
        return self.pixels(einops.rearrange(z, "b y x (c r s) -> b (y r) (x s) c", r=2, s=2))

    def pixels(self, z: Resampled) -> Images:
        """Return pixels of a latent picture as `posterior` gives it."""
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, images: Images) -> Images:
        """Encode and decode; touches every parameter."""
        return self.decode(self.encode(images))


def patches(z: Picture) -> Resampled:
    """Fold 2x2 patches into channels: channel 4 c + 2 r + s holds row r, column s of each."""
    return einops.rearrange(z, "b (y r) (x s) c -> b y x (c r s)", r=2, s=2)


class LatentNorm(nn.Module):
    """BatchNorm without affine part, always with its running statistics, in float32."""

    cfg: VaeConfig

    def setup(self):
        shape = (4 * self.cfg.latent_channels,)
        self.mean = self.param("mean", nn.initializers.zeros, shape)
        self.var = self.param("var", nn.initializers.ones, shape)

    def _std(self):
        return jnp.sqrt(self.var.astype(jnp.float32) + self.cfg.bn_eps)

    def normalise(self, z: Picture) -> Picture:
        """(z - mean) / sqrt(var + eps)."""
        h = (z.astype(jnp.float32) - self.mean.astype(jnp.float32)) / self._std()
        return h.astype(z.dtype)

    def restore(self, z: Picture) -> Picture:
        """The inverse of `normalise`."""
        h = z.astype(jnp.float32) * self._std() + self.mean.astype(jnp.float32)
        return h.astype(z.dtype)


class Encoder(nn.Module):
    """Pixels to twice the latent channels at an eighth of the size (four levels)."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Picture) -> Resampled:
        c = self.cfg
        x = Conv(c.widths[0], name="conv_in")(x)
        for i, width in enumerate(c.widths):
            last = i == len(c.widths) - 1
            x = Level(c, width, c.layers_per_block, None if last else "down", name=f"down_{i}")(x)
        x = Middle(c, name="mid")(x)
        x = nn.silu(GroupNorm(c.groups, name="norm_out")(x))
        return Conv(2 * c.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """Latent channels to pixels at eight times the size (four levels)."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Picture) -> Resampled:
        c = self.cfg
        widths = (c.decoder_widths or c.widths)[::-1]
        x = Conv(widths[0], name="conv_in")(x)
        x = Middle(c, name="mid")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = Level(c, width, c.layers_per_block + 1, None if last else "up", name=f"up_{i}")(x)
        x = nn.silu(GroupNorm(c.groups, name="norm_out")(x))
        return Conv(c.out_channels, name="conv_out")(x)


class Level(nn.Module):
    """Residual blocks of one width, then a change of resolution."""

    cfg: VaeConfig
    width: int
    blocks: int
    resample: str | None

    @nn.compact
    def __call__(self, x: Picture) -> Resampled:
        for j in range(self.blocks):
            x = ResBlock(self.cfg, self.width, name=f"resnet_{j}")(x)
        if self.resample == "down":  # zeros on the right and at the bottom only
            x = Conv(self.width, stride=2, padding=((0, 1), (0, 1)), name="downsample")(x)
        elif self.resample == "up":
            x = einops.repeat(x, "b h w c -> b (h r) (w s) c", r=2, s=2)
            x = Conv(self.width, name="upsample")(x)
        return x


class ResBlock(nn.Module):
    """Two normalised convolutions beside the identity or a 1x1 projection."""

    cfg: VaeConfig
    width: int

    @nn.compact
    def __call__(self, x: Picture) -> Resampled:
        h = nn.silu(GroupNorm(self.cfg.groups, name="norm1")(x))
        h = Conv(self.width, name="conv1")(h)
        h = nn.silu(GroupNorm(self.cfg.groups, name="norm2")(h))
        h = Conv(self.width, name="conv2")(h)
        if x.shape[-1] != self.width:
            x = Linear(self.width, bias=True, name="conv_shortcut")(x)
        return x + h


class Middle(nn.Module):
    """Residual block, single-head attention over all places, residual block."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Picture) -> Picture:
        width = x.shape[-1]
        x = ResBlock(self.cfg, width, name="resnet_0")(x)
        x = Attention(self.cfg, name="attention")(x)
        return ResBlock(self.cfg, width, name="resnet_1")(x)


class Attention(nn.Module):
    """Single-head self-attention over places; every projection has a bias."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Picture) -> Picture:
        rows, width = x.shape[1], x.shape[-1]
        h = GroupNorm(self.cfg.groups, name="norm")(x)
        h = einops.rearrange(h, "b y x c -> b (y x) c")
        q, k, v = (Linear(width, bias=True, name=f"to_{part}")(h) for part in "qkv")
        out = attend(*(part[:, :, None] for part in (q, k, v)))  # one head
        out = einops.rearrange(out, "b (y x) 1 c -> b y x c", y=rows)
        return x + Linear(width, bias=True, name="to_out")(out)


def abstract_params(cfg: VaeConfig, dtype=jnp.float32) -> Params:
    """Return the parameter tree as shapes, without allocating anything."""

    def init():
        image = jnp.zeros((1, cfg.factor, cfg.factor, cfg.in_channels))
        return Vae(cfg).init(jax.random.key(0), image)

    shapes = jax.eval_shape(init)["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
