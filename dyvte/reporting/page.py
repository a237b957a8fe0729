"""A page as blocks, written as one self-contained HTML file and as Markdown; all text is escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from dyvte.formatting import markdown_table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; }
body { padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 1px solid #ddd; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { border-bottom: 1px solid #e3e3e3; padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f6f6f6; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; }
figcaption, .note { color: #666; font-size: 13px; }
.example { display: flex; gap: 1rem; border-top: 1px solid #e3e3e3; padding: 1rem 0; }
.example { align-items: flex-start; }
.example img { max-width: 14rem; } .example table { margin: .5rem 0; } .example td { white-space: normal; }
"""
# Nothing is fetched, whatever the page holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An image file below the report's folder, with a caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Case:
    """One question: its image, lines of text, and a table of answers."""

    image: Path | None
    lines: Sequence[str]
    table: Table


Block: TypeAlias = Heading | Text | Table | Picture | Case


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def html(self) -> str:
        """The page with its pictures inside; it refers to nothing outside."""
        body = "\n".join(_html(block) for block in [Heading(self.title, 1), *self.blocks])
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n"
        )

    def markdown(self, folder: Path) -> str:
        """The same as Markdown that lies in ``folder``, beside the pictures."""
        blocks = [Heading(self.title, 1), *self.blocks]
        return "\n\n".join(_markdown(block, Path(folder)) for block in blocks) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f'<p class="note">{html.escape(text)}</p>'
        case Table():
            return f'<div class="wide">{_html_table(block)}</div>'
        case Picture(path, caption):
            text = html.escape(caption)
            return f'<figure><img src="{_inside(path)}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        case Case(image, lines, table):
            picture = "" if image is None else f'<img src="{_inside(image)}" alt="">'
            words = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
            return f'<div class="example">{picture}<div>{words}{_html_table(table)}</div></div>'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


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
        case Picture(path, caption):
            return f"![]({_link(path, folder)})\n\n*{markdown_text(caption)}*"
        case Case(image, lines, table):
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
