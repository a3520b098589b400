"""What a vision-language model is asked for beside free conversation, and the form of its answers.

One wording serves every model: those behind an endpoint, those trained here, the scripted teacher.
A request is recognised by its text alone, so that each can be answered from the conversation.

The loop's turn is no single message: `CONTROL` is the system message of a conversation that goes
on as `clvr_jax.data.trajectory` has it, answered in the format of `clvr_jax.data.turns`. `PROXY`
follows such a conversation, behind the turn whose picture it sums up. All others stand alone.
"""

import json
import re
from typing import Literal, NamedTuple

from PIL import Image
from pydantic import ValidationError

from clvr_jax.backends.protocol import Message, user
from clvr_jax.data.turns import Model, Number, Words, explain

FAULTS = ("missing", "extra", "colour", "shape", "size", "place", "relation", "unclear")
_FIELD = re.compile(r"\{(\w+)\}")


class Request(NamedTuple):
    """The wording of one kind of request.

    Attributes:
      text: a text with its fields in braces, each a line's end or lines of its own.
    """

    text: str

    def message(self, *pictures: Image.Image, **fields: str) -> Message:
        """Return the user's message; pictures come before the text.

        Raises:
          ValueError: a field is not given.
        """
        missing = set(_FIELD.findall(self.text)) - set(fields)
        if missing:
            raise ValueError(
                f"the request {self.text[:40]!r}... needs {', '.join(sorted(missing))}"
            )
        return user(*pictures, _FIELD.sub(lambda field: fields[field[1]], self.text))

    def match(self, text: str) -> dict[str, str] | None:
        """Return the fields of a message's text, None if it is not this request."""
        parts = _FIELD.split(self.text)  # texts and names of fields in turn
        pattern = "".join(
            f"(?P<{part}>.+)" if index % 2 else re.escape(part) for index, part in enumerate(parts)
        )
        found = re.fullmatch(pattern, text.strip(), re.DOTALL)
        return found and found.groupdict()


CONTROL = """\
You draw what the user asks for, one picture after another. Say what you see in the last picture, \
what is right and what is wrong. Then do one thing, as the last line: \
{"action": "generate", "prompt": "..."} draws a new picture, \
{"action": "edit", "prompt": "...", "references": [1]} changes earlier ones, \
{"action": "stop"} ends when all is right."""

CHECKLIST = Request(
    "Write questions that check whether a picture shows exactly this, one a line, so that yes is "
    "right for each: {goal}"
)
EDIT_CHECKLIST = Request(
    "Write questions that check whether this was done to a picture and nothing else, one a line, "
    "so that yes is right for each: {edit}"
)
VERIFY = Request(  # the last picture, behind those that it was made from
    "Answer each question about the last picture with yes or no, one a line.\n{questions}"
)
CRITIQUE = Request(  # who has said what is there for each thing finds the faults
    "Go through the picture in a line that begins with check and a colon. Then say what is wrong, "
    "one fault a line, after its kind and a colon: missing, extra, colour, shape, size, place, "
    "relation or unclear. If there is none, say: nothing is wrong. The picture should show: {goal}"
)
CHOOSE = Request(
    "Say which picture is better, A for the first, B for the second, or tie, then a colon and why. "
    "The picture should show: {goal}"
)
NARRATE = Request(  # the pictures of all steps, which are lines of action
    "Tell the story of this drawing, one line a step and a last line for the end: what you saw, "
    "what was wrong and what you did. The user asked for: {goal}\nThe steps:\n{steps}"
)
PROXY = Request(
    "Sum up your next picture in one line: "
    '{"scene": "all that it shows", "edit": "what to change", "references": [1]}. '
    "A new picture has no edit and no references."
)
REWRITE = Request("Write this so that nothing is left open, no place and no size: {goal}")
INVENTORY = Request("List the things in the picture by their places.")
CAPTION = Request("Say in one sentence what the picture shows.")
DIFFERENCE = Request("Say what has changed from the first picture to the second, one a line.")


class Proxy(Model):
    """What one step's picture should be, without its history (the paper's proxy prompt).

    Attributes:
      scene: all that the picture shows.
      edit: what changes from the referenced pictures; None for a picture drawn anew.
      references: numbers of the earlier pictures, counted from 1, in order.
    """

    scene: Words
    edit: Words | None = None
    references: tuple[Number, ...] = ()

    def line(self) -> str:
        """Return the answer to `PROXY`."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False)


def proxy(reply: str) -> Proxy:
    """Return what an answer to `PROXY` says; words around its JSON are passed over.

    Raises:
      ValueError: there is no such JSON, or it has an edit without references or the reverse.
    """
    found = re.search(r"\{.*\}", reply, re.DOTALL)
    try:
        answer = Proxy.model_validate_json(found[0] if found else "")
    except ValidationError as error:
        raise ValueError(f"the proxy prompt {reply!r}: {'; '.join(explain(error))}") from error
    if bool(answer.edit) != bool(answer.references):
        raise ValueError(f"the proxy prompt {reply!r} needs both an edit and references, or none")
    return answer


def checks(reply: str, count: int) -> list[bool]:
    """Return whether each question of a `VERIFY` is answered by yes.

    Raises:
      ValueError: there are not `count` lines that begin with yes or no.
    """
    answers = re.findall(r"^\W*(?:\d+\W+)?(yes|no)\b", reply, re.IGNORECASE | re.MULTILINE)
    if len(answers) != count:
        raise ValueError(f"{count} questions need as many lines of yes or no, got {reply!r}")
    return [answer.lower() == "yes" for answer in answers]


def faults(reply: str) -> list[str]:
    """Return the kinds of faults, of `FAULTS`, that an answer to `CRITIQUE` names; empty for none.

    Lines of checks are passed over; they may be left out.

    Raises:
      ValueError: another line begins with no kind, or there is none and it does not say so.
    """
    passed = re.compile(r"\s*$|\W*checks?\b", re.IGNORECASE)  # nothing, or a check
    lines = [line for line in reply.splitlines() if not passed.match(line)]
    if lines and re.match(r"\W*nothing is wrong\b", lines[0], re.IGNORECASE):
        return []
    heads = [line.partition(":")[0].lower() for line in lines]
    kinds = [[word for word in re.findall(r"\w+", head) if word in FAULTS] for head in heads]
    if not kinds or not all(kinds):
        raise ValueError(
            f"each line of a critique begins with its kind of fault ({', '.join(FAULTS)}), "
            f"got {reply!r}"
        )
    return [kind for line in kinds for kind in line]


def choice(reply: str) -> Literal["A", "B", "tie"]:
    """Return which picture an answer to `CHOOSE` takes.

    Raises:
      ValueError: it begins with none of A, B and tie.
    """
    found = re.match(r"\W*(A|B|tie)\b", reply)
    if not found:
        raise ValueError(f"a choice begins with A, B or tie, got {reply!r}")
    return found[1]
