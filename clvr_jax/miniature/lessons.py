"""Lessons from which a vision-language model learns to see this world, drawn on the fly.

A lesson is a conversation of the teacher's about pictures whose scenes are known: what it says is
true. Its pictures are rendered later, many together: until then each is `BLANK`. Every request of
`clvr_jax.backends.requests` is learnt, and the loop's turns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message, assistant, system, user
from clvr_jax.data import turns
from clvr_jax.data.turns import Action
from clvr_jax.miniature import blends, comparisons, edits, prompts, scenes
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.held_out import Split, is_clean
from clvr_jax.miniature.painter import Painter
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.pictures import Picture, new_seed, picture_of
from clvr_jax.miniature.readings import Readings, certain
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.scene import CELLS, Scene, from_codes
from clvr_jax.miniature.splits import may_train
from clvr_jax.miniature.teacher import checks, language
from clvr_jax.miniature.teacher.answers import answer
from clvr_jax.miniature.teacher.policy import Policy
from clvr_jax.miniature.teacher.sight import Sight, see

# share of each kind among short lessons, of a question and an answer, unless others are given
SHORT = {
    "inventory": 0.1,
    "caption": 0.05,
    "difference": 0.1,
    "critique": 0.15,
    "verify": 0.1,
    "choose": 0.1,
    "checklist": 0.05,
    "rewrite": 0.05,
    "repeat": 0.05,
    "compare": 0.1,
    "find": 0.05,
    "clear": 0.05,
    "need": 0.05,
}
# and among long ones: turn after turn, as in the loop; the same up to a proxy prompt; told anew
LONG = {"story": 0.8, "proxy": 0.1, "narrate": 0.1}
RIGHT = 0.4  # share of right pictures among those that are judged
EDITS = 0.4  # share of checks, checklists and repetitions that are of an edit
MISTAKES = 0.3  # of the painter of a story, see `Painter`
LONGEST = 6  # pictures of a story
# asked by nobody else: who cannot find a word again, or what is meant, or tell whether two things
# are alike, or clear, cannot compare a picture with a prompt; and in pictures nearly all is as it
# should be
REPEAT = requests.Request("Say this again, word for word: {text}")
COMPARE = requests.Request("Is each of these what is asked for?\n{pairs}")
FIND = requests.Request("Where is each of these?\n{things}\nThere is {seen}.")
CLEAR = requests.Request("List the things by their places, and say which are unclear.")
NEED = requests.Request("What does this ask for?\n{text}")
RELATED = 0.4  # share of prompts that are drawn until they say how things lie; else few do
_PAIRS = 4  # of a comparison
_FOUND = 6  # things that are looked for
BLANK = Image.new("RGB", (SIDE, SIDE))
_POLICY = Policy(oversight=0.04)


class Lesson(NamedTuple):
    """What is said about pictures.

    Attributes:
      messages: the last one, and every assistant's, is to be learnt; pictures are `BLANK`.
      pictures: what stands for each of them, in order.
    """

    messages: list[Message]
    pictures: list[Picture]


def shares(given: Mapping[str, float | int]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the shares of short lessons and of long ones, as of `SHORT` and `LONG`.

    Args:
      given: both together; what is not named is not learnt. Shares of a sort need not sum to 1.

    Raises:
      ValueError: a name is unknown, or a share is negative.
    """
    unknown = [name for name in given if name not in _LESSONS]
    if unknown:
        raise ValueError(f"no lessons {', '.join(unknown)}; choose from {', '.join(_LESSONS)}")
    negative = {name: share for name, share in given.items() if share < 0}
    if negative:
        raise ValueError(f"shares of lessons are {negative}; none may be negative")
    return tuple({n: float(given[n]) for n in sort if given.get(n)} for sort in (SHORT, LONG))


def some_task(rng: Rng, tasks: Mapping[str, float]) -> str:
    """Return one of the tasks by its share; `tasks` is of one sort, as `shares` returns."""
    names, parts = zip(*tasks.items(), strict=True)
    return names[int(np.searchsorted(np.cumsum(parts), rng.random() * sum(parts)))]


def lesson(rng: Rng, task: str) -> Lesson:
    """Return a lesson of a task of `SHORT` or `LONG`.

    Raises:
      ValueError: the task is unknown.
    """
    if task not in _LESSONS:
        raise ValueError(f"no lessons of task {task!r}; choose from {', '.join(_LESSONS)}")
    return _LESSONS[task](rng)


def _edited(rng: Rng, scene: Scene, times: int) -> Scene:
    """The scene after some random edits."""
    while times:
        try:
            scene = edits.sample(rng, scene, None, Split.TRAIN)[2]
            times -= 1
        except ValueError:  # a full scene takes no more, and one thing may have nowhere to go
            continue
    return scene


def _about(
    rng: Rng, request: requests.Request, *shown: Scene, apart: bool = False, **fields: str
) -> Lesson:
    """A request about pictures, of one seed unless they are drawn apart, and the answer."""
    seeds = [new_seed(rng) for _ in shown] if apart else [new_seed(rng)] * len(shown)
    pictures = [Picture(scene.codes(), seed) for scene, seed in zip(shown, seeds, strict=True)]
    return _asking(rng, request, pictures, **fields)


def _asking(rng: Rng, request: requests.Request, pictures: list[Picture], **fields: str) -> Lesson:
    asked = request.message(*[BLANK] * len(pictures), **fields)
    said = [asked, assistant(_answer(rng, [asked], pictures))]
    return Lesson(said, pictures)


def _reading(picture: Picture) -> Readings:
    """What one reads of a picture who never errs."""
    unclear = np.isin(np.arange(CELLS), picture.unclear)
    return certain((picture.codes + picture.beside)[None], unclear[None])


def _answer(rng: Rng, said: list[Message], shown: Sequence[Picture]) -> str:
    return answer(said, [*map(_reading, shown)], _POLICY, str(rng.integers(2**32)))


def _scene(rng: Rng) -> Scene:
    return scenes.sample(rng, Split.TRAIN)


def _inventory(rng: Rng) -> Lesson:
    return _about(rng, requests.INVENTORY, _scene(rng))


def _caption(rng: Rng) -> Lesson:
    return _about(rng, requests.CAPTION, _scene(rng))


def _difference(rng: Rng) -> Lesson:
    before = _scene(rng)
    return _about(rng, requests.DIFFERENCE, before, _edited(rng, before, int(rng.integers(0, 3))))


def _asked_for(rng: Rng) -> tuple[prompts.Prompt, Scene]:
    """A prompt and a scene for it, in which something may be wrong."""
    prompt, scene = _prompt(rng)
    if rng.random() >= RIGHT:
        scene = _edited(rng, scene, int(rng.integers(1, 5)))
    return prompt, scene


def _critique(rng: Rng) -> Lesson:
    prompt, scene = _asked_for(rng)
    picture = blends.drawn(rng, picture_of(scene, rng))
    return _asking(rng, requests.CRITIQUE, [picture], goal=prompt.text)


def _choose(rng: Rng) -> Lesson:
    prompt, scene = _asked_for(rng)
    other = _edited(rng, scene, int(rng.integers(0, 3)))
    pair = (scene, other) if rng.random() < 0.5 else (other, scene)
    return _about(rng, requests.CHOOSE, *pair, apart=True, goal=prompt.text)


def _verify(rng: Rng) -> Lesson:
    if rng.random() < EDITS:
        _, text, before, after = edits.sample_scene(rng)
        if rng.random() >= RIGHT:
            if rng.random() < 0.5:  # more was changed
                after = _edited(rng, after, 1)
            else:  # nothing was, or something else
                after = _edited(rng, before, int(rng.integers(0, 2)))
        return _about(rng, requests.VERIFY, before, after, questions=checks.question(text))
    prompt, scene = _asked_for(rng)
    questions = "\n".join(checks.questions(prompt.goal, rng))
    return _about(rng, requests.VERIFY, scene, questions=questions)


def _checklist(rng: Rng) -> Lesson:
    if rng.random() < EDITS:
        return _about(rng, requests.EDIT_CHECKLIST, edit=_order(rng))
    return _about(rng, requests.CHECKLIST, goal=_goal(rng))


def _rewrite(rng: Rng) -> Lesson:
    return _about(rng, requests.REWRITE, goal=_goal(rng))


def _repeat(rng: Rng) -> Lesson:
    text = _order(rng) if rng.random() < EDITS else _goal(rng)
    return Lesson([REPEAT.message(text=text), assistant(text)], [])


def _compare(rng: Rng) -> Lesson:
    """Lines as `language.checked` has them, half of them wrong in one point."""
    lines = [comparisons.line(rng) for _ in range(_PAIRS)]
    asked = "\n".join(line.asked for line in lines)
    said = language.sentence(*(line.checked for line in lines))
    return Lesson([COMPARE.message(pairs=asked), assistant(said)], [])


def _find(rng: Rng) -> Lesson:
    """Where things are, of which all is told that there is; each serves once."""
    scene, used = _scene(rng), set()
    lines = [comparisons.found(rng, scene, used) for _ in range(_FOUND)]
    things = "\n".join(line.asked for line in lines)
    asked = FIND.message(things=things, seen=language.all_of(Sight(scene)))
    said = [*(line.checked for line in lines), language.serving(Sight(scene), used)]
    return Lesson([asked, assistant(language.sentence(*said))], [])


def _clear(rng: Rng) -> Lesson:
    """What there is, with many things unclear: elsewhere they are too rare to learn the look of."""
    picture = blends.many(rng, picture_of(_scene(rng), rng))
    told = language.all_of(see(_reading(picture)))
    return Lesson([CLEAR.message(BLANK), assistant(language.sentence(told))], [picture])


def _need(rng: Rng) -> Lesson:
    """What a prompt asks for, as the loop's first turn lists it."""
    text = _goal(rng)
    said = language.sentence(*language.listed(parse_prompt(text)))
    return Lesson([NEED.message(text=text), assistant(said)], [])


def _prompt(rng: Rng) -> tuple[prompts.Prompt, Scene]:
    """A prompt and a scene that it describes."""
    related = rng.random() < RELATED
    while True:
        prompt, scene = prompts.sample(rng, None, Split.TRAIN)
        if prompt.goal.relations or not related:
            return prompt, scene


def _goal(rng: Rng) -> str:
    return _prompt(rng)[0].text


def _order(rng: Rng) -> str:
    return edits.sample_scene(rng)[1]


def _story(rng: Rng) -> Lesson:
    """A drawing from the first picture to the last, as the loop has it, by a painter who errs."""
    while True:
        told = _drawing(rng)
        # what an edit leaves open may come out as something that is held out
        clean = all(is_clean(scene) for scene in _scenes(told.pictures))
        if clean and all(map(may_train, _actions(told))):
            return told


def _drawing(rng: Rng) -> Lesson:
    prompt, _ = _prompt(rng)
    said, pictures = [system(requests.CONTROL), user(prompt.text)], []
    painter, seed = Painter(rng, MISTAKES), 0
    while True:
        text = _answer(rng, said, pictures)
        said.append(assistant(text))
        action = turns.parse(text, len(pictures) + 1).action
        if action is None or len(pictures) == LONGEST:
            return Lesson(said, pictures)
        scene = painter.draw(action, _scenes(pictures))
        if action.kind == "generate":
            seed = new_seed(rng)
        base = pictures[action.references[-1] - 1] if action.references else None
        pictures.append(blends.drawn(rng, Picture(scene.codes(), seed), base))
        said.append(user(BLANK))


def _proxy(rng: Rng) -> Lesson:
    """A story up to its last action, and that summed up."""
    story = _story(rng)
    pictures = story.pictures[:-1]
    said = [*story.messages[: 2 * len(pictures) + 3], requests.PROXY.message()]
    return Lesson([*said, assistant(_answer(rng, said, pictures))], pictures)


def _narrate(rng: Rng) -> Lesson:
    """A story of which only the pictures and actions are known, told."""
    story = _story(rng)
    steps = "\n".join(action.line() for action in _actions(story)[: len(story.pictures)])
    goal, blank = story.messages[1].text, [BLANK] * len(story.pictures)
    said = [requests.NARRATE.message(*blank, goal=goal, steps=steps)]
    return Lesson([*said, assistant(_answer(rng, said, story.pictures))], story.pictures)


def _actions(story: Lesson) -> list[Action]:
    """The actions of a story; where it was cut, there is one more than pictures."""
    replies = [message.text for message in story.messages if message.role == "assistant"]
    found = [turns.parse(text, n).action for n, text in enumerate(replies, 1)]
    return [action for action in found if action is not None]


def _scenes(pictures: list[Picture]) -> list[Scene]:
    return [from_codes(picture.codes) for picture in pictures]


_LESSONS: dict[str, Callable[[Rng], Lesson]] = {
    "inventory": _inventory,
    "caption": _caption,
    "difference": _difference,
    "critique": _critique,
    "verify": _verify,
    "choose": _choose,
    "checklist": _checklist,
    "rewrite": _rewrite,
    "repeat": _repeat,
    "compare": _compare,
    "find": _find,
    "clear": _clear,
    "need": _need,
    "story": _story,
    "proxy": _proxy,
    "narrate": _narrate,
}
