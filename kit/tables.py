"""Tables of labels as they are found, perhaps saved again by a spreadsheet."""

import csv
import re

from kit.cli import UserError
from kit.files import read_text

DECIMAL = r"[-+]?[0-9]*([.,])[0-9]+(?:[eE][-+]?[0-9]+)?"


def read_spreadsheet(path, what, names):
    """(header, [(line number, cells), …]) of a table that a spreadsheet may have saved: cells are
    stripped, as many as the header has; empty rows are left out.

    names: columns that it needs, each once. Its separator is the comma, semicolon or tab that
    separates the names, or the one in a first line `sep=;`. Where it is not the comma, numbers may
    have decimal commas; they are returned with points. Raises UserError."""
    lines, start = read_text(path, what).split("\n"), 0
    given = re.fullmatch(r'"?sep=([^\w\s"]|\t)"?[,;\t]*', lines[0], re.IGNORECASE)
    if given:
        start = 1
    while start < len(lines) - 1 and not lines[start].strip(' ,;\t"'):
        start += 1
    try:
        header, separator = split_header(lines[start], names, given[1] if given else ",;\t")
    except csv.Error as error:
        raise UserError(f"{path} is not {what}: {error}") from None
    require_columns(path, header, names, lines[start])
    rows = list(numbered_rows(path, lines, start + 1, separator, len(header)))
    return header, rows if separator == "," else with_points(path, rows)


def split_header(line, names, separators):
    """(columns, separator): the line split at the separator that gives most of the names."""
    def columns(separator):
        return stripped(next(csv.reader([line], delimiter=separator, skipinitialspace=True), []))
    separator = max(separators, key=lambda each: len(set(names) & set(columns(each))))
    return columns(separator), separator


def stripped(cells):
    """Cells without spaces around them, and without the empty ones at the end of their row."""
    cells = [cell.strip() for cell in cells]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def require_columns(path, header, names, line):
    """Raise UserError unless each of the names is a column of the header, once. `line` is the
    header as it stands in the file."""
    if missing := [name for name in names if name not in header]:
        separator = re.search(rf"{names[0]}[\s\"']*([^\w\"',;\t])", line)
        separated = f", which {separator[1]!r} separates" if separator else ""
        raise UserError(f"{path}: no column {', '.join(missing)} in its header, {line[:80]!r}"
                        f"{separated}; it needs {', '.join(names)}, separated by commas, "
                        "semicolons or tabs")
    if double := [name for name in names if header.count(name) > 1]:
        raise UserError(f"{path}: two columns {double[0]}; keep one")


def numbered_rows(path, lines, start, separator, width):
    """Yield (line number, cells) of the rows in lines[start:] that are not empty, filled up to
    `width` cells. Raises UserError for a row of more cells, or of several lines."""
    reader = csv.reader(lines[start:], delimiter=separator, skipinitialspace=True, strict=True)
    line = start + 1
    try:
        for cells in reader:
            if start + reader.line_num > line:
                raise csv.Error("a quote that is opened here is not closed in this line")
            if len(cells := stripped(cells)) > width:
                raise csv.Error(f"{len(cells)} cells under {width} columns; are there decimal "
                                "commas between commas?")
            if cells:
                yield line, cells + [""] * (width - len(cells))
            line += 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}") from None


def with_points(path, rows):
    """The rows with decimal points for decimal commas. Raises UserError where there are both."""
    marks = {}  # {"," or ".": the first line that has it}
    for line, cells in rows:
        for cell in cells:
            if number := re.fullmatch(DECIMAL, cell):
                marks.setdefault(number[1], line)
    if len(marks) == 2:
        raise UserError(f"{path}, line {max(marks.values())}: decimal commas and decimal points in "
                        "one table; keep to one of them")
    if "," not in marks:
        return rows
    return [(line, [cell.replace(",", ".") if re.fullmatch(DECIMAL, cell) else cell
                    for cell in cells]) for line, cells in rows]


def plain_number(cell):
    """float(cell) of digits with a decimal point at most. Raises ValueError for what float takes
    beside that (1_5, inf, other scripts' digits) and for leading zeros, which dates have."""
    if not re.fullmatch(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", cell):
        raise ValueError(cell)
    return float(cell)
