"""A page as blocks, written as one self-contained HTML file and as Markdown; all text is escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, TypeAlias

import jinja2

from dyvte.formatting import markdown_table


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    kind: ClassVar[str] = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """An image file below the report's folder, with a caption."""

    kind: ClassVar[str] = "image"
    path: Path
    caption: str


@dataclass(frozen=True)
class Example:
    """One question: its image, lines of text, and a table of answers."""

    kind: ClassVar[str] = "example"
    image: Path | None
    lines: Sequence[str]
    table: Table


Block: TypeAlias = Heading | Text | Table | Image | Example


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def html(self) -> str:
        """The page with its images inside; it refers to nothing outside."""
        blocks = [Heading(self.title, 1), *self.blocks]
        return _templates().get_template("page.html.j2").render(title=self.title, blocks=blocks)

    def markdown(self, folder: Path) -> str:
        """The same as Markdown that lies in ``folder``, beside the images."""
        blocks = [Heading(self.title, 1), *self.blocks]
        return "\n\n".join(_markdown(block, Path(folder)) for block in blocks) + "\n"


@lru_cache
def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("dyvte.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    found.filters["inside"] = _inside
    return found


def _inside(path: Path) -> str:
    """A file as part of the page."""
    kind = {".png": "image/png", ".jpg": "image/jpeg"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {markdown_text(text)}"
        case Text(text):
            return markdown_text(text)
        case Table(header, rows):
            escaped = [[markdown_text(cell) for cell in row] for row in rows]
            return markdown_table([markdown_text(cell) for cell in header], escaped)
        case Image(path, caption):
            return f"![]({_link(path, folder)})\n\n*{markdown_text(caption)}*"
        case Example(image, lines, table):
            parts = [] if image is None else [f"![]({_link(image, folder)})"]
            parts += [markdown_text(line) for line in lines]
            return "\n\n".join([*parts, _markdown(table, folder)])


def _link(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def markdown_text(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    one_line = re.sub(r"\s+", " ", text)
    escaped = html.escape(one_line, quote=False)
    # "www." and "://" would become links by themselves.
    escaped = re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", escaped)
    return re.sub(r"(?i)(www)\.|(:)//", lambda m: f"{m[1]}&#46;" if m[1] else "&#58;//", escaped)
