"""One HTML page that stands alone: pictures as inline SVG, tables, clips to hear; no request leaves it."""

import base64
import hashlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from .report import write_text


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("processing"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
Cells = tuple[list[str], list[list[str]]]  # of a table: headers, rows


@dataclass
class Section:
    """
    A part of a page, in this order: `title`, `text`, `scores` in large type (name, value, what stands below it),
    `figure` with `alt`, what it shows in words, `table` (behind a fold if `folded`, to be sorted and filtered if
    `searchable`), `utterances` (see `evaluation_page.show_utterance`). A `wide` one takes the page's whole width.
    """

    title: str
    text: str = ""
    scores: list[tuple[str, str, str]] = field(default_factory=list)
    figure: Figure | None = None
    alt: str = ""
    table: Cells | None = None
    folded: bool = False
    searchable: bool = False
    utterances: list[dict] = field(default_factory=list)
    wide: bool = True


def write_page(path: Path, title: str, lead: str, sections: list[Section]):
    """Writes `sections` as a page, under its title and a sentence."""
    script = TEMPLATES.loader.get_source(TEMPLATES, "page.js")[0]
    page = TEMPLATES.get_template("page.html").render(
        title=title,
        lead=lead,
        sections=sections,
        pictures=[section.figure and to_svg(section.figure, f"picture{i}-") for i, section in enumerate(sections)],
        number_columns=number_columns,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(path, page)


def to_svg(figure: Figure, prefix: str) -> Markup:
    """
    A picture as an SVG element. What is black takes the colour of the page's text; `prefix` keeps the ids in it apart
    from those of other pictures.
    """
    for legend in figure.findobj(Legend):
        legend.set_frame_on(False)  # it is white
    file = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none of it
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(file, format="svg", transparent=True, metadata=about)
    svg = file.getvalue()
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :], count=2)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = svg.replace("#000000", "currentColor").replace("<svg", '<svg aria-hidden="true"', 1)
    return Markup(svg)


def number_columns(table: Cells) -> list[bool]:
    """Whether each column holds numbers alone, with or without intervals: they stand on the right and sort as such."""
    is_number = re.compile(r"-|-?\d[\d.,]*( \[.*\])?").fullmatch
    return [all(is_number(row[i]) for row in table[1]) for i in range(len(table[0]))]
