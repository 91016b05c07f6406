"""Pages for a browser: one file each, which needs no network and no script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

# those of Okabe and Ito on light pages, and lighter ones of the same hues on dark pages
_COLORS = {
    "#0072b2": ("--blue", "#4aa3e0"),
    "#d55e00": ("--vermilion", "#f07a2a"),
    "#009e73": ("--green", "#22bd92"),
    "#cc79a7": ("--purple", "#d98fb8"),
    "#e69f00": ("--orange", "#f0b030"),
    "#56b4e9": ("--sky", "#a5dcf7"),
    "#000000": ("--ink", "#e9e9ee"),
    "#404040": ("--ink", "#e9e9ee"),  # grey that is nearly black
    "#ffffff": ("--page", "#17171a"),
}
_LIGHT = "; ".join(f"{name}: {light}" for light, (name, _) in _COLORS.items() if name not in ("--ink", "--page"))
_DARK = "; ".join(f"{name}: {dark}" for name, dark in _COLORS.values() if name not in ("--ink", "--page"))
_STYLE = """\
:root { color-scheme: light dark; --ink: #1b1b1f; --quiet: #5d5d66; --rule: #d9d9de; --page: #ffffff; --row: #f6f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9e9ee; --quiet: #a3a3ad; --rule: #3b3b42; --page: #17171a; --row: #202024 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule) }
p { margin: .4rem 0; max-width: 48rem }
.note, figcaption { color: var(--quiet); font-size: .9rem; overflow-wrap: anywhere }
.table { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 20rem }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap }
th { color: var(--quiet); font-weight: 600 }
td.words { white-space: normal; min-width: 12rem; max-width: 24rem; overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: .75rem 0 } svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink) }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; padding: 0; list-style: none }
.legend svg { display: inline-block; width: 2rem; height: .75rem; margin-right: .4rem; vertical-align: middle }
"""


def make_page(title: str, note: str, parts: Sequence[str], style: str = "") -> bytes:
    """A whole page.

    Args:
        title, note: text, the second of them what the page is about.
        parts: the HTML between the title and the end.
        style: more CSS.
    """
    head = f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    colors = f":root {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    head += f"<style>\n{_STYLE}{colors}{style}</style>\n</head>\n<body>\n"
    top = f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>\n'
    return (head + top + "\n".join(parts) + "\n</body>\n</html>\n").encode()


def themed(html: str) -> str:
    """HTML or SVG with the page's colours, which follow the reader's scheme, in place of those of a white page.

    >>> themed('<line stroke="#0072b2"/>')
    '<line stroke="var(--blue)"/>'
    """
    for color, (name, _) in _COLORS.items():
        html = html.replace(color, f"var({name})")
    return html


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, quiet: bool = True) -> str:
    return f'<p class="note">{escape(text)}</p>' if quiet else f"<p>{escape(text)}</p>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first of them titles, the first cell of each a name.

    >>> print(table([["run", "KL"], ["<a>", "0.5"]]))
    <div class="table"><table>
    <tr><th>run</th><th>KL</th></tr>
    <tr><td>&lt;a&gt;</td><td>0.5</td></tr>
    </table></div>
    """
    first, *others = rows
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in first)]
    lines += ["".join(_cell(cell) for cell in row) for row in others]
    return "\n".join(['<div class="table"><table>', *(f"<tr>{line}</tr>" for line in lines), "</table></div>"])


def _cell(text: str) -> str:
    kind = ' class="words"' if len(text) > 48 else ""
    return f"<td{kind}>{escape(text)}</td>"


def figure(drawing: str, label: str, caption: str = "") -> str:
    """A drawing with what it shows, which a screen reader says.

    Args:
        drawing: SVG.
        label, caption: text, the second of them to be seen below it.
    """
    described = re.sub("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', drawing, count=1)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{described}{below}</figure>"


def panels(figures: Sequence[str]) -> str:
    """Figures beside each other or, where there is no room, below each other."""
    return f'<div class="panels">\n{"".join(figures)}\n</div>'


def legend(looks: Sequence[tuple[str, str, str]]) -> str:
    """What the lines of figures are.

    Args:
        looks: name, line style of matplotlib, and colour of each.
    """
    dashes = {"-": "", "--": ' stroke-dasharray="6 3"', ":": ' stroke-dasharray="2 3"'}
    lines = []
    for name, style, color in looks:
        line = f'<line x1="1" y1="6" x2="31" y2="6" stroke-width="3" stroke="{themed(color)}"{dashes[style]}/>'
        lines.append(f'<li><svg viewBox="0 0 32 12" aria-hidden="true">{line}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(lines)}</ul>'
