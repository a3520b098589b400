"""One assistant turn as text: reasoning, action, marker, and back.

This is the only format in which the vision-language model is trained and asked. A turn that draws
image n (counted from 1 through the trajectory) is

    The jug still lacks its lid, so I add one and keep everything else of <IMG_GEN_1>.
    {"action": "edit", "prompt": "add a lid to the jug in <IMG_GEN_1>", "references": [1]}
    <IMG_GEN_2>

and the last turn is the closing narrative with `{"action": "stop"}` as its last line. The action is
one line of JSON with its keys in this order; `references` belongs to edits alone. Trajectories
without actions (imported ones) have the marker behind the reasoning, and the closing alone.
Earlier images are named by their markers, in narratives and in prompts.
"""

import json
import re
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

MARKER = re.compile(r"<IMG_GEN_(\d+)>")
# control tokens of Qwen's tokenizers, and LLaMA-Factory's tags for media: as text of a user or a
# model they would end turns, stand for pictures, or be cut out by the chat template
_RESERVED = re.compile(
    r"<\|\w+\|>|</?(?:think|tool_call|tool_response|tools)>|<(?:image|video|audio)>"
)
STOP = '{"action": "stop"}'


def marker(number: int) -> str:
    """Return the text that stands for image `number`, counted from 1."""
    return f"<IMG_GEN_{number}>"


def mentioned(text: str) -> list[int]:
    """Return the numbers of the images that a text names, in order, repeated as they are."""
    return [int(number) for number in MARKER.findall(text)]


def plain(text: str) -> str:
    """Return a text without white space at its ends; raise ValueError if it is not plain."""
    found = _RESERVED.search(text)
    if found:
        raise ValueError(f"contains {found[0]}, which models read as a control token; remove it")
    return text.strip()


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


Text = Annotated[str, AfterValidator(plain)]  # white space at both ends is dropped
Words = Annotated[Text, AfterValidator(_not_empty)]
Number = Annotated[int, Field(ge=1)]  # of an image, counted from 1


class Model(BaseModel):
    """A record: no unknown fields, no silent conversions, no changes after the fact."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Action(Model):
    """What the image model is told to do.

    Attributes:
      kind: generate draws from nothing, edit draws from earlier images.
      prompt: the instruction; names images by their markers.
      references: numbers of the earlier images an edit works from, in the order in which the image
        model is given them.
    """

    kind: Literal["generate", "edit"]
    prompt: Words
    references: tuple[Number, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _check(self) -> "Action":
        if self.kind == "generate" and self.references:
            raise ValueError(
                f"a generate action has references {list(self.references)}; only edit takes any"
            )
        if self.kind == "edit" and not self.references:
            raise ValueError("an edit action has no references; name the images it works from")
        if len(set(self.references)) < len(self.references):
            raise ValueError(f"references {list(self.references)} name an image twice")
        return self

    def line(self) -> str:
        """Return the action as the line of JSON that stands in a turn."""
        fields = {"action": self.kind, "prompt": self.prompt}
        if self.kind == "edit":
            fields["references"] = list(self.references)
        return json.dumps(fields, ensure_ascii=False)


class Turn(NamedTuple):
    """What one assistant turn says.

    Attributes:
      reasoning: the narrative; of the last turn the closing. May be empty.
      action: what to draw, where the data has actions.
      image: number of the image that the turn draws, None for the last turn.
      stop: whether the turn ends the trajectory by an action line.
    """

    reasoning: str
    action: Action | None = None
    image: int | None = None
    stop: bool = False

    def text(self) -> str:
        """Return the turn in the trained format."""
        lines = [self.reasoning] if self.reasoning else []
        if self.action is not None:
            lines.append(self.action.line())
        if self.stop:
            lines.append(STOP)
        if self.image is not None:
            lines.append(marker(self.image))
        return "\n".join(lines)


def parse(text: str, number: int) -> Turn:
    """Return what an assistant turn says; the inverse of `Turn.text`.

    White space at both ends and before the marker is dropped. A turn that a model has just written
    may end with its action line, before the marker is appended.

    Args:
      text: the turn.
      number: of the image that this turn would draw; another marker at its end is a mention.

    Raises:
      ValueError: the action line is broken or contradicts the marker.
    """
    body, draws = text.strip(), False
    if body.endswith(marker(number)):
        body, draws = body[: -len(marker(number))].rstrip(), True
    image = number if draws else None
    head, _, last = body.rpartition("\n")
    if not _is_action(last):
        return Turn(body, image=image)
    action = _action(last.strip())
    if action is None and draws:
        raise ValueError(f"the turn stops and draws {marker(number)}; it can do one of them")
    return Turn(head.rstrip(), action, image, stop=action is None)


def without_action(text: str) -> str:
    """Return a narrative; raise ValueError if its last line would be read as an action."""
    if _is_action(text.rpartition("\n")[2]):
        raise ValueError("ends with an action line; give it as the action")
    return text


def explain(error: ValidationError) -> list[str]:
    """Return each fault of a record in words, with its place: `step 2: image: is missing`."""
    faults = []
    for fault in error.errors(include_url=False):
        place = _place(fault["loc"])
        kind, given = fault["type"], fault["input"]
        if kind == "missing":
            text = "is missing"
        elif kind == "extra_forbidden":
            text = "is no field of the schema"
        elif kind == "value_error":
            text = str(fault["ctx"]["error"])
        else:
            said = fault["msg"].replace("tuple", "list").replace("Tuple", "List")  # JSON's word
            text = f"{said}, given {repr(given)[:80]}"
        faults.append(f"{place}: {text}" if place else text)
    return faults


def _place(path: tuple[str | int, ...]) -> str:
    if len(path) > 1 and path[0] == "steps":
        return ": ".join([f"step {int(path[1]) + 1}", *filter(None, [_place(path[2:])])])
    return ".".join(str(part) for part in path)


def _is_action(line: str) -> bool:
    return re.match(r'\s*\{\s*"action"\s*:', line) is not None


def _action(line: str) -> Action | None:
    """Return the action of a line, None for stop."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"the action line {line!r} is no JSON: {error}") from error
    kind = fields.pop("action")
    if kind == "stop":
        if fields:
            raise ValueError(f"the action line {line!r}: stop takes nothing else")
        return None
    if "kind" in fields:
        raise ValueError(f"the action line {line!r}: kind is no field of the schema")
    try:
        return Action.model_validate({"kind": kind, **fields})
    except ValidationError as error:
        raise ValueError(f"the action line {line!r}: {'; '.join(explain(error))}") from error
