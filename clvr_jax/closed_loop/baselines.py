"""What the loop is compared with: one picture, the best of several, and a rewritten prompt.

Each takes a `Task` and returns a `Result`, as the loop does, so that they can be swapped for it.
None of them is given what the loop's image model is told of a trajectory: the text is the prompt.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.images import ImageGenerator, NotFinite, Order
from clvr_jax.backends.protocol import InvalidRequest, Message, Options, Reply, Vlm
from clvr_jax.closed_loop.drawing import Drawing
from clvr_jax.closed_loop.events import Drew, Ended, OnEvent, Retried, ignore
from clvr_jax.closed_loop.result import Result, Task
from clvr_jax.closed_loop.turn import anew, whole
from clvr_jax.data.trajectory import Step, Trajectory, check_goal
from clvr_jax.data.turns import Action

RETRIES = 3  # of a picture or a question that failed


@dataclasses.dataclass(frozen=True)
class Single:
    """One picture of the prompt as it is.

    Attributes:
      images: draws.
      evaluations: that it may take, attempts that fail among them; None is no limit.
    """

    images: ImageGenerator
    evaluations: int | None = None

    def run(self, task: Task, on_event: OnEvent = ignore) -> Result:
        """Draw what a task asks for; whatever fails is part of the result."""
        own = _Baseline("single", self.images, None, self.evaluations, task, on_event)
        return own.result(lambda own: own.draw([task.goal], "I draw it as it is asked for."))


@dataclasses.dataclass(frozen=True)
class BestOf:
    """The best of several pictures of the prompt, as a model chooses.

    It compares the best so far with the next one, the first of both shown first; a tie keeps the
    earlier one.

    Attributes:
      images: draws.
      vlm: chooses.
      count: pictures.
      options: of its answers.
      evaluations: that all of them may take, attempts that fail among them; None is no limit.
    """

    images: ImageGenerator
    vlm: Vlm
    count: int
    options: Options = Options(max_tokens=128)
    evaluations: int | None = None

    def run(self, task: Task, on_event: OnEvent = ignore) -> Result:
        """Draw what a task asks for; whatever fails is part of the result."""

        def work(own: "_Baseline") -> None:
            own.draw([task.goal] * self.count, "I draw it as it is asked for, in another way.")
            for other in range(1, len(own.pictures)):
                best = own.final - 1
                asked = requests.CHOOSE.message(
                    own.pictures[best], own.pictures[other], goal=task.goal
                )
                said = own.ask(asked, self.options, _choice, "choose", other)
                if said == "B":
                    own.final = other + 1

        own = _Baseline("best_of", self.images, self.vlm, self.evaluations, task, on_event)
        return own.result(work)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One picture of the prompt as a model has rewritten it, without looking at anything.

    Attributes:
      images: draws.
      vlm: rewrites.
      options: of its answers.
      evaluations: that it may take, attempts that fail among them; None is no limit.
    """

    images: ImageGenerator
    vlm: Vlm
    options: Options = Options(max_tokens=512)
    evaluations: int | None = None

    def run(self, task: Task, on_event: OnEvent = ignore) -> Result:
        """Draw what a task asks for; whatever fails is part of the result."""

        def work(own: "_Baseline") -> None:
            asked = requests.REWRITE.message(goal=task.goal)
            text = own.ask(asked, self.options, _words, "rewrite")
            own.draw([text], "I draw it as I have written it out.")

        own = _Baseline("rewrite", self.images, self.vlm, self.evaluations, task, on_event)
        return own.result(work)


def _choice(reply: Reply) -> str:
    return requests.choice(reply.text)  # it comes first, and may be all there is room for


def _words(reply: Reply) -> str:
    text = " ".join(whole(reply).split())
    if not text:
        raise ValueError("the rewritten prompt is empty")
    return text


class _Baseline:
    """One task under way: what was drawn and what it cost.

    Attributes:
      pictures: so far.
      final: number of the one that is the answer.
    """

    def __init__(
        self,
        mode: str,
        images: ImageGenerator,
        vlm: Vlm | None,
        limit: int | None,
        task: Task,
        on_event: OnEvent,
    ):
        self._mode, self._images, self._vlm, self._task = mode, images, vlm, task
        self._limit, self._tell = limit, on_event
        self._steps: list[Step] = []
        self._evaluations = self._tokens = 0
        self._ordered = 0  # pictures that are not drawn yet
        self._left_out: list[str] = []  # why, for each picture that could not be drawn
        self.pictures: list[Image.Image] = []
        self.final = 1

    def result(self, work: Any) -> Result:
        began, error = time.monotonic(), None
        try:
            check_goal(self._task.goal)
            work(self)
        except Exception as failure:  # whatever it is, what was drawn is kept
            error = f"{type(failure).__name__}: {failure}"
        trajectory = self._trajectory(error) if self._steps else None
        result = Result(
            self._task,
            trajectory,
            tuple(self.pictures),
            error,
            time.monotonic() - began,
            self._evaluations,
            self._tokens,
        )
        self._tell(Ended(self._task.id, result))
        return result

    def draw(self, texts: Sequence[str], reasoning: str) -> None:
        """Draw a picture for each text, all at once.

        A picture of no numbers is drawn anew, as often as may be and as the limit leaves room; then
        it is left out, if there are others.
        """
        began = time.monotonic()
        seed = lambda number: lambda attempt: self._task.draw("picture", number, attempt)
        waiting = [
            Drawing(self._images, Order(text), seed(number)) for number, text in enumerate(texts, 1)
        ]
        self._ordered = len(texts)
        for text, drawing in zip(texts, waiting, strict=True):
            self._ordered -= 1
            try:
                drawn, came_of = drawing.result(self._failed)
            except NotFinite as error:
                if not self._ordered and not self.pictures:
                    raise
                self._left_out.append(f"{type(error).__name__}: {error}")
                continue
            seconds = time.monotonic() - began
            self.pictures.append(drawn.picture)
            number = len(self.pictures)
            self._evaluations += drawn.evaluations
            metadata = {
                "draw_s": round(seconds, 4),
                "together": drawn.together,
                "evaluations": drawn.evaluations,
                "seed": came_of,
                "text": text,
            }
            action = Action(kind="generate", prompt=text)
            self._steps.append(
                Step(reasoning=reasoning, action=action, image=f"{number}.png", metadata=metadata)
            )
            self._tell(Drew(self._task.id, number, drawn.picture, seconds, drawn.evaluations))

    def ask(self, message: Message, options: Options, read: Any, *what: object) -> Any:
        """Return what a question's answer says; it is asked anew where it fails or says nothing."""
        attempt = 0
        while True:
            session = self._vlm.start()
            try:
                seed = self._task.draw(*what, attempt)
                chosen = dataclasses.replace(anew(options) if attempt else options, seed=seed)
                reply = session.submit([message], chosen).result()
                self._tokens += reply.usage.completion
                return read(reply)
            except InvalidRequest:
                raise
            except Exception as error:
                self._failed(error, attempt)
            finally:
                session.close()
            attempt += 1

    def _failed(self, error: Exception, attempt: int) -> None:
        if isinstance(error, NotFinite):  # it was computed to its end
            cost = self._images.evaluations
            self._evaluations += cost
            needed = self._evaluations + (self._ordered + 1) * cost
            if self._limit is not None and needed > self._limit:
                raise error
        if attempt == RETRIES:
            raise error
        why = f"{type(error).__name__}: {error}"
        self._tell(Retried(self._task.id, len(self._steps) + 1, why))

    def _trajectory(self, error: str | None) -> Trajectory:
        models = {"images": self._images.name}
        if self._vlm is not None:
            models["vlm"] = self._vlm.name
        metadata = {"mode": self._mode, "seed": self._task.seed, "models": models}
        metadata |= {"left_out": self._left_out} if self._left_out else {}
        metadata |= {"error": error} if error else {}
        return Trajectory(
            id=self._task.id,
            goal=self._task.goal,
            steps=tuple(self._steps),
            outcome="failed" if error else None,
            final=self.final,
            metadata=metadata,
        )
