"""Tables as text: comma- or tab-separated, gzipped or not; whatever cannot be read is named by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain3d.config import UserError, suggestion


@dataclass(frozen=True)
class Delimited:
    """The rows below a header.

    Attributes:
        path: the file.
        header: names of the columns.
        rows: cells as written; as many as the header has names.
        lines: of the file, from 1, one per row.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """The cells of one column, without surrounding blanks.

        Raises:
            UserError: there is no such column, or there are two.
        """
        if self.header.count(name) > 1:
            raise UserError(f"{self.path}: {self.header.count(name)} columns are named {name!r}")
        if name not in self.header:
            raise UserError(
                f"{self.path}: no column {name!r}{suggestion(name, self.header) or ';'} "
                f"its columns are {', '.join(self.header)}"
            )
        index = self.header.index(name)
        return [row[index].strip() for row in self.rows]

    def numbers(self, name: str) -> np.ndarray:
        """One column as (N,) float64.

        Raises:
            UserError: no such column, or a cell is not a finite number; names its line.
        """
        cells = self.column(name)
        try:
            values = np.array(cells, np.float64)
        except ValueError:
            values = np.array([number(cell) for cell in cells])
        for index in np.flatnonzero(~np.isfinite(values)):
            raise UserError(f"{self.path} line {self.lines[index]}: {name} is {cells[index]!r}, not a finite number")
        return values


def read_table(path: str | Path, columns: Sequence[str] = ()) -> Delimited:
    """Reads a table with a header.

    Args:
        columns: that it must have, in any order and among others.

    Raises:
        UserError: the file cannot be read, lacks one of the columns, or a row is longer or shorter than the header.
    """
    path = Path(path)
    lines, rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: the file is empty; expected a table with a header")
    header = [cell.strip() for cell in rows[0]]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"{path} line {lines[0]}: the header lacks {', '.join(missing)}; it must hold {', '.join(columns)} "
            f"and holds {', '.join(header)[:120]}"
        )
    if set(map(len, rows)) != {len(header)}:
        line, length = next((i, len(row)) for i, row in zip(lines, rows, strict=True) if len(row) != len(header))
        raise UserError(f"{path} line {line}: {length} cells, but the header names {len(header)}")
    return Delimited(path, header, rows[1:], lines[1:])


def read_rows(path: str | Path) -> tuple[list[int], list[list[str]]]:
    """Line numbers and cells of the rows that are not blank; with a tab in the first line the file is tab-separated.

    Raises:
        UserError: the file cannot be read or is no text.
    """
    text = _text(Path(path))
    delimiter = "\t" if "\t" in text.lstrip().partition("\n")[0] else ","
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path}: not a table: {error}") from None
    lines = [line for line, row in enumerate(rows, 1) if row and (row[0].strip() or "".join(row).strip())]
    return lines, rows if len(lines) == len(rows) else [rows[line - 1] for line in lines]


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a broken gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None


def as_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The text of a comma-separated table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def number(cell: str) -> float:
    """The number that a cell holds; nan where it holds none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")
