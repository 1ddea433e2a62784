"""What rendering a chat template may use: the size of a value, of all values together, and time."""

import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from string import Formatter
from typing import Any

from dsopt.runtime.errors import DsoptError

CPU_SECONDS = 10.0
_VALUE = 1 << 24  # weight of one value, beside what the messages weigh
_TOTAL = 1 << 28  # weight of all values made, garbage included
_ITEM = 256  # weight of an item in a list or dict, as it may print; a character weighs 1
_BITS = 1 << 16  # of an integer
_WIDTH = 256  # the largest padding, indentation or precision


class Meter:
    """What one rendering may still use. Every method raises DsoptError when that is too little."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        given = _weigh(variables, 1 << 40)
        self._value = _VALUE + 4 * given
        self._left = _TOTAL + 1024 * given
        self._deadline = time.thread_time() + CPU_SECONDS

    def expect(self, weight: int) -> None:
        """A value of this weight is about to be made."""
        if weight > self._value:
            raise out_of_bounds("makes a value that is too large")

    def expect_bits(self, bits: int) -> None:
        """An integer of so many bits is about to be made."""
        if bits > _BITS:
            raise out_of_bounds("computes a number that is too large")

    def expect_widths(self, values: Iterable[Any]) -> None:
        """Those of `values` that are numbers are paddings, indentations or precisions."""
        for value in values:
            if isinstance(value, int) and abs(value) > _WIDTH:
                raise out_of_bounds(f"asks for a width of {value} where {_WIDTH} is the most")

    def expect_format(self, text: str, values: Any) -> None:
        """`text.format(values)` is about to be made."""
        specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
        if any("{" in spec for spec in specs):
            raise out_of_bounds("takes the width of a field from an argument, which is not supported")
        self._expect_fields(text, len(specs), " ".join(specs), values)

    def expect_percent(self, text: str, values: Any) -> None:
        """`text % values` is about to be made."""
        if re.search(r"%[^a-zA-Z%(]*\*", text):
            raise out_of_bounds("takes the width of a field from an argument, which is not supported")
        self._expect_fields(text, text.count("%"), text, values)

    def _expect_fields(self, text: str, fields: int, widths: str, values: Any) -> None:
        if re.search(r"\d{8}", widths):
            raise out_of_bounds("formats with a width that is too large")
        padding = sum(map(int, re.findall(r"\d+", widths)))
        self.expect(len(text) + padding + fields * self.weigh(values))

    def spend(self, weight: int) -> None:
        """So much was made; also looks at the clock."""
        self._left -= weight
        if self._left < 0:
            raise out_of_bounds("makes too much text")
        if time.thread_time() > self._deadline:
            raise out_of_bounds(f"takes more than {CPU_SECONDS:g} s")

    def weigh(self, value: Any) -> int:
        """The weight of `value` with all that is in it, as often as it is in it."""
        weight = _weigh(value, self._value)
        self.expect(weight)
        return weight

    def made(self, value: Any) -> Any:
        """`value`, accounted for."""
        self.weigh(value)
        if isinstance(value, int):
            self.expect_bits(value.bit_length())
        items = len(value) if isinstance(value, (list, tuple, dict)) else 1
        self.spend(len(value) if isinstance(value, str) else _ITEM * items)
        return value


_METER: ContextVar[Meter] = ContextVar("meter")


def meter() -> Meter:
    """The one in use."""
    return _METER.get()


@contextmanager
def metered(variables: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a template may be compiled and rendered, within bounds that grow with its `variables`."""
    token = _METER.set(Meter(variables))
    try:
        yield
    finally:
        _METER.reset(token)


def out_of_bounds(what: str) -> DsoptError:
    """The error for a template that does `what`."""
    return DsoptError(f"the chat template {what}; use another template or --raw")


def _weigh(value: Any, limit: int) -> int:
    weight, stack = 0, [value]
    while stack and weight <= limit:
        item = stack.pop()
        weight += len(item) if isinstance(item, str) else _ITEM
        if isinstance(item, Mapping):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, KeysView, ValuesView, ItemsView)):
            stack.extend(item)
    return weight
