"""Checklists: questions whose answers are all yes for a right picture, and their answers."""

import re
from collections.abc import Sequence

from clvr_jax.miniature.chance import Rng, pick
from clvr_jax.miniature.goal import Goal, Group
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.places import PLACES
from clvr_jax.miniature.sentences import names
from clvr_jax.miniature.teacher import language
from clvr_jax.miniature.teacher.sight import Sight
from clvr_jax.miniature.words import noun_phrase, relation_phrase

_ONLY = "is this the only change: {edit}"
_ALL = "in all"


def questions(goal: Goal, rng: Rng) -> list[str]:
    """Return questions for each group (so many at least), each relation, and the number of all."""
    asked = [_there(kind.count, language.some(rng, kind)) for kind in _wanted(goal)]
    for first, word, second in goal.relations:
        ends = [noun_phrase(rng, 1, *pick(rng, names(goal.groups, i))) for i in (first, second)]
        asked.append(_there(1, f"{ends[0]} {relation_phrase(rng, word)} {ends[1]}"))
    return [*asked, _there(goal.count, f"{language.several(goal.count)} {_ALL}")]


def question(edit: str) -> str:
    """Return the question whether an edit was done, and nothing else.

    Raises:
      ValueError: the text is no edit.
    """
    parse_edit(edit)
    return _ONLY.format(edit=edit)


def reply(question: str, sights: Sequence[Sight], rng: Rng) -> str:
    """Return "yes", or "no" and why.

    Args:
      question: as `questions` asks.
      sights: the last one is asked about; an edit was made from those before it.
      rng: decides wordings.

    Raises:
      ValueError: it is no such question, or too few pictures are shown.
    """
    edit = re.fullmatch(_ONLY.format(edit="(.+)"), question)
    if len(sights) < (2 if edit else 1):
        raise ValueError(
            f"{question!r} is about {'the pictures before and after' if edit else 'a picture'}, "
            f"{len(sights)} are shown"
        )
    *earlier, sight = sights
    if edit:
        *sources, before = (other.scene for other in earlier)
        clean = sight.tidy and not sight.unclear
        right = clean and parse_edit(edit[1]).satisfied(before, sight.scene, *sources)
        return "yes" if right else "no"
    asked = re.fullmatch(r"(?:is|are) there (.+)\?", question)
    if not asked:
        raise ValueError(
            f'{question!r} is no question of a checklist; they ask "is there ...?", "are there '
            f'...?", or "{_ONLY.format(edit="...")}"'
        )
    there = len(sight.scene.things)
    if count := re.fullmatch(rf"(\w+) things? {_ALL}", asked[1]):
        right = sight.tidy and language.number(there) == count[1]
        return "yes" if right else f"no, {language.several(there)}"
    goal = parse_prompt(asked[1])
    faults = language.wrong(rng, goal, Sight(sight.clear))
    wrong = [words for kind, words in faults if kind != "extra"]
    return f"no, {wrong[0]}" if wrong else "yes"


def _there(count: int, what: str) -> str:
    return f"{'are' if count > 1 else 'is'} there {what}?"


def _wanted(goal: Goal) -> list[Group]:
    """How many things at least are as each group says: its own, and those of narrower groups."""
    counts = {
        kind: sum(group.count for group in goal.groups if _implies(group, kind))
        for kind in (group._replace(count=1) for group in goal.groups)
    }
    return [kind._replace(count=count) for kind, count in counts.items()]


def _implies(group: Group, other: Group) -> bool:
    """Say if each thing of a group is as another group says."""
    *kind, place = group[1:]
    *kinder, area = other[1:]
    inside = area is None or (place is not None and PLACES[place] <= PLACES[area])
    return inside and all(b in (None, a) for a, b in zip(kind, kinder, strict=True))
