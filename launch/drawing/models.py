"""The models of a drawing: an image model and a vision-language model, here or behind a server."""

from collections.abc import Sequence
from typing import Any

from clvr_jax.backends.local.images import LocalImages
from clvr_jax.backends.protocol import Vlm
from clvr_jax.data.conditioning import Policy
from clvr_jax.generate.image import Settings
from conversion.detect import SHIPPED
from launch import build

TEACHER = "teacher"  # the miniature's scripted teacher, for --vlm
STOCK = Policy(text="instruction", references="chosen", buckets=build.STOCK_TEXTS)


def policy_of(weights: build.Weights) -> Policy:
    """Return how conditions of weights are made: as recorded, or as stock weights take them."""
    recorded = weights.found.manifest.get("conditioning")
    return Policy.from_json(recorded) if recorded else STOCK


def check_words(prompts: Sequence[str], sources: Sequence[str | None]) -> None:
    """Check that the miniature's world knows what prompts ask for, where a model knows only it.

    Args:
      prompts: of a run.
      sources: names of its models; those that ship, and the teacher, know nothing else.

    Raises:
      ValueError: a prompt cannot be read, it says what the world knows; or the teacher, who has to
        tell things apart and to say where they go, cannot direct it.
    """
    if not any(source == TEACHER or source in SHIPPED for source in sources):
        return
    from clvr_jax.miniature.parse import parse_prompt
    from clvr_jax.miniature.teacher.answers import wanted

    for prompt in prompts:
        (wanted if TEACHER in sources else parse_prompt)(prompt)


def settings_of(weights: build.Weights, config: Any) -> Settings:
    """Return how pictures are sampled: what a config of configs/generate.py leaves to the weights.

    Args:
      weights: as looked at.
      config: -1 and "auto" stand for what suits the weights.

    Raises:
      ValueError: a number is out of range.
    """
    auto = {"steps": 4, "guidance": 1.0} if weights.distilled else {"steps": 28, "guidance": 4.0}
    side = build.side(weights)
    settings = Settings(
        height=side if config.height == -1 else config.height,
        width=side if config.width == -1 else config.width,
        steps=auto["steps"] if config.steps == -1 else config.steps,
        guidance=auto["guidance"] if config.guidance == -1.0 else config.guidance,
        pattern=weights.pattern if config.pattern == "auto" else config.pattern,
        rounding=config.rounding,
    )
    if settings.steps < 1 or settings.guidance < 1.0:
        raise ValueError(
            f"steps {settings.steps} and guidance {settings.guidance} must each be at least 1 "
            "(guidance 1 means none)"
        )
    return settings


def images(weights: build.Weights, config: Any, name: str) -> LocalImages:
    """Read an image model's weights and return what draws with them.

    Args:
      weights: as looked at.
      config: of configs/generate.py.
      name: what it is called.
    """
    settings, mesh = settings_of(weights, config), build.make_mesh(config.mesh, config.devices)
    texts = weights.texts if config.text_tokens == -1 else (config.text_tokens,)
    model = build.load_image_model(
        weights,
        dtype=build.resolve_dtype(config.dtype),
        mesh=mesh,
        attention=config.attention,
        layers=config.layers,
    )
    return LocalImages(name, model, settings, texts, batch=config.batch, mesh=mesh)


def vlm(source: str, config: Any, name: str = "", cache: int | None = None) -> Vlm:
    """Return the vision-language model at a path or hub id, or the scripted teacher.

    Args:
      source: a folder, a hub id, a shipped name, or `TEACHER`.
      config: of configs/vlm.py.
      name: what it is called.
      cache: bytes of all its keys and values; None for what the config says.
    """
    if source == TEACHER:
        from clvr_jax.miniature import detect
        from clvr_jax.miniature.teacher import Policy as Ways
        from clvr_jax.miniature.teacher import Teacher

        return Teacher(0, Ways(), detect.detect)
    from launch import build_vlm

    return build_vlm.from_config(source, config, name, cache)


def remote(url: str, name: str, key_env: str | None, config: Any) -> Vlm:
    """Return a model behind an OpenAI-compatible server.

    Args:
      url: where the server is.
      name: of the model there.
      key_env: environment variable with the API key; None for none.
      config: of configs/vlm.py.

    Raises:
      ValueError: its name is not given, or a value of the config is out of range.
    """
    from clvr_jax.backends.remote import RemoteConfig, RemoteVlm

    if not name:
        raise ValueError("--server needs the model's --name there")
    given = {key: value for key, value in config.remote.items() if value != ""}
    return RemoteVlm(RemoteConfig(model=name, base_url=url, key_env=key_env, **given))
