"""Texts to goals and edits: the inverse of `prompts.write` and `edits.write`.

It reads a little more than is written (digits, commas for full stops, other names of places), so
that a user's own words are mostly understood; where not, the error says what the world knows.
"""

from collections.abc import Callable, Iterator

from clvr_jax.miniature import phrases, words
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.orders import TEMPLATES
from clvr_jax.miniature.phrases import Tokens
from clvr_jax.miniature.places import AREAS
from clvr_jax.miniature.references import Description
from clvr_jax.miniature.scene import COLOURS, MOST, SHAPES, SIZES
from clvr_jax.miniature.sentences import EMPTY

_EXAMPLES = {
    "prompt": (
        "a red circle and two small stars",
        "draw a blue square above a ring",
        "three squares. in the top left corner there is a yellow star",
    ),
    "edit": (
        "add a small red star in the top row",
        "make the circle blue",
        "move the star above the ring",
    ),
}
_IS = {("is",): None, ("are",): None}
_COMMA = {(",",): None}
_ALSO = {  # ways to ask for edits that are read and not written
    "recolour": ("recolour {thing} {colour}", "color {thing} {colour}"),
    "move": ("put {thing} {to}", "place {thing} {to}"),
    "replace": ("make {thing} {kind}",),
}
_BETWEEN = (",", "and", ".", "also", "with")


def known() -> str:
    """Return what the world knows, in words for users."""
    return (
        f"This world knows up to {MOST} things. Shapes: {', '.join(SHAPES)}. Colours: "
        f"{', '.join(COLOURS)}. Sizes: {', '.join(SIZES)}. Places: {', '.join(AREAS)}. Relations: "
        f"{', '.join(words.RELATION_WORDS)}."
    )


def parse_prompt(text: str) -> Goal:
    """Return the goal of a prompt; groups in the order of the text.

    Raises:
      ValueError: words outside of the world, a text that cannot be read, too many things, or "the
        star" where none or several could be meant. The message is for users.
    """
    tokens = _known_tokens(text, "prompt")
    if " ".join(tokens).rstrip(" .") == EMPTY:
        return Goal(())
    reading = _Reading(text, tokens)
    while reading.at < len(tokens):
        reading.clause()
    return reading.goal()


class _Reading:
    """A prompt read from left to right, clause after clause; "the star" is resolved at the end."""

    def __init__(self, text: str, tokens: Tokens):
        self.text, self.tokens, self.at = text, tokens, 0
        self.groups: list[Group] = []
        self.places: list[tuple[int | Description, str]] = []
        self.relations: list[tuple[int | Description, str, int | Description]] = []
        self.front: str | None = None  # a place said before its things, up to the full stop

    def clause(self):
        """Read "a star above a ring", "draw a star", "in the top row there is a star", ..."""
        token = self.tokens[self.at]
        if token in _BETWEEN:
            self.front = None if token == "." else self.front
            self.at += 1
            return
        if (place := self._take(phrases.place)) is not None:
            self.front = place
            self._skip(_COMMA)
            self._skip(phrases.THERE)
        elif not phrases.counted(self.tokens, self.at):  # "a drawing of" begins like "a star"
            self._skip(phrases.OPENER | phrases.THERE)
        subject = self._thing()
        if isinstance(subject, int) and self.front:
            self.places.append((subject, self.front))
        self._skip(_IS)
        last = subject  # what comes next is said of the thing before it
        while True:
            if (word := self._take(phrases.entry, phrases.RELATION)) is not None:
                other = self._it() or self._thing()
                self.relations.append((last, word, other))
                last = other
            elif (place := self._take(phrases.place)) is not None:
                self.places.append((last, place))
            else:
                return

    def goal(self) -> Goal:
        """Return what was read."""
        if not self.groups:
            raise _unread(self.text, self.tokens, "prompt")
        for end, place in self.places:
            index = self._resolve(end)
            if self.groups[index].place not in (None, place):
                raise ValueError(
                    f'"{self.text}" puts one thing in the {self.groups[index].place} and in the '
                    f"{place}; say one place for each"
                )
            self.groups[index] = self.groups[index]._replace(place=place)
        relations = []
        for first, word, second in self.relations:
            relation = Relation(self._resolve(first), word, self._resolve(second))
            if relation.first == relation.second:
                raise ValueError(f'"{self.text}" puts a thing {word} itself')
            if any(self.groups[i].count > 1 for i in (relation.first, relation.second)):
                raise ValueError(
                    f'"{self.text}" puts several things {word} something; relations are between '
                    "single things"
                )
            relations.append(relation)
        return Goal(tuple(self.groups), tuple(relations))

    def _take(self, reader: Callable, *args):
        """Return what a reader finds here and go on behind it, or None."""
        found = reader(self.tokens, self.at, *args)
        if not found:
            return None
        value, self.at = found[0]
        return value

    def _skip(self, table: phrases.Table):
        found = phrases.entry(self.tokens, self.at, table)
        self.at = found[0][1] if found else self.at

    def _thing(self) -> int | Description:
        """Read "a star", which makes a group (its index is returned), or "the star"."""
        if (read := self._take(phrases.counted)) is not None:
            count, name = read
            self.groups.append(Group(count, *name[:3]))
            return len(self.groups) - 1
        if (name := self._take(phrases.the)) is None:
            raise _unread(self.text, self.tokens[self.at :], "prompt")
        return name

    def _it(self) -> Description | None:
        """Read "it": the thing asked for before the last one."""
        if self.tokens[self.at : self.at + 1] != ("it",) or len(self.groups) < 2:
            return None
        self.at += 1
        return Description(*self.groups[-2][1:4])

    def _resolve(self, end: int | Description) -> int:
        """Return the index of the one group that "the ..." can mean."""
        if isinstance(end, int):
            return end
        found = [i for i, group in enumerate(self.groups) if group.may_be(*end[:3])]
        if len(found) == 1:
            return found[0]
        meant = "several things" if found else "nothing"
        raise ValueError(
            f'"the {words.kind_name(*end[:3])}" means {meant} that "{self.text}" asks for; it must '
            "mean one: first ask for it, and say colour or size where another could be meant"
        )


def parse_edit(text: str) -> Edit:
    """Return the edit that a text asks for.

    Raises:
      ValueError: words outside of the world, or a text that cannot be read. The message is for
        users.
    """
    tokens = tuple(token for token in _known_tokens(text, "edit") if token not in (",", "."))
    tokens = tokens[1:] if tokens[:1] == ("please",) else tokens
    for kind in TEMPLATES:
        for template in TEMPLATES[kind] + _ALSO.get(kind, ()):
            for parts in _match(tokens, template.split()):
                return Edit(kind, parts.get("thing"), _becomes(parts))
    raise _unread(text, tokens, "edit")


# a slot of a template to its reader
_SLOTS: dict[str, Callable] = {
    "thing": phrases.reference,
    "kind": phrases.one,
    "new": phrases.new,
    "where": phrases.where,
    "to": phrases.where,
    "there": phrases.image_2,
    "of": lambda tokens, at: phrases.entry(tokens, at, phrases.OF),
    "colour": lambda tokens, at: phrases.entry(tokens, at, phrases.COLOUR),
    "size": lambda tokens, at: phrases.entry(tokens, at, phrases.SIZE),
    "more": lambda tokens, at: phrases.entry(tokens, at, phrases.MORE),
    "grow": lambda tokens, at: phrases.entry(tokens, at, phrases.GROW),
}


def _match(tokens: Tokens, template: list[str], at: int = 0) -> Iterator[dict]:
    """Yield what the slots of a template hold, for each way in which it reads all tokens."""
    if not template:
        if at == len(tokens):
            yield {}
        return
    part, *rest = template
    if part[0] != "{":
        if tokens[at : at + 1] == (part,):
            yield from _match(tokens, rest, at + 1)
        return
    for value, end in _SLOTS[part[1:-1]](tokens, at):
        for parts in _match(tokens, rest, end):
            yield {part[1:-1]: value, **parts}


def _becomes(parts: dict) -> Description:
    """Return what the slots say of the result."""
    for name in ("kind", "new", "where", "to", "there"):
        if name in parts:
            return parts[name]
    size = parts.get("size") or parts.get("more") or parts.get("grow")
    return Description(colour=parts.get("colour"), size=size)


def _known_tokens(text: str, what: str) -> Tokens:
    """The tokens of a text, all of them words of this world."""
    tokens = phrases.tokenize(text)
    unknown = list(dict.fromkeys(t for t in tokens if t not in phrases.VOCABULARY))
    if unknown:
        raise ValueError(f"unknown words in the {what}: {', '.join(unknown)}. {known()}")
    return tokens


def _unread(text: str, rest: Tokens, what: str) -> ValueError:
    """The error of a text that is understood only up to its rest."""
    examples = "; ".join(f'"{example}"' for example in _EXAMPLES[what])
    return ValueError(
        f'cannot read the {what} "{text}" from "{" ".join(rest)}" on. It reads like these: '
        f"{examples}. {known()}"
    )
