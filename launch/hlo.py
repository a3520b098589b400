"""What a compiled program does beside arithmetic: copies of weights, collectives, by loop.

Reads the text of optimised HLO (`jax.stages.Compiled.as_text`), as written for CPU, GPU and TPU.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# a program that only these make up moves bytes and computes nothing
_MOVES = {
    "parameter",
    "constant",
    "copy",
    "transpose",
    "bitcast",
    "reshape",
    "slice",
    "dynamic-slice",
    "convert",
    "tuple",
    "get-tuple-element",
    "compare",  # the bounds of a dynamic slice's index
    "select",
    "add",
    "broadcast",
    "clamp",
}
_SHAPE = re.compile(r"(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: its name.
      opcode: e.g. fusion, copy, all-reduce-start.
      shapes: (dtype, dimensions) of its results.
      called: computations it calls, by attribute in the order of the text.
      text: the line.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    called: tuple[str, ...]
    text: str

    @property
    def nbytes(self) -> int:
        """Bytes of its results."""
        return sum(_bits(dtype) * math.prod(dims) // 8 for dtype, dims in self.shapes)


class Program:
    """The computations of one module.

    Attributes:
      computations: instructions by computation name.
      entry: name of the entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ?\(?", line)):
                if not line.startswith("HloModule"):
                    current = self.computations.setdefault(head[2], [])
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (one := _instruction(line)):
                current.append(one)

    def loops(self) -> dict[str, list[Instruction]]:
        """Return the instructions of every while body (those of inner loops are their own)."""
        bodies = {}
        for one in self._all():
            match = re.search(r"body=%?([\w.\-]+)", one.text)
            if one.opcode == "while" and match:
                bodies[match[1]] = list(self.inside(match[1]))
        return bodies

    def trips(self) -> dict[str, int]:
        """Return how often each while body runs in one call, where the program says it."""
        counts: dict[str, int] = {}

        def walk(computation: str, times: int) -> None:
            for one in self.inside(computation):
                body = re.search(r"body=%?([\w.\-]+)", one.text)
                known = re.search(r'known_trip_count"?[:=]\{"n":"(\d+)"', one.text)
                if one.opcode == "while" and body and known:
                    counts[body[1]] = times * int(known[1])
                    walk(body[1], counts[body[1]])

        walk(self.entry, 1)
        return counts

    def inside(self, computation: str) -> Iterator[Instruction]:
        """Yield what runs in a computation and what it calls; not inner loops, not fusions."""
        for one in self.computations.get(computation, ()):
            yield one
            if one.opcode in ("call", "conditional", "async-start", "custom-call"):
                for called in one.called:
                    yield from self.inside(called)

    def moves(self, one: Instruction) -> bool:
        """Whether an instruction copies or slices without computing anything."""
        if one.opcode in ("copy", "copy-start", "transpose", "dynamic-slice"):
            return True
        if one.opcode != "fusion":
            return False
        within = [inner for name in one.called for inner in self.computations.get(name, ())]
        opcodes = {inner.opcode for inner in within}
        return bool(opcodes & {"copy", "transpose", "dynamic-slice"}) and opcodes <= _MOVES

    def _all(self) -> Iterator[Instruction]:
        for instructions in self.computations.values():
            yield from instructions


def collectives(instructions: Iterable[Instruction]) -> collections.Counter[str]:
    """Count collective results by kind; one that reduces two arrays together counts as two."""
    counts: collections.Counter[str] = collections.Counter()
    for one in instructions:
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # asynchronous ones return operands and results, but for all-reduce
            both = one.opcode != kind and kind != "all-reduce"
            counts[kind] += max(len(one.shapes) // 2, 1) if both else len(one.shapes)
    return counts


def weight_copies(program: Program, shapes: Iterable[tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """Return, per computation that runs, the bytes of weights that it copies before using them.

    Args:
      program: optimised HLO.
      shapes: shapes of one layer of every kernel that is worth a look, and of whole stacks.

    Returns:
      {loop body or entry: {instruction: bytes}}, for every copy, transposition or slice whose
      result has as many elements as one of `shapes` and its input dimension.
    """
    # the input dimension tells a kernel from activations that happen to have as many elements
    sizes = {(math.prod(shape), side) for shape in shapes for side in shape[:2]}
    found: dict[str, dict[str, int]] = {}
    places = {program.entry: list(program.inside(program.entry)), **program.loops()}
    for place, instructions in places.items():
        for one in instructions:
            elements = {(math.prod(dims), side) for _, dims in one.shapes for side in dims}
            if elements & sizes and program.moves(one):
                found.setdefault(place, {})[one.name] = one.nbytes
    return found


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if match is None:
        return None
    rest = match[2]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, after = rest[:end], rest[end:].lstrip()
    opcode = after.split("(", 1)[0]
    dims = tuple(
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape))
    )
    attributes = after.split("metadata=", 1)[0]
    return Instruction(match[1], opcode, dims, tuple(_CALLED.findall(attributes)), line.strip())


def _closing(text: str) -> int:
    """Index just behind the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _bits(dtype: str) -> int:
    number = re.search(r"\d+", dtype)
    return _BITS.get(dtype) or (int(number[0]) if number else 8)
