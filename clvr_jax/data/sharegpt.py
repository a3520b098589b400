"""ShareGPT records, as LLaMA-Factory reads them, to trajectories and back.

    {"id": "jug-1", "images": ["1.png"], "conversations": [
      {"from": "human", "value": "a jug with a lid"},
      {"from": "gpt", "value": "I begin with the jug.\n<IMG_GEN_1>"},
      {"from": "human", "value": "<image>"},
      {"from": "gpt", "value": "The jug has its lid."}]}

or, in the other variant, "messages" of {"role": "user" | "assistant", "content"}. A system turn may
come first, or stand as "system" beside the conversation. The turns' text is the trained format of
`clvr_jax.data.turns`, with or without action lines. What the format has no place for (critiques,
verdicts, outcome, final image, metadata) is not written.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from clvr_jax.data.index import RecordError
from clvr_jax.data.trajectory import IMAGE, Trajectory
from clvr_jax.data.turns import MARKER, STOP, Turn, explain, marker, parse

_FIELDS = {"id", "conversations", "messages", "images", "system"}
_EMPTY = {"videos", "audios", "tools"}  # LLaMA-Factory's; not used here, so they must hold nothing
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Style = Literal["conversations", "messages"]


class Said(NamedTuple):
    """One turn: who, what, and which of the conversation it is, counted from 1."""

    role: str
    text: str
    number: int


def to_record(trajectory: Trajectory, style: Style = "conversations") -> dict[str, Any]:
    """Return a trajectory as a ShareGPT record; its images are named as they are."""
    said, images = [], []
    for number, message in enumerate(trajectory.messages(), 1):
        texts = [part if isinstance(part, str) else IMAGE for part in message.parts]
        images += [part.image for part in message.parts if not isinstance(part, str)]
        said.append(Said(message.role, "".join(texts), number))
    if style == "messages":
        turns = [{"role": turn.role, "content": turn.text} for turn in said]
    else:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [{"from": names[turn.role], "value": turn.text} for turn in said]
    return {"id": trajectory.id, style: turns, "images": images}


def is_sharegpt(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in this format, not in the native one."""
    return "conversations" in record or "messages" in record


def from_record(record: Mapping[str, Any], name: str) -> Trajectory:
    """Return the trajectory of a ShareGPT record.

    Args:
      record: its JSON object.
      name: the trajectory's id if the record has none.

    Raises:
      RecordError: it is none.
    """
    faults: list[str] = []
    said = _turns(record, faults)
    images = _images(record, faults)
    system = record.get("system") or None
    if said and said[0].role == "system":
        if system is not None:
            faults.append("has a system turn and a system field; give one of them")
        system, said = said[0].text, said[1:]
    _check_order(said, faults)
    _check_tags(said, images, faults)
    if faults:
        raise RecordError(*faults)
    given = {"id": record.get("id", name), "goal": said[0].text, "system": system}
    given |= _steps(said[1:], images, faults)
    if faults:
        raise RecordError(*faults)
    try:
        return Trajectory.model_validate(given)
    except ValidationError as error:
        raise RecordError(*explain(error)) from error


def _turns(record: Mapping[str, Any], faults: list[str]) -> list[Said]:
    if "conversations" in record and "messages" in record:
        faults.append("has conversations and messages; give one of them")
    for field in sorted(set(record) - _FIELDS):
        if field not in _EMPTY:
            faults.append(f"{field}: is no field of the format")
        elif record[field]:
            faults.append(f"{field}: must be empty; only images are read")
    style = "conversations" if "conversations" in record else "messages"
    who, what = ("from", "value") if style == "conversations" else ("role", "content")
    if not isinstance(record[style], list) or not record[style]:
        faults.append(f"{style}: must be a list of turns, given {record[style]!r:.60}")
        return []
    said = []
    for number, turn in enumerate(record[style], 1):
        if not isinstance(turn, dict) or set(turn) != {who, what}:
            faults.append(f"turn {number}: must have {who} and {what} alone, given {turn!r:.60}")
        elif not isinstance(turn[who], str) or turn[who] not in _ROLES:
            faults.append(f"turn {number}: {who} is {turn[who]!r}; it may be {', '.join(_ROLES)}")
        elif not isinstance(turn[what], str):
            faults.append(f"turn {number}: {what} must be a text, given {turn[what]!r:.60}")
        else:
            said.append(Said(_ROLES[turn[who]], turn[what], number))
    return said


def _images(record: Mapping[str, Any], faults: list[str]) -> list[str]:
    images = record.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        faults.append(f"images: must be a list of paths, given {images!r:.60}")
        return []
    return images


def _check_order(said: Sequence[Said], faults: list[str]) -> None:
    if said and len(said) < 2:
        faults.append("no steps: the conversation has no assistant turn")
    for index, turn in enumerate(said):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            faults.append(
                f"turn {turn.number}: wrong role order, the {turn.role} speaks where the "
                f"{expected} must"
            )
            return


def _check_tags(said: Sequence[Said], images: Sequence[str], faults: list[str]) -> None:
    tags = sum(turn.text.count(IMAGE) for turn in said)
    if tags != len(images):
        faults.append(f"{tags} {IMAGE} tags in the turns, {len(images)} images are listed")
    for index, turn in enumerate(said):
        count = turn.text.count(IMAGE)
        if turn.role != "user":
            if count:
                faults.append(f"turn {turn.number}: {IMAGE} stands in a turn of the {turn.role}")
        elif index == 0 and count:
            faults.append(f"turn {turn.number}: {IMAGE} stands before any image was drawn")
        elif index > 0 and count != 1:
            faults.append(f"turn {turn.number}: must hold {IMAGE} once, holds it {count} times")


def _steps(said: Sequence[Said], images: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """Return steps, closing and outcome of the turns that follow the goal."""
    steps: list[dict[str, Any]] = []
    for number, (told, shown) in enumerate(zip(said[::2], said[1::2]), 1):
        turn = _parse(told, number, faults)
        if turn is not None and turn.image is None:
            faults.append(f"turn {told.number}: {_marker_fault(told.text, number)}")
        elif turn is not None:
            steps.append(
                {
                    "reasoning": turn.reasoning,
                    "action": turn.action,
                    "image": images[number - 1],
                    "observation": shown.text,
                }
            )
    if len(said) % 2 == 0:
        return {"steps": steps}
    turn = _parse(said[-1], len(said) // 2 + 1, faults)
    if len(said) == 1 and not faults:
        faults.append("no steps: no turn shows an image")
    if turn is None or faults:
        return {}
    last, acted = f"turn {said[-1].number}", steps[0]["action"] is not None
    if turn.image is not None:
        faults.append(f"{last}: draws {marker(turn.image)}, but no turn after it shows it")
    elif turn.action is not None:
        faults.append(f"{last}: has an action but no {marker(len(steps) + 1)}")
    elif turn.stop != acted:
        faults.append(
            f"{last}: the steps have actions, so it must end with {STOP}"
            if acted
            else f"{last}: has a stop action, the steps have no actions"
        )
    bare = turn.stop and not turn.reasoning
    return {
        "steps": steps,
        "closing": turn.reasoning,
        "outcome": "stopped" if bare else None,
    }


def _parse(said: Said, number: int, faults: list[str]) -> Turn | None:
    try:
        return parse(said.text, number)
    except ValueError as error:
        faults.append(f"turn {said.number}: {error}")
        return None


def _marker_fault(text: str, number: int) -> str:
    found = list(MARKER.finditer(text))
    own = marker(number)
    if not found:
        return f"must end with {own}"
    if found[-1][0] == own:
        return f"text follows {own}: {text[found[-1].end() :].strip()!r:.60}"
    return f"must end with {own}; its last marker is {found[-1][0]}"
