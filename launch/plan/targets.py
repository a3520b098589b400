"""The machines that a run can be planned for, present or not."""

import dataclasses
import os
import re

from launch.bench.machine import limits_of

GIB = 2**30
HERE = "here"
NAMES = ("h20x8", "h200x8", "h100x8", "h200x1", "v5e-64", "v6e-32", "v5e-8", "v6e-8", HERE)

# device kind as JAX says it, GiB that a program may take, utilisation that a plan assumes
# GPUs: of what the driver reports, the .9 that launch/cluster/gpu.sh lets JAX take;
# TPUs: what the compiler says it has
_GPUS = {
    "h20": ("NVIDIA H20", 0.9 * 95.6, 0.65),
    "h100": ("NVIDIA H100", 0.9 * 79.6, 0.5),
    "h200": ("NVIDIA H200", 0.9 * 140.4, 0.5),
    "a100": ("NVIDIA A100-SXM4-80GB", 0.9 * 79.3, 0.5),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 0.9 * 23.6, 0.5),
}
_TPUS = {
    "v5e": ("TPU v5e", 15.75, 0.5),
    "v6e": ("TPU v6e", 31.25, 0.5),
}
_CHIPS = _GPUS | _TPUS
_SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
      name: as the user gave it.
      device: kind, as JAX calls it.
      devices: how many, all hosts together.
      hosts: machines that they are in.
      memory: bytes of one device that a program may take; None if unknown.
      topology: name for ahead-of-time compilation, TPUs only.
      mfu: model FLOP utilisation that time estimates assume: peers hold 44 to 55 % on dense
        devices; the H20 has more bandwidth for its arithmetic.
    """

    name: str
    device: str
    devices: int
    hosts: int
    memory: int | None
    topology: str | None = None
    mfu: float = 0.5

    @property
    def peak(self) -> float | None:
        """The vendor's bfloat16 FLOP/s of one device, None if unknown."""
        tflops = limits_of(self.device)[0]
        return tflops and tflops * 1e12


def parse(name: str) -> Target:
    """Return the target of a name.

    Names are `h20x8` (any number of any of `_GPUS`), `v5e-64` (any slice), `here`.

    Raises:
      ValueError: there is no such target.
    """
    if name == HERE:
        return here()
    gpus, tpus = "|".join(_GPUS), "|".join(_TPUS)
    match = re.fullmatch(rf"({gpus})x([1-9]\d*)|({tpus})-([1-9]\d*)", name)
    count = int(match[2] or match[4]) if match else 0
    if not match or (match[3] and count not in _SLICES):
        raise ValueError(
            f"no target {name!r}; choose {', '.join(NAMES)}, another number of {', '.join(_GPUS)}, "
            f"or a TPU slice of {', '.join(map(str, _SLICES))} chips"
        )
    chip = match[1] or match[3]
    device, gib, mfu = _CHIPS[chip]
    memory = int(gib * GIB)
    if match[1]:
        return Target(name, device, count, -(-count // 8), memory, mfu=mfu)
    hosts = 1 if count <= 8 else count // 4
    return Target(name, device, count, hosts, memory, f"{chip}:{_SLICES[count]}", mfu)


def here() -> Target:
    """Return the devices of this process, and of those it was started with; starts JAX."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit")
    if memory is None and device.platform == "cpu":  # the devices share the machine
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = whole // jax.local_device_count()
    known = next((mfu for kind, _, mfu in _CHIPS.values() if device.device_kind == kind), 0.5)
    return Target(
        HERE, device.device_kind, jax.device_count(), jax.process_count(), memory, None, known
    )


def mesh_sizes(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """Return a config's axis sizes with -1 filled in for this many devices.

    Raises:
      ValueError: they do not multiply to the number of devices.
    """
    filled = dict(sizes)
    free = [axis for axis, size in filled.items() if size == -1]
    rest = 1
    for size in filled.values():
        rest *= 1 if size == -1 else size
    if len(free) == 1 and rest:
        filled[free[0]] = max(devices // rest, 1)
        rest *= filled[free[0]]
    if rest != devices or len(free) > 1:
        given = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {given} does not make {devices} devices; change the sizes, or use -1 for one"
        )
    return filled
