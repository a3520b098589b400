"""Assistant turns of the loop: a grammar for models that decode here, tolerance for all others."""

import dataclasses
import itertools
import json
import re

from clvr_jax.backends.protocol import Options, Reply
from clvr_jax.data import turns
from clvr_jax.data.turns import Turn, marker

MOST_REFERENCES = 3
HEAT = 0.7  # least temperature of a turn that is asked for anew
# text of a JSON string on one line
_STRING = r'"([^"\\\x00-\x1f]|\\["\\/bfnrt])+"'
_OBJECT = re.compile(r"\{[^{}]*\"(?:action|kind)\"[^{}]*\}", re.DOTALL)
_THOUGHT = "</think>"  # what stands before is no part of an answer
_KINDS = {"create": "generate", "draw": "generate", "finish": "stop", "done": "stop"}


def grammar(number: int) -> str:
    """Return the grammar (Lark) of the turn that draws image `number` or stops.

    Free text, then an action as the last line, and the marker behind it or not. Before the first
    image there is nothing to edit and nothing to stop at. No image is referred to that does not
    exist, none twice, and no more than `MOST_REFERENCES` at once.
    """
    actions = [f'"generate", "prompt": {_STRING}']
    if number > 1:
        lists = [
            ", ".join(map(str, some))
            for count in range(1, MOST_REFERENCES + 1)
            for some in itertools.permutations(range(1, number), count)
        ]
        references = rf'"references": \[({"|".join(lists)})\]'
        actions += [f'"edit", "prompt": {_STRING}, {references}', '"stop"']
    one = "|".join(rf'\{{"action": {action}\}}' for action in actions)
    text = r"([^<{]|\n|<IMG_GEN_[1-9][0-9]?>)*"
    pattern = rf"({text}\n)?({one})(\n{marker(number)})?".replace("/", r"\/")
    return f"start: TURN\nTURN: /{pattern}/\n"


def anew(options: Options) -> Options:
    """Return the options of a turn that is asked for anew: by chance, else it would come again."""
    return dataclasses.replace(options, temperature=max(options.temperature, HEAT))


def whole(reply: Reply) -> str:
    """Return what a reply says.

    Raises:
      ValueError: it has no end.
    """
    if reply.finish != "stop":
        cut = f"the answer was cut after {reply.usage.completion} tokens"
        raise ValueError(f"{cut}: {reply.text[:200]!r}")
    return reply.text


def read(text: str, number: int) -> Turn:
    """Return what a turn says, in the trained format or one that is meant to be it.

    An action may stand in a code fence, over several lines, before other words, under the name
    "kind", or with references that a generate action does not take.

    Args:
      text: of the turn.
      number: of the image that it would draw.

    Raises:
      ValueError: there is no action, it names images that do not exist, or it stops before
        anything was drawn; told so that a model can mend it.
    """
    text = text.rpartition(_THOUGHT)[2]
    turn = _strict(text, number) or _lenient(text, number)
    if turn.action is None and not turn.stop:
        raise ValueError(
            'there is no action; end with one line like {"action": "generate", "prompt": "..."}'
        )
    if turn.stop and number == 1:
        raise ValueError("nothing has been drawn yet; begin with a generate action")
    named = [*turns.mentioned(turn.reasoning)]
    if turn.action is not None:
        named += [*turns.mentioned(turn.action.prompt), *turn.action.references]
    missing = sorted({n for n in named if not 1 <= n < number})
    if missing:
        exist = f"1 to {number - 1} exist" if number > 1 else "none exists yet"
        raise ValueError(f"image {missing[0]} does not exist; {exist}")
    if turn.action is not None and not turn.reasoning:
        turn = turn._replace(reasoning=turn.action.prompt)
    turns.plain(turn.reasoning)
    try:
        turns.without_action(turn.reasoning)
    except ValueError:
        raise ValueError("there is more than one action; end with a single one") from None
    return turn


def _strict(text: str, number: int) -> Turn | None:
    try:
        turn = turns.parse(text, number)
    except ValueError:
        return None
    return turn if turn.action is not None or turn.stop else None


def _lenient(text: str, number: int) -> Turn:
    objects = list(_OBJECT.finditer(text))
    if not objects:
        return Turn(text.strip())
    found = objects[-1]  # a model may quote the format before it uses it
    try:
        fields = json.loads(found[0], strict=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"the action {found[0]!r} is no JSON: {error}") from error
    kind = fields.pop("action", None) or fields.pop("kind", None)
    prompt = fields.get("prompt", "")
    if not isinstance(kind, str) or not isinstance(prompt, str):
        raise ValueError(f"the action {found[0]!r}: action and prompt must be texts")
    kind = _KINDS.get(kind, kind)
    reasoning = text[: found.start()].rstrip()
    reasoning = re.sub(r"\s*```(?:json)?$", "", reasoning).rstrip()
    if kind == "stop":
        line = turns.STOP
    else:
        if kind == "generate":
            fields.pop("references", None)
        fields["prompt"] = prompt.replace("\n", " ").strip()
        line = json.dumps({"action": kind, **fields}, ensure_ascii=False)
    return turns.parse(f"{reasoning}\n{line}" if reasoning else line, number)
