"""Vision-language models behind OpenAI-compatible endpoints, and replays of what they said."""

from clvr_jax.backends.remote.config import RemoteConfig
from clvr_jax.backends.remote.errors import BudgetExceeded, NotRecorded, RemoteError
from clvr_jax.backends.remote.ledger import Totals
from clvr_jax.backends.remote.replay import Replay
from clvr_jax.backends.remote.vlm import RemoteVlm

__all__ = [
    "BudgetExceeded",
    "NotRecorded",
    "RemoteConfig",
    "RemoteError",
    "RemoteVlm",
    "Replay",
    "Totals",
]
