"""Ask a vision-language model about pictures, and see the answer as it is written.

python -m launch.ask --weights=Qwen/Qwen3-VL-8B-Instruct --image=a.png --prompt="what is this?"
python -m launch.ask --server=http://127.0.0.1:8000/v1 --name=MODEL --prompt="..." --schema=s.json
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from launch.runtime import config_flag, run, use_compile_cache

_CONFIG = config_flag("vlm.py")
_WEIGHTS = flags.DEFINE_string("weights", None, "Qwen3-VL or Qwen3 folder, or hub id")
_SERVER = flags.DEFINE_string("server", None, "or the base URL of an OpenAI-compatible server")
_NAME = flags.DEFINE_string("name", "", "the model's name there")
_KEY = flags.DEFINE_string("key_env", None, "environment variable with the server's API key")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "a user turn; several are asked one by one")
_IMAGE = flags.DEFINE_multi_string("image", [], "picture of the first turn; may be repeated")
_SYSTEM = flags.DEFINE_string("system", None, "system message")
_SCHEMA = flags.DEFINE_string("schema", None, "file with a JSON schema that answers follow")
_SEED = flags.DEFINE_integer("seed", None, "of the sampling")


def main(argv) -> None:
    """Check, load, ask every turn in one conversation."""
    if len(argv) > 1 or not _PROMPT.value:
        raise app.UsageError("give the turns with --prompt=TEXT")
    if (_WEIGHTS.value is None) == (_SERVER.value is None):
        raise ValueError("give either --weights=FOLDER or --server=URL")
    from PIL import Image

    from clvr_jax.backends.protocol import Options, system, user

    pictures = [Image.open(path) for path in _IMAGE.value]
    schema = json.loads(Path(_SCHEMA.value).read_text()) if _SCHEMA.value else None
    c = _CONFIG.value
    options = Options(
        max_tokens=c.max_tokens,
        temperature=float(c.temperature),
        top_p=float(c.top_p),
        top_k=c.top_k,
        presence_penalty=float(c.presence_penalty),
        seed=_SEED.value,
        schema=schema,
    )
    vlm = _model(c)
    show = lambda piece: print(piece, end="", flush=True)
    try:
        session = vlm.start()
        opening = [system(_SYSTEM.value)] if _SYSTEM.value else []
        for i, prompt in enumerate(_PROMPT.value):
            turn = [*opening, user(*pictures, prompt)] if i == 0 else [user(prompt)]
            reply = session.ask(turn, options, show)
            print(flush=True)
            u, t = reply.usage, reply.times
            rate = (u.completion - 1) / max(t.total - t.first, 1e-9)
            print(
                f"[{reply.finish}; {u.prompt} tokens read, {u.cached} of them cached, "
                f"{u.completion} written; first after {t.first:.2f} s, then {rate:.1f} tokens/s]",
                file=sys.stderr,
            )
    finally:
        vlm.close()


def _model(config):
    if not _SERVER.value:
        use_compile_cache()
    from launch.drawing import models

    if _SERVER.value:
        return models.remote(_SERVER.value, _NAME.value, _KEY.value, config)
    return models.vlm(_WEIGHTS.value, config, _NAME.value)


if __name__ == "__main__":
    run(main)
