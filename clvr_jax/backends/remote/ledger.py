"""What was spent, and the stop when it is enough."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from clvr_jax.backends.protocol import Usage
from clvr_jax.backends.remote.config import RemoteConfig
from clvr_jax.backends.remote.errors import BudgetExceeded, Cancelled


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a remote model has used so far.

    Attributes:
      replies: turns that the endpoint answered, cancelled ones included.
      cached: turns that the disk cache answered; they count nowhere else.
      failed: turns that ended with an error.
      attempts: requests that were sent.
      prompt: prompt tokens.
      prompt_cached: those of them that the endpoint had cached.
      completion: generated tokens.
      estimated: requests whose tokens are estimates, since the endpoint does not tell them or a
        stream ended before it did.
      cost: US dollars, by the config's prices.
    """

    replies: int = 0
    cached: int = 0
    failed: int = 0
    attempts: int = 0
    prompt: int = 0
    prompt_cached: int = 0
    completion: int = 0
    estimated: int = 0
    cost: float = 0.0


class Ledger:
    """Totals and budget; thread-safe.

    A request reserves the most that it may cost before it is sent and gives the reservation up
    when its true cost is known, so concurrent requests do not overrun the budget together.
    """

    def __init__(self, config: RemoteConfig):
        self._config = config
        self._totals = Totals()
        self._held_tokens = 0
        self._held_cost = 0.0
        self._changed = threading.Condition()

    def totals(self) -> Totals:
        """Return a snapshot."""
        with self._changed:
            return self._totals

    def count(self, **amounts: int) -> None:
        """Add to counters of the totals by name."""
        with self._changed:
            self._add(**amounts)

    def spend(self, usage: Usage, estimated: bool = False) -> None:
        """Add what a request has used, whatever became of its reply."""
        with self._changed:
            self._add(
                prompt=usage.prompt,
                prompt_cached=usage.cached,
                completion=usage.completion,
                estimated=int(estimated),
                cost=usage.cost,
            )

    @contextlib.contextmanager
    def reserve(self, prompt: int, completion: int, stop: threading.Event) -> Iterator[None]:
        """Hold these tokens for the duration of a `with` block.

        Waits where the budget would do once the requests in flight turn out cheaper than the most
        they may cost.

        Raises:
          BudgetExceeded: what is left does not do even without the requests in flight.
          Cancelled: `stop` was set while waiting.
        """
        tokens, cost = prompt + completion, self._config.cost(prompt, 0, completion)
        with self._changed:
            while True:
                self._refuse_beyond_budget(tokens, cost)
                if self._fits(tokens + self._held_tokens, cost + self._held_cost):
                    break
                if stop.is_set():
                    raise Cancelled
                self._changed.wait(0.1)  # looks after `stop`, which notifies nobody
            self._held_tokens += tokens
            self._held_cost += cost
        try:
            yield
        finally:
            with self._changed:
                self._held_tokens -= tokens
                self._held_cost -= cost
                if not self._held_tokens:
                    self._held_cost = 0.0  # sums of floats do not cancel exactly
                self._changed.notify_all()

    def _add(self, **amounts: int | float) -> None:
        new = {name: getattr(self._totals, name) + amount for name, amount in amounts.items()}
        self._totals = dataclasses.replace(self._totals, **new)

    def _fits(self, tokens: int, cost: float) -> bool:
        c, t = self._config, self._totals
        return (
            c.budget_tokens is None or t.prompt + t.completion + tokens <= c.budget_tokens
        ) and (c.budget_cost is None or t.cost + cost <= c.budget_cost)

    def _refuse_beyond_budget(self, tokens: int, cost: float) -> None:
        if self._fits(tokens, cost):
            return
        c, t = self._config, self._totals
        budgets = []
        if c.budget_cost is not None:
            budgets.append(f"${t.cost:.4f} of ${c.budget_cost:g}; it may take up to ${cost:.4f}")
        if c.budget_tokens is not None:
            budgets.append(
                f"{t.prompt + t.completion} of {c.budget_tokens} tokens; it may take about {tokens}"
            )
        raise BudgetExceeded(
            f"{c.model}: the request was not sent, spent so far are {' and '.join(budgets)}. "
            "Raise budget_cost or budget_tokens, or ask for fewer max_tokens"
        )
