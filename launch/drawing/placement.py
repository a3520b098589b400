"""What the models of a drawing take of each device, before any of it is loaded.

Parameters and caches are exact; what the image model needs while it draws is an estimate, by the
formulas below, counted in the largest arrays that live at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from clvr_jax.backends.local.reader import cache_places
from clvr_jax.generate.image import Settings
from clvr_jax.models.qwen3.cache import token_bytes
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.typing import Params
from conversion.components import KINDS, Component
from conversion.detect import Found
from launch import build, build_vlm
from launch.bench.image import MODELS
from launch.plan import memory
from launch.plan.activations import Line
from launch.plan.targets import GIB, HERE, Target, mesh_sizes

_ROOM = 0.05  # of a device that is left to the runtime


@dataclasses.dataclass(frozen=True)
class Share:
    """What one model takes of each of its devices.

    Attributes:
      name: of the model.
      devices: numbers of the devices.
      lines: what it takes.
    """

    name: str
    devices: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def size(self) -> int:
        """Bytes of one device at the worst moment."""
        return sum(line.size for line in self.lines if line.kept) + max(
            (line.size for line in self.lines if not line.kept), default=0
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """All models on their devices.

    Attributes:
      shares: one for each model that is here.
      limit: bytes of one device that may be taken; None if unknown.
      cache: bytes of all keys and values of the language model, all its devices together; 0 if it
        is not here.
    """

    shares: tuple[Share, ...]
    limit: int | None
    cache: int

    def taken(self, device: int) -> int:
        """Return the bytes taken of a device."""
        return sum(share.size for share in self.shares if device in share.devices)

    @property
    def fits(self) -> bool:
        """Whether every device holds what is placed on it; true where the limit is unknown."""
        return self.limit is None or all(
            self.taken(device) <= self.limit for share in self.shares for device in share.devices
        )

    def table(self) -> str:
        """Return it in lines of text."""
        lines = []
        for share in self.shares:
            lines.append(f"{share.name}, {_places(share.devices)}:")
            for line in share.lines:
                lines.append(f"  {line.size / GIB:8.2f} GiB  {line.label} ({line.how})")
        taken: dict[int, list[int]] = {}
        for device in sorted({d for share in self.shares for d in share.devices}):
            taken.setdefault(self.taken(device), []).append(device)
        of = "" if self.limit is None else f" of {self.limit / GIB:.2f}"
        for size, devices in taken.items():
            lines.append(f"{_places(devices)}: {size / GIB:.2f}{of} GiB at once")
        return "\n".join(lines)

    def require(self) -> None:
        """Raise ValueError, with what to change, if it does not fit."""
        if not self.fits:
            raise ValueError(f"the models do not fit:\n{self.table()}\n{_ADVICE}")


def _places(devices: Sequence[int]) -> str:
    return f"device{'s' * (len(devices) > 1)} {', '.join(map(str, devices))}"


_ADVICE = (
    "make it smaller: fewer prompts at once (--config.loop.concurrency) or shorter conversations "
    "(--vlm_config.context) shrink the cache, --config.batch what is drawn at once; or spread it: "
    "--config.devices and --vlm_config.devices put the models on different devices, "
    "--config.mesh.fsdp and --vlm_config.mesh.tensor over several; or use --server for the "
    "language model"
)


def sized(name: str) -> build.Weights | None:
    """Return released weights of a size by its name, `klein_4b` say, without any file.

    They are distilled; None if there is no such size.
    """
    if not name.startswith("klein_") or name not in MODELS:
        return None
    parts = zip(build.COMPONENTS, MODELS[name], strict=True)
    components = {
        part: Component(part, "diffusers", Path(name), KINDS[part].variants[size])
        for part, size in parts
    }
    return build.Weights(Found(name, Path(name), components), True, "full", build.STOCK_TEXTS)


def sized_vlm(name: str) -> Component | None:
    """Return a language model of a size by its name, `qwen3_vl_8b` say; None if there is none."""
    found = KINDS["vlm"].variants.get(name)
    return found and Component("vlm", "diffusers", Path(name), found)


def place(
    weights: build.Weights,
    vlm: Component | None,
    settings: Settings,
    references: int,
    config: Any,
    vlm_config: Any,
    target: Target,
) -> Placement:
    """Return what models take of the devices of a machine; nothing is read or started.

    The cache of the language model is what the config says, or else what all prompts that are drawn
    at once take if each fills its context, as far as there is room.

    Args:
      weights: of the image model, as looked at.
      vlm: language model that is to be here, as looked at.
      settings: how pictures are sampled.
      references: most that one picture is drawn with.
      config: of configs/generate.py.
      vlm_config: of configs/vlm.py.
      target: the machine.

    Raises:
      ValueError: meshes do not make the devices, or there is no such device.
    """
    limit = None if target.memory is None else int(target.memory * (1 - _ROOM))
    shares = [_images(weights, settings, references, config, target)]
    if vlm is None:
        return Placement(tuple(shares), limit, 0)
    dtype = _dtype(vlm_config.dtype, target)
    devices, sizes = devices_of(vlm_config, target)
    params = Line("parameters", _bytes(build_vlm.abstract(vlm.config, dtype), sizes), memory.EXACT)
    cfg = vlm.config.text if isinstance(vlm.config, Qwen3VLConfig) else vlm.config
    token = token_bytes(cfg, dtype.itemsize)
    context = build_vlm.context_of(vlm.config, vlm_config)
    cache = int(vlm_config.cache_gib * GIB)
    how, least = "--vlm_config.cache_gib", token * cache_places(context)
    if 0 < cache < least:
        raise ValueError(
            f"--vlm_config.cache_gib={vlm_config.cache_gib} does not hold a conversation of "
            f"{context} tokens, which takes {least / GIB:.2f}; give more, or a smaller "
            "--vlm_config.context"
        )
    if vlm_config.cache_gib <= 0:
        cache = token * cache_places(context, config.loop.concurrency)
        how = f"{config.loop.concurrency} conversations of {context:,} tokens"
        if limit is not None:
            taken = Placement((*shares, Share("", devices, (params,))), limit, 0)
            room = min(limit - taken.taken(device) for device in devices) * len(devices)
            if cache > room >= least:
                cache, how = room, f"what is left: {room // token:,} tokens"
    line = Line("keys and values", -(-cache // len(devices)), how)
    shares.append(Share("language model", devices, (params, line)))
    return Placement(tuple(shares), limit, cache)


def devices_of(config: Any, target: Target) -> tuple[tuple[int, ...], Mapping[str, int]]:
    """Return the numbers of a config's devices and its mesh's sizes.

    Raises:
      ValueError: there is no such device, or the sizes do not make the devices.
    """
    devices = tuple(config.devices) or tuple(range(target.devices))
    missing = [device for device in devices if not 0 <= device < target.devices]
    if missing:
        raise ValueError(
            f"devices are {list(devices)}, {target.name} has {target.devices}, numbered from 0"
        )
    return devices, mesh_sizes(config.mesh.to_dict(), len(devices))


def _images(
    weights: build.Weights, settings: Settings, references: int, config: Any, target: Target
) -> Share:
    dtype = _dtype(config.dtype, target)
    devices, sizes = devices_of(config, target)
    nets = build.networks(weights, "reference", config.layers)
    lines = [
        Line(name.replace("_", " "), _bytes(tree, sizes), memory.EXACT)
        for name, tree in build.abstract(nets, dtype).items()
    ]
    cfg, vae, text = nets.transformer.cfg, nets.vae.cfg, nets.text_encoder.cfg
    rows, copies, size = config.batch, 1 if settings.guidance == 1.0 else 2, dtype.itemsize
    factor = vae.factor
    places = (settings.height // factor) * (settings.width // factor)
    tokens = weights.texts[-1] + places * (1 + references)
    # a single block forward: what comes in and goes out, queries, keys, values, and the MLP twice
    token = (6 * cfg.width + 3 * cfg.mlp_width) * size + 2 * 4 * cfg.width
    drawing = f"{rows * copies} rows of {tokens:,} tokens"
    lines.append(Line("drawing", rows * copies * tokens * token, drawing, kept=False))
    features = rows * weights.texts[-1] * len(text.features) * text.width * size
    lines.append(Line("text features", features, f"{rows} texts of {weights.texts[-1]} tokens"))
    pixels = rows * settings.height * settings.width * vae.widths[0] * (2 * size + 2 * 4)
    lines.append(Line("VAE at work", pixels, f"{vae.widths[0]} channels of every pixel", False))
    return Share("image model", devices, tuple(lines))


def _dtype(name: str, target: Target) -> Any:
    """The type of a config's name; "auto" by the machine, which need not be this one."""
    if name == "auto" and target.name != HERE:
        name = "bfloat16"
    return jnp.dtype(build.resolve_dtype(name))


def _bytes(tree: Params, sizes: Mapping[str, int]) -> int:
    """Bytes of a tree on one device, as the sharding rules place it."""
    return sum(leaf.size for leaf in memory.leaves(tree, memory.abstract_mesh(sizes)))
