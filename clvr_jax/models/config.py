"""Reading the reference's config.json: every field is taken, or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any


class Fields:
    """The fields of one config.json, each to be taken once; `done` refuses what is left over.

    Attributes:
      name: what the errors call this file, e.g. "transformer/config.json".
    """

    def __init__(self, name: str, values: Mapping[str, Any]):
        self.name = name
        self._left = dict(values)

    def take(self, field: str, *default: Any) -> Any:
        """Return and remove a field.

        Raises:
          ValueError: the field is absent and no default was given.
        """
        if field in self._left:
            return self._left.pop(field)
        if default:
            return default[0]
        raise ValueError(f"{self.name} has no field {field!r}; it is needed to build the model")

    def expect(self, field: str, *allowed: Any) -> None:
        """Remove a field whose only supported values are `allowed`; absence is accepted.

        Raises:
          ValueError: the field has another value.
        """
        value = self._left.pop(field, allowed[0])
        if isinstance(value, list):
            value = tuple(value)
        if value not in allowed:
            wanted = " or ".join(repr(v) for v in allowed)
            raise ValueError(f"{self.name}: {field} is {value!r}; this model supports {wanted}")

    def done(self, ignore: Collection[str] = ()) -> None:
        """Refuse every field that was not taken, except private ones and those in `ignore`.

        Raises:
          ValueError: fields are left over.
        """
        left = [f for f in self._left if f not in ignore and not f.startswith("_")]
        if left:
            shown = ", ".join(f"{f}={self._left[f]!r}" for f in sorted(left))
            raise ValueError(f"{self.name} has fields this model does not know: {shown}")
