"""The loop's turns: deciding what to do next, and telling why in the first person."""

from collections.abc import Sequence
from typing import NamedTuple

from clvr_jax.data.turns import Action, Turn, marker
from clvr_jax.miniature import edits
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.goal import Goal, Group
from clvr_jax.miniature.orders import by_number
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.references import Description
from clvr_jax.miniature.teacher import language
from clvr_jax.miniature.teacher.changes import changes, mark
from clvr_jax.miniature.teacher.language import sentence
from clvr_jax.miniature.teacher.policy import Policy
from clvr_jax.miniature.teacher.sight import Sight
from clvr_jax.miniature.words import enumerate_words, vary

_SAID = 3  # most faults that are told of a picture that is gone back to


class Story(NamedTuple):
    """A goal and what was drawn for it so far.

    Attributes:
      text: what is wanted, in the user's words.
      goal: the same as data.
      sights: the pictures.
    """

    text: str
    goal: Goal
    sights: tuple[Sight, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the last picture is right."""
        return bool(self.sights) and self.sights[-1].shows(self.goal)

    def upto(self, count: int) -> "Story":
        """Return the story when it had so many pictures."""
        return self._replace(sights=self.sights[:count])

    @property
    def badness(self) -> list[float]:
        """How far each picture is from the goal."""
        return [sight.badness(self.goal) for sight in self.sights]


def _best(badness: Sequence[float]) -> int:
    return min(range(len(badness)), key=lambda i: (badness[i], -i))


def turn(story: Story, policy: Policy, rng: Rng) -> str:
    """Return the next turn in the trained format."""
    action = decide(story, policy, rng)
    if action is None:
        return Turn(closing(story, rng), stop=True).text()
    return Turn(tell(story, action, rng), action, len(story.sights) + 1).text()


def decide(story: Story, policy: Policy, rng: Rng) -> Action | None:
    """Return what to do next, None to stop."""
    goal, sights = story.goal, story.sights
    if story.done:
        return None
    complicated = goal.count >= policy.complicated
    if not sights:
        stepwise = complicated and rng.random() < policy.stepwise
        return _generate(story, int(rng.integers(1, 4)) if stepwise else 0)
    badness = story.badness
    best = _best(badness)
    hopeless = not sights[best].tidy or len(sights[best].faults(goal)) > policy.hopeless
    vain = len(sights) - 1 - badness.index(min(badness))  # pictures since one was better than all
    if hopeless or (vain and vain % policy.patience == 0):
        return _generate(story, goal.count // 2 if complicated else 0)
    found = changes(goal, sights[best], rng)
    if not found:
        return _generate(story, 0)
    edit = found[vain % len(found)]  # not the same again at once, unless equals are shuffled so
    if edit.kind == "add" and rng.random() < policy.bring:
        brought = _bring(story, best, edit)
        if brought:
            source, edit = brought
            numbers = source + 1, best + 1
            text = by_number(edits.write(edit, rng), numbers)
            return Action(kind="edit", prompt=text, references=numbers)
    return Action(kind="edit", prompt=edits.write(edit, rng), references=(best + 1,))


def _generate(story: Story, later: int) -> Action:
    """Draw from nothing: all in the user's words, or without the last things (half at most)."""
    count = story.goal.count
    text = story.text
    if later:
        text = ". ".join(language.listed(_first(story.goal, count - min(later, count // 2))))
    return Action(kind="generate", prompt=text)


def _first(goal: Goal, count: int) -> Goal:
    """The first so many things of a goal, and the relations between them."""
    groups: list[Group] = []
    for group in goal.groups:
        left = count - sum(taken.count for taken in groups)
        if left:
            groups.append(group._replace(count=min(group.count, left)))
    within = lambda relation: max(relation.first, relation.second) < len(groups)
    return Goal(tuple(groups), tuple(filter(within, goal.relations)))


def _bring(story: Story, best: int, add: Edit) -> tuple[int, Edit] | None:
    """Return an earlier picture that has what is to be added, and the edit that takes it there."""
    _, _, _, *where = new = add.becomes
    for index, sight in enumerate(story.sights):
        fitting = [thing for thing in sight.clear.things if new.fits(thing)]
        if fitting and index != best:
            thing = mark(sight.scene, fitting[0])
            return index, Edit("bring", thing, Description(None, None, None, *where))
    return None


def tell(story: Story, action: Action, rng: Rng) -> str:
    """Return why an action is taken: what is seen, what is right and wrong, what comes next."""
    if not story.sights:
        return _opening(story, action, rng)
    last, base = len(story.sights), action.references[-1] if action.references else None
    parts = _look(story, rng)
    if base is None:
        return sentence(*parts, vary(rng, language.ANEW))
    if base < last:
        parts += [vary(rng, language.BACK).format(image=marker(base)), _wrong(story, base, rng)]
    order = action.prompt.rstrip(".")
    order = (order[0].lower() + order[1:]).removeprefix("please ")
    act = vary(rng, language.ACT).format(edit=order) + vary(rng, language.KEEP)
    return sentence(*parts, act)


def closing(story: Story, rng: Rng) -> str:
    """Return the last narrative."""
    done = [vary(rng, language.DONE)] if story.done else []
    return sentence(*_look(story, rng), *done, vary(rng, language.STOP))


def _opening(story: Story, action: Action, rng: Rng) -> str:
    things, *relations = language.listed(story.goal)
    need = [vary(rng, language.NEED).format(things=things), *relations]
    drawn = parse_prompt(action.prompt).count
    if drawn == story.goal.count:
        return sentence(*need, vary(rng, language.WHOLE))
    return sentence(*need, vary(rng, language.BEGIN).format(some=language.several(drawn)))


def _judge(story: Story, rng: Rng) -> list[str]:
    """Say what the last change did."""
    if len(story.sights) < 2:
        return []
    *earlier, after = story.badness
    before = min(earlier)
    forms = (
        language.WORKED if after < before else language.SAME if after == before else language.WORSE
    )
    return [vary(rng, forms)]


def _look(story: Story, rng: Rng) -> list[str]:
    """Say what the last change did and what is seen, and go through all that is needed."""
    sight = story.sights[-1]
    return [
        *_judge(story, rng),
        language.seen(rng, sight),
        *language.checked(rng, story.goal, sight),
    ]


def _wrong(story: Story, number: int, rng: Rng) -> str:
    """Say what is wrong with picture `number`."""
    said = [clause for _, clause in language.wrong(rng, story.goal, story.sights[number - 1])]
    more = f", {vary(rng, language.MORE)}" if len(said) > _SAID else ""
    return enumerate_words(said[:_SAID]) + more
