"""The teacher's answer to each request of `clvr_jax.backends.requests`."""

import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message
from clvr_jax.backends.requests import CONTROL, Proxy
from clvr_jax.data import turns
from clvr_jax.miniature import prompts
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.goal import Goal, Group
from clvr_jax.miniature.orders import by_place
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.places import CELL_NAMES
from clvr_jax.miniature.readings import Readings
from clvr_jax.miniature.teacher import checks, control, language, looks
from clvr_jax.miniature.teacher.control import Story
from clvr_jax.miniature.teacher.layout import layout
from clvr_jax.miniature.teacher.policy import Policy
from clvr_jax.miniature.teacher.sight import Sight, see
from clvr_jax.miniature.words import vary

Sights = Sequence[Sight]


def answer(said: Sequence[Message], readings: Sequence[Readings], policy: Policy, seed: str) -> str:
    """Return the reply to a conversation.

    Args:
      said: its messages; the last one asks.
      readings: of all its pictures, one each.
      policy: how pictures are worked on.
      seed: decides wordings and choices, together with the conversation.

    Raises:
      ValueError: it is no request that is known, or it is about things outside of the world.
    """
    heard = [(message.role, message.text) for message in said]
    rng = _rng(seed, heard, [reading.codes.tolist() for reading in readings])
    sights = tuple(_glance(see(reading), policy.oversight, rng) for reading in readings)
    last = said[-1].text
    if heard[0] == ("system", CONTROL) and len(heard) > 1:
        story = _story(heard[1][1], sights)
        if requests.PROXY.match(last) is None:
            return control.turn(story, policy, rng)
        return _proxy(said[-2].text, sights, rng).line()
    for request, reply in _REPLIES:
        fields = request.match(last)
        if fields is not None:
            return reply(sights, rng, seed, **fields)
    raise ValueError(f"the teacher knows no such request: {last[:200]!r}")


def _glance(sight: Sight, oversight: float, rng: Rng) -> Sight:
    """A sight of which some things are overlooked."""
    if not oversight:
        return sight
    cells = [thing.cell for thing in sight.scene.things if rng.random() < oversight]
    return sight._replace(overlooked=tuple(cells))


def _rng(*given: object) -> Rng:
    digest = hashlib.blake2b(repr(given).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _story(goal: str, sights: Sights) -> Story:
    return Story(goal, wanted(goal), tuple(sights))


@functools.lru_cache(4096)
def wanted(text: str) -> Goal:
    """Return the goal of a prompt that is to be drawn, which is asked for in every turn.

    Raises:
      ValueError: it is about other things than this world's, contradicts itself, or relates things
        that cannot be told apart. The message is for users.
    """
    goal = parse_prompt(text)
    try:
        language.listed(goal)
        layout(goal, _rng(text))
    except ValueError as error:
        raise ValueError(f'"{text}" cannot be drawn: {error}') from None
    return goal


def _proxy(turn: str, sights: Sights, rng: Rng) -> Proxy:
    """What the picture after `turn` should show, and how it comes about."""
    action = turns.parse(turn, len(sights) + 1).action
    if action is None:
        raise ValueError(f"the last turn draws nothing that could be summed up: {turn!r}")
    if action.kind == "generate":
        return Proxy(scene=action.prompt)
    edit = parse_edit(by_place(action))
    *sources, base = (sights[number - 1].scene for number in action.references)
    gone, cells, *kinds = edit.outcome(base, *sources)
    kept = base.without(gone.cell) if gone else base
    groups = [Group(1, *thing[1:], CELL_NAMES[thing.cell]) for thing in kept.things]
    if cells:
        place = CELL_NAMES[cells[0]] if len(cells) == 1 else edit.becomes.place
        groups.append(Group(1, *(v[0] if len(v) == 1 else None for v in kinds), place))
    scene = prompts.write(Goal(tuple(groups)), rng)
    return Proxy(scene=scene, edit=action.prompt, references=action.references)


# how each request is answered: from the pictures, by chance (the same for the same conversation),
# the seed of layouts, and the request's fields


def _checklist(sights: Sights, rng: Rng, seed: str, goal: str) -> str:
    return "\n".join(checks.questions(parse_prompt(goal), rng))


def _edit_checklist(sights: Sights, rng: Rng, seed: str, edit: str) -> str:
    return checks.question(edit)


def _verify(sights: Sights, rng: Rng, seed: str, questions: str) -> str:
    return "\n".join(checks.reply(question, sights, rng) for question in questions.splitlines())


def _critique(sights: Sights, rng: Rng, seed: str, goal: str) -> str:
    wish, sight = parse_prompt(goal), _last(sights)
    check = language.sentence(language.seen(rng, sight), *language.checked(rng, wish, sight))
    faults = [f"{kind}: {words}" for kind, words in language.wrong(rng, wish, sight)]
    return "\n".join([f"check: {check}", *(faults or [language.NO_FAULT])])


def _choose(sights: Sights, rng: Rng, seed: str, goal: str) -> str:
    wish = parse_prompt(goal)
    first, second = (sight.badness(wish) for sight in _last(sights, 2))
    if first == second:
        return f"tie: {vary(rng, language.BOTH_WRONG if first else language.BOTH_RIGHT)}"
    worse = second > first
    fault = language.wrong(rng, wish, sights[worse])[0][1]
    return f"{'BA'[worse]}: {language.WHICH[worse]} {fault}"


def _narrate(sights: Sights, rng: Rng, seed: str, goal: str, steps: str) -> str:
    actions = [turns.parse(line, n).action for n, line in enumerate(steps.splitlines(), 1)]
    if len(actions) != len(sights) or None in actions:
        raise ValueError(
            f"a story needs one line of action a picture, got {len(sights)} pictures and {steps!r}"
        )
    story = _story(goal, sights)
    told = [control.tell(story.upto(n), action, rng) for n, action in enumerate(actions)]
    return "\n".join([*told, control.closing(story, rng)])


def _rewrite(sights: Sights, rng: Rng, seed: str, goal: str) -> str:
    return prompts.describe(layout(wanted(goal), _rng(seed, goal)), rng, detail=1.0).text


def _inventory(sights: Sights, rng: Rng, seed: str) -> str:
    return looks.inventory(_last(sights).scene)


def _caption(sights: Sights, rng: Rng, seed: str) -> str:
    return looks.caption(_last(sights).scene, rng)


def _difference(sights: Sights, rng: Rng, seed: str) -> str:
    first, second = _last(sights, 2)
    return "\n".join(looks.difference(first.scene, second.scene, rng))


def _last(sights: Sights, count: int = 1):
    if len(sights) < count:
        raise ValueError(f"the request is about {count} pictures, {len(sights)} are shown")
    return sights[-1] if count == 1 else sights[-count:]


_REPLIES: tuple[tuple[requests.Request, Callable[..., str]], ...] = (
    (requests.CHECKLIST, _checklist),
    (requests.EDIT_CHECKLIST, _edit_checklist),
    (requests.VERIFY, _verify),
    (requests.CRITIQUE, _critique),
    (requests.CHOOSE, _choose),
    (requests.NARRATE, _narrate),
    (requests.REWRITE, _rewrite),
    (requests.INVENTORY, _inventory),
    (requests.CAPTION, _caption),
    (requests.DIFFERENCE, _difference),
)
