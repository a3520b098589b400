"""The closed loop: think, draw, look, and again, until the model stops or there is no going on.

The paper's section on inference: at step t the vision-language model has the goal and all that it
said and saw; it writes why, and an action. The image model draws under the condition that
`clvr_jax.data.conditioning` makes of both.

It ends otherwise when the budget is spent, or when the conversation fills the model's context.

Which picture is the answer: the last one that the model accepted. It accepts a picture by
stopping at it, and by going on from it (the last reference of an edit); if it never did either,
the answer is the last picture.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from clvr_jax.backends.images import Drawn, ImageGenerator, NotFinite, Order
from clvr_jax.backends.protocol import (
    InvalidRequest,
    Message,
    Options,
    Reply,
    TooLong,
    Vlm,
    system,
    user,
)
from clvr_jax.closed_loop import turn as turns
from clvr_jax.closed_loop.budget import Budget, Limit, Spent
from clvr_jax.closed_loop.drawing import Drawing
from clvr_jax.closed_loop.events import Acted, Drew, Ended, OnEvent, Retried, Said, ignore
from clvr_jax.closed_loop.result import Result, Task
from clvr_jax.data.conditioning import Condition, Policy, condition_next
from clvr_jax.data.trajectory import Step, Trajectory, check_goal
from clvr_jax.data.turns import Turn

HIDDEN = "The picture is drawn. It is not shown now; go on as you planned."
AGAIN = "That could not be used: {why}. Answer again."
_CUT = "it was longer than {tokens} tokens"
_GRACE = 1.0  # seconds in which a turn that is cut can say how much it has written


class Failed(RuntimeError):
    """A step failed as often as it may."""


class _Over(Exception):
    """There is no going on.

    Args:
      why: the outcome, e.g. the limit of the budget that is reached.
    """

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


@dataclasses.dataclass(frozen=True)
class Loop:
    """How tasks are drawn; one may run any number of them at the same time.

    Attributes:
      vlm: plans and looks.
      images: draws.
      policy: how conditions are made: as the image model was trained.
      budget: of each task.
      system: message before the goal; None for none.
      options: of turns; their seeds come from the tasks.
      constrain: whether turns are decoded under a grammar, which remote models do not take.
      retries: times that a step is tried again, over a broken answer, a failing model, or a
        picture of no numbers. What it costs counts. An answer that breaks the rules stays in the
        conversation, with what is wrong with it; one without an end is taken back, and asked for
        anew by chance (`turns.anew`), for it would lead the next ones astray.
      pause: seconds before a failing model is asked again, doubled each time.
    """

    vlm: Vlm
    images: ImageGenerator
    policy: Policy
    budget: Budget
    system: str | None = None
    options: Options = Options()
    constrain: bool = False
    retries: int = 3
    pause: float = 0.5

    def run(self, task: Task, on_event: OnEvent = ignore) -> Result:
        """Draw what a task asks for; whatever fails is part of the result.

        Args:
          task: what to draw.
          on_event: called as things happen, in this thread or a backend's; must return quickly.
        """
        result = _Run(self, task, on_event).result()
        on_event(Ended(task.id, result))
        return result


class _Run:
    """One task under way."""

    def __init__(self, loop: Loop, task: Task, on_event: OnEvent):
        self._loop, self._task, self._tell = loop, task, on_event
        self._spent = Spent(loop.budget)
        self._steps: list[Step] = []
        self._pictures: list[Image.Image] = []
        self._accepted: int | None = None
        self._closing = ""
        self._step: dict[str, Any] = {}  # what the step under way records

    def result(self) -> Result:
        outcome, error = "stopped", None
        try:
            check_goal(self._task.goal)
            self._session = self._loop.vlm.start()
            try:
                self._go()
            finally:
                self._session.close()
        except _Over as over:
            outcome = over.why
            if not self._steps:
                error = f"Failed: there is no picture yet, and the end is reached: {outcome}"
        except Exception as failure:  # whatever it is, what was drawn is kept
            outcome, error = "failed", f"{type(failure).__name__}: {failure}"
        spent, trajectory = self._spent, None
        if self._steps:
            last = "closing" if outcome == "stopped" else "unfinished"
            metadata = {
                "mode": "loop",
                "seed": self._task.seed,
                "models": {"vlm": self._loop.vlm.name, "images": self._loop.images.name},
                **({"error": error} if error else {}),
                **({last: self._step} if self._step else {}),
            }
            trajectory = Trajectory(
                id=self._task.id,
                goal=self._task.goal,
                steps=tuple(self._steps),
                closing=self._closing,
                system=self._loop.system,
                outcome=outcome,
                final=self._accepted or len(self._steps),
                metadata=metadata,
            )
        return Result(
            self._task,
            trajectory,
            tuple(self._pictures),
            error,
            spent.seconds,
            spent.evaluations,
            spent.tokens,
        )

    def _go(self) -> None:
        """Work until the model stops.

        Raises:
          _Over: there is another reason to end.
        """
        opening = [system(self._loop.system)] if self._loop.system else []
        said: Sequence[Message] = [*opening, user(self._task.goal)]
        while True:
            self._step = {}
            began = time.monotonic()
            try:
                turn = self._think(said)
            finally:
                self._step["think_s"] = round(time.monotonic() - began, 4)
            self._judge(turn)
            if turn.action is None:
                self._closing = turn.reasoning
                return
            self._step |= {
                "reasoning": turn.reasoning,
                "action": turn.action.model_dump(mode="json"),
            }
            self._require(self._spent.forbids_picture(self._loop.images.evaluations))
            look = self._loop.budget.look
            shown = look > 0 and (len(self._steps) + 1) % look == 0
            drawn = self._draw(turn, shown)
            said = [user(drawn.picture if shown else HIDDEN)]

    def _require(self, limit: Limit | None) -> None:
        """Raise `_Over` if a limit is reached."""
        if limit:
            raise _Over(limit)

    def _think(self, said: Sequence[Message]) -> Turn:
        """The next turn."""
        number, wanted = len(self._steps) + 1, self._loop.options
        for attempt in range(self._loop.retries + 1):
            self._require(self._spent.forbids_turn())
            options = self._options(wanted, number, attempt)
            try:
                reply = self._ask(said, options)
            except TooLong:
                raise _Over("context") from None
            except (InvalidRequest, _Over):
                raise
            except Exception as error:
                self._again(f"{type(error).__name__}: {error}", attempt)
                left = self._spent.seconds_left
                time.sleep(min(self._loop.pause * 2**attempt, 60.0 if left is None else left))
                continue
            self._spent.tokens += reply.usage.completion
            self._step["tokens"] = self._step.get("tokens", 0) + reply.usage.completion
            if reply.finish == "cancelled":
                raise _Over("seconds")
            if reply.finish == "length":
                if self._spent.tokens_left == 0:
                    raise _Over("tokens")
                full = reply.usage.prompt + reply.usage.completion == self._loop.vlm.context
                if full and attempt == self._loop.retries:
                    raise _Over("context")
                self._again(_CUT.format(tokens=reply.usage.completion), attempt)
                self._session.take_back()
                wanted = turns.anew(wanted)
                continue
            try:
                turn = turns.read(reply.text, number)
                if turn.action is not None:
                    self._loop.images.check(self._order(turn)[0])
            except ValueError as error:
                self._again(str(error), attempt)
                said = [user(AGAIN.format(why=error))]
            else:
                self._tell(Acted(self._task.id, number, turn.reasoning, turn.action))
                return turn
        raise AssertionError("the last attempt raises")

    def _options(self, options: Options, number: int, attempt: int) -> Options:
        left = self._spent.tokens_left
        return dataclasses.replace(
            options,
            max_tokens=options.max_tokens if left is None else min(options.max_tokens, left),
            seed=self._task.draw("turn", number, attempt),
            grammar=turns.grammar(number) if self._loop.constrain else None,
        )

    def _ask(self, said: Sequence[Message], options: Options) -> Reply:
        """The reply; as much of it as there is when the time is over."""
        show = lambda text: self._tell(Said(self._task.id, text))
        pending = self._session.submit(said, options, show)
        try:
            return pending.result(self._spent.seconds_left)
        except TimeoutError:
            if self._spent.seconds_left != 0:
                raise
            pending.cancel()
        try:
            return dataclasses.replace(pending.result(_GRACE), finish="cancelled")
        except TimeoutError:
            raise _Over("seconds") from None

    def _again(self, why: str, attempt: int) -> None:
        """Record a failure and that it is tried again; raise if it has been often enough."""
        self._step.setdefault("retries", []).append(why)
        if attempt == self._loop.retries:
            raise Failed(f"step {len(self._steps) + 1} failed {attempt + 1} times, at last: {why}")
        self._tell(Retried(self._task.id, len(self._steps) + 1, why))

    def _judge(self, turn: Turn) -> None:
        """Take from a turn what it accepts of what was drawn."""
        last = len(self._steps)
        if not last:
            return
        base = last if turn.action is None else next(iter(turn.action.references[-1:]), None)
        self._accepted = base or self._accepted
        if self._steps[-1].metadata["shown"]:
            verdict = "accepted" if base == last else "rejected"
            self._steps[-1] = self._steps[-1].model_copy(
                update={"verdict": verdict, "critique": turn.reasoning or None}
            )

    def _order(self, turn: Turn) -> tuple[Order, Condition]:
        """What the image model is told for a turn."""
        given = condition_next(
            self._task.goal, self._steps, turn.reasoning, turn.action, self._loop.policy
        )
        return Order(given.text, tuple(self._pictures[i] for i in given.references)), given

    def _not_drawn(self, error: Exception, attempt: int) -> None:
        cost = self._loop.images.evaluations
        if isinstance(error, NotFinite):  # it was computed to its end
            self._spent.evaluations += cost
            self._step["evaluations"] = self._step.get("evaluations", 0) + cost
        self._again(f"{type(error).__name__}: {error}", attempt)
        self._require(self._spent.forbids_picture(cost))

    def _draw(self, turn: Turn, shown: bool) -> Drawn:
        """Draw one picture and record its step."""
        loop, number = self._loop, len(self._steps) + 1
        order, given = self._order(turn)
        began = time.monotonic()
        drawing = Drawing(loop.images, order, lambda n: self._task.draw("picture", number, n))
        drawn, seed = drawing.result(self._not_drawn)
        self._spent.drawing = time.monotonic() - began
        self._spent.generations += 1
        self._spent.evaluations += drawn.evaluations
        kept = {k: v for k, v in self._step.items() if k not in ("reasoning", "action")}
        metadata = kept | {
            "draw_s": round(self._spent.drawing, 4),
            "together": drawn.together,
            "evaluations": drawn.evaluations + kept.get("evaluations", 0),
            "seed": seed,
            "text": given.text,
            "given": [index + 1 for index in given.references],
            "shown": shown,
        }
        said = {"reasoning": turn.reasoning, "action": turn.action}
        self._steps.append(Step(image=f"{number}.png", metadata=metadata, **said))
        self._pictures.append(drawn.picture)
        self._tell(
            Drew(self._task.id, number, drawn.picture, self._spent.drawing, drawn.evaluations)
        )
        return drawn
