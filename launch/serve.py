"""Serve a vision-language model as OpenAI's chat completions.

Loopback only unless --host says otherwise; with an address that others reach, set a key.

  python -m launch.serve --weights=Qwen/Qwen3-VL-8B-Instruct
  CLVR_API_KEY=secret python -m launch.serve --weights=FOLDER --host=0.0.0.0 --port=8000
"""

import ipaddress
import os
import sys
import time

from absl import flags

from launch.runtime import config_flag, run, use_compile_cache

_CONFIG = config_flag("vlm.py")
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "Qwen3-VL or Qwen3: transformers folder, converted folder, hub id",
    required=True,
)
_NAME = flags.DEFINE_string("name", "", "what clients call the model (default: its folder)")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at")
_PORT = flags.DEFINE_integer("port", 8000, "port; 0 for a free one", lower_bound=0)
_KEY = flags.DEFINE_string("key_env", "CLVR_API_KEY", "environment variable with the API key")
_OPEN = flags.DEFINE_bool("without_key", False, "allow other machines in without a key")
_QUEUE = flags.DEFINE_integer("max_queue", 256, "requests accepted at once, running and waiting")
_TIMEOUT = flags.DEFINE_float("timeout", 600.0, "seconds that a request may take")
_IMAGES = flags.DEFINE_integer("max_images", 16, "pictures of one request")
_KEPT = flags.DEFINE_integer("kept_conversations", 64, "conversations kept for their next turn")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print sizes, memory and sharding, then stop")


def main(argv) -> None:
    """Check, load, listen until asked to stop."""
    if len(argv) > 1:
        raise ValueError(f"unknown arguments {argv[1:]}")
    key = os.environ.get(_KEY.value) or None
    if key is None and not _OPEN.value and not _is_loopback(_HOST.value):
        raise ValueError(
            f"--host={_HOST.value} is reached by other machines, and the environment variable "
            f"{_KEY.value} holds no key; set it, or allow this with --without_key"
        )
    try:
        from clvr_jax.serving.app import make_app
        from clvr_jax.serving.limits import Limits
        from clvr_jax.serving.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{error.name} is not installed; the server needs pip install -e ".[serve]"'
        ) from error
    limits = Limits(
        max_queue=_QUEUE.value,
        timeout_s=_TIMEOUT.value,
        max_images=_IMAGES.value,
        kept_conversations=_KEPT.value,
    )
    start = time.perf_counter()
    cache = use_compile_cache()
    from launch import build_vlm

    if _DRY_RUN.value:
        build_vlm.describe(_WEIGHTS.value, _CONFIG.value)
        return
    vlm = build_vlm.from_config(_WEIGHTS.value, _CONFIG.value, _NAME.value)
    spent = time.perf_counter() - start
    say = lambda text: print(text, file=sys.stderr, flush=True)
    say(f"{vlm.name}: loaded in {spent:.1f} s, context {vlm.context} (compile cache: {cache})")
    try:
        serve(make_app(vlm, limits, key), _HOST.value, _PORT.value)
    finally:
        vlm.close()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    run(main)
