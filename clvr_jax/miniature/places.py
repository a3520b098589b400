"""Places of the grid and how cells stand to each other, by name."""

from clvr_jax.miniature.scene import CELLS, COLUMNS, ROWS

# cells in short, as on a chessboard that is counted from the top: "a1" is the top left corner
COORDINATES = tuple(f"{'abcd'[cell % COLUMNS]}{cell // COLUMNS + 1}" for cell in range(CELLS))
ROW_NAMES = ("top row", "second row", "third row", "bottom row")
COLUMN_NAMES = ("leftmost column", "second column", "third column", "rightmost column")


def _places() -> dict[str, frozenset[int]]:
    rows = [frozenset(range(COLUMNS * r, COLUMNS * (r + 1))) for r in range(ROWS)]
    columns = [frozenset(range(c, CELLS, COLUMNS)) for c in range(COLUMNS)]
    places = {
        "top half": rows[0] | rows[1],
        "bottom half": rows[2] | rows[3],
        "left half": columns[0] | columns[1],
        "right half": columns[2] | columns[3],
        "middle": (rows[1] | rows[2]) & (columns[1] | columns[2]),
        "top left corner": rows[0] & columns[0],
        "top right corner": rows[0] & columns[3],
        "bottom left corner": rows[3] & columns[0],
        "bottom right corner": rows[3] & columns[3],
    }
    places |= dict(zip(ROW_NAMES, rows)) | dict(zip(COLUMN_NAMES, columns))
    for name, row in zip(ROW_NAMES, rows):  # every cell that is no corner has its own name, too
        for order, column in zip(("first", "second", "third", "last"), columns):
            if row & column not in places.values():
                places[f"{order} place of the {name}"] = row & column
    return places


PLACES: dict[str, frozenset[int]] = _places()  # name -> its cells
CELL_NAMES = {min(cells): name for name, cells in PLACES.items() if len(cells) == 1}  # all 16
SPOTS = tuple(name for name in PLACES if " place of " in name)  # single cells, no corners
AREAS = tuple(name for name in PLACES if name not in SPOTS)  # what one says first; corners, too


def _from_the_middle(cell: int) -> tuple[int, int]:
    """How far a cell is from the middle of the grid; what is as near is read line by line."""
    row, column = cell // COLUMNS, cell % COLUMNS
    return (2 * row - ROWS + 1) ** 2 + (2 * column - COLUMNS + 1) ** 2, cell


ORDER = tuple(sorted(range(CELLS), key=_from_the_middle))  # in which open places are taken
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def related(first: int, word: str, second: int) -> bool:
    """Say if cell `first` is, e.g., left of cell `second`: strictly, the other axis is free."""
    if word in ("right of", "below"):
        first, second = second, first
    if word in ("left of", "right of"):
        return first % COLUMNS < second % COLUMNS
    return first // COLUMNS < second // COLUMNS


SO_TO = {  # relation -> for each cell, those that stand so to it
    word: tuple(
        frozenset(other for other in range(CELLS) if related(other, word, cell))
        for cell in range(CELLS)
    )
    for word in RELATIONS
}
