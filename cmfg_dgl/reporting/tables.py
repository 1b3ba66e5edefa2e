"""Tables as data, and their Markdown and LaTeX; their HTML is the macro `table` of `templates/parts.html.j2`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "Table", "latex_table", "latex_text", "markdown_table", "markdown_text", "text_table"]


@dataclass(frozen=True)
class Cell:
    """What stands in one cell: a name or a number, its interval, and whether it is the best of its column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first `names` columns are names and whose others are numbers.

    Its caption is made of `title`, of `data` (data set, protocol, seeds), of `note`, which this table alone has,
    and of `tests`. `groups` are heads over several number columns each: (head, columns). In LaTeX, where a page is
    narrow, a `compact` table has no intervals.
    """

    key: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    groups: tuple[tuple[str, int], ...] = ()
    compact: bool = False
    data: str = ""
    tests: str = ""

    @property
    def caption(self) -> str:
        """The whole caption, which begins with the title."""
        return " ".join(part for part in (f"{self.title}.", self.data, self.note, self.tests) if part)


def text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], **options: Any) -> Table:
    """A table of plain texts, of which the first column alone holds names unless `names` says otherwise."""
    return Table("", title, "", tuple(head), tuple(tuple(map(Cell, row)) for row in rows), **options)


def markdown_text(value: str) -> str:
    """Text that Markdown and its tables show letter for letter."""
    return re.sub(r"([\\`*_\[\]<>|&~#$])", r"\\\1", " ".join(value.split()))


def markdown_table(table: Table) -> str:
    """A table in Markdown, without its caption."""
    groups = [""] * table.names + [f"{group}, " for group, span in table.groups for _ in range(span)]
    groups += [""] * (len(table.head) - len(groups))
    head = [markdown_text(group + title) for group, title in zip(groups, table.head, strict=True)]
    rule = [":--"] * table.names + ["--:"] * (len(head) - table.names)
    lines = [head, rule, *([_markdown_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    # An interval stays as it is: all names are escaped, so that no link can be meant by its brackets.
    return " ".join(part for part in (f"**{text}**" if cell.best else text, cell.interval) if part)


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    "`": r"\`{}", "→": r"$\to$", "–": "--", "†": r"\textsuperscript{\dag}", "‡": r"\textsuperscript{\ddag}",
    "−": "$-$", "’": "'",
}  # fmt: skip


def latex_text(value: str) -> str:
    """Text as LaTeX sets it letter for letter, with no package; other scripts are given by their code points."""
    text = " ".join(value.split())
    # Two hyphens or two quotes would become one sign.
    parted = zip(text, " " + text, strict=False)
    return "".join(("{}" if a == b and a in "-'" else "") + _latex_letter(a) for a, b in parted)


def _latex_letter(letter: str) -> str:
    if letter in LATEX:
        return LATEX[letter]
    if letter.isascii():
        return letter if letter.isprintable() else ""
    # Latin-1 letters with an accent, which every LaTeX since 2018 composes from UTF-8.
    composed = letter <= "\u00ff" and letter.isalpha() and unicodedata.decomposition(letter)[:1] == "0"
    return letter if composed else f"U+{ord(letter):04X}"


def _latex_caption(value: str) -> str:
    """A protocol's id has no spaces: a line may break after its slashes and commas."""
    return re.sub(r"/(?=\S)|,(?=\S)(?!\d{3}\b)", r"\g<0>\\allowbreak{}", latex_text(value))


def latex_table(table: Table) -> str:
    """A `table` environment with its caption, for the package booktabs."""
    size = r"\scriptsize" if len(table.head) > 7 else r"\footnotesize"
    columns = "l" * table.names + "r" * (len(table.head) - table.names)
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption[{latex_text(table.title)}]{{{_latex_caption(table.caption)}{_left_out(table)}}}",
            rf"\label{{tab:bench-{table.key}}}",
            size,
            r"\setlength{\tabcolsep}{4pt}",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            *_latex_groups(table),
            _latex_line(latex_text(title) for title in table.head),
            r"\midrule",
            *(_latex_line(_latex_cell(cell, table.compact) for cell in row) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _left_out(table: Table) -> str:
    intervals = table.compact and any(cell.interval for row in table.rows for cell in row)
    return " The intervals, left out here, stand in tables.md." if intervals else ""


def _latex_groups(table: Table) -> list[str]:
    if not table.groups:
        return []
    cells, rules, column = [""] * table.names, "", table.names + 1
    for group, span in table.groups:
        cells.append(rf"\multicolumn{{{span}}}{{c}}{{{latex_text(group)}}}")
        rules += rf"\cmidrule(lr){{{column}-{column + span - 1}}}"
        column += span
    return [_latex_line(cells), rules]


def _latex_line(cells: Iterable[str]) -> str:
    line = " & ".join(cells)
    # After \\ of the line before, a bracket or a star would be its argument.
    return f"{'{}' if line[:1] in ('[', '*') else ''}{line} \\\\"


def _latex_cell(cell: Cell, compact: bool) -> str:
    # The sign of a negative number is a minus, no hyphen.
    text, interval = (re.sub(r"(?<!\w)-(?=\d)", "$-$", latex_text(part)) for part in (cell.text, cell.interval))
    parts = (rf"\textbf{{{text}}}" if cell.best else text, "" if compact else interval)
    return " ".join(part for part in parts if part)
