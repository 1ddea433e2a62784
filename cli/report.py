"""How results are printed: Markdown and plain tables, CSV, JSON, JSON lines. Every form streams but JSON."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of a Markdown table; cells wider than `width` push the line, as a table that streams must."""

    title: str
    width: int = 0
    right: bool = True

    @property
    def size(self) -> int:
        return max(self.width, len(self.title))

    def cell(self, text: str) -> str:
        return text.rjust(self.size) if self.right else text.ljust(self.size)

    @property
    def rule(self) -> str:
        return "-" * (self.size - 1) + (":" if self.right else "-")


def markdown(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, each as soon as its row is there."""
    yield _line(column.cell(column.title) for column in columns)
    yield _line(column.rule for column in columns)
    for row in rows:
        yield _line(column.cell(text) for column, text in zip(columns, row, strict=True))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Plain text in columns two spaces apart: the first `left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def csv_lines(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A header, then one line a record, every field quoted; lists are left out, as llama-bench does."""
    for index, record in enumerate(records):
        flat = {key: value for key, value in record.items() if not isinstance(value, list)}
        if index == 0:
            yield _csv_line(flat)
        yield _csv_line("" if value is None else value for value in flat.values())


def _csv_line(cells: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="").writerow(cells)
    return buffer.getvalue()


def json_lines(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False)


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def count(number: int) -> str:
    """134515008 as `134.52 M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes as `146.59 MiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):.2f} {unit}"
    return f"{number} B"
