"""Reading typed values out of a JSON object: each of the wrong type or out of range is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from headgrid.errors import InvalidInput
from headgrid.models.files import shown

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of a JSON object, every one of which has a value (null at least). `where` names it in messages."""

    where: str
    values: Mapping[str, object]

    def refuse(self, key: str, must: str, legal: tuple[str, ...] = ()) -> NoReturn:
        """Raise InvalidInput that says what `key` is and what it must be."""
        raise InvalidInput(f"{self.where}: {key} = {shown(self.values[key])} is not {must}", legal=legal)

    def given(self, key: str) -> bool:
        """Whether there is a value other than null."""
        return self.values[key] is not None

    def whole(self, key: str, highest: int, lowest: int = 1) -> int:
        """A whole number in [lowest, highest]; true, false and 3.0 are none."""
        value = self.values[key]
        if type(value) is not int or not lowest <= value <= highest:
            self.refuse(key, f"a whole number from {lowest} to {highest}")
        return value

    def number(self, key: str, highest: float, above: float = 0.0) -> float:
        """A number in (above, highest]."""
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= highest:
            self.refuse(key, f"a number above {above:g} and up to {highest:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.values[key]
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def choice(self, key: str, table: Mapping[str, _T]) -> _T:
        """What a word stands for in `table`."""
        value = self.values[key]
        if not isinstance(value, str) or value not in table:
            self.refuse(key, "supported", tuple(table))
        return table[value]

    def object(self, key: str) -> Mapping[str, object]:
        """An object; empty where there is null."""
        value = self.values[key]
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return value
