"""What a study found, and its files: JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyvte.files import write_atomically
from dyvte.formatting import markdown_table
from dyvte.reporting.plots import draw


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Attributes
    ----------
    header
        One text for each column.
    rows
        As many texts in each as there are columns.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return markdown_table(self.header, self.rows)


@dataclass(frozen=True)
class Findings:
    """The result of a study.

    Attributes
    ----------
    title
        What is shown.
    definition
        How each metric is defined; where the paper leaves it open, that it is our reading.
    metrics
        All numbers, JSON-ready.
    table
        The numbers that a paper would print.
    paint
        Fills a matplotlib figure of ``size`` inches.
    size
        Width and height of the plot, in inches.
    notes
        What was omitted, and why.
    """

    title: str
    definition: str
    metrics: Mapping[str, Any]
    table: Table
    paint: Callable[[Any], None]
    size: tuple[float, float] = (6.4, 4.2)
    notes: tuple[str, ...] = ()

    def markdown(self, source: str, about: Mapping[str, Any], plot: str | None = None) -> str:
        """Title, what was asked, definition, table, notes and the plot's link.

        Parameters
        ----------
        source
            Paper, and its table or figure.
        about
            What the findings belong to, by name.
        plot
            File name of the plot, beside the text.
        """
        parts = [f"# {self.title}", f"After {source}. {self.definition}"]
        parts.append(", ".join(f"{key}: {value}" for key, value in about.items()))
        parts.append(str(self.table))
        parts += [f"Omitted: {note}" for note in self.notes]
        if plot:
            parts.append(f"![{self.title}]({plot})")
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str, source: str, about: Mapping[str, Any]) -> list[Path]:
        """``NAME.json``, ``NAME.md`` and the plot as png, svg and pdf below ``folder``; the first three.

        Parameters
        ----------
        folder
            Where they go.
        name
            Of the study, and of its files.
        source
            Paper, and its table or figure.
        about
            What the findings belong to, by name.

        Raises
        ------
        ConfigError
            matplotlib is not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "study": name,
            "source": source,
            "title": self.title,
            "definition": self.definition,
            "about": dict(about),
            "notes": list(self.notes),
            "metrics": self.metrics,
        }
        write_atomically(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
        plot = draw(folder / name, self.title, self.size, self.paint)
        write_atomically(folder / f"{name}.md", self.markdown(source, about, plot.png.name))
        return [folder / f"{name}.json", folder / f"{name}.md", plot.png]
