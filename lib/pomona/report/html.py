"""One HTML file that needs nothing else: no script, no address, legible in light, dark and grey print.

Elements are built by `element`, which escapes every text it is given, so no text of a stranger can become markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from pomona.report.colour import MIDDLE, luminance
from pomona.report.text import lines

_VOID = frozenset({"br", "hr", "input", "meta"})

# Okabe-Ito: blue and vermilion in light, sky blue and orange in dark; every mark also has a shape or a word.
_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2430; --quiet: #596470; --rule: #d8dde3; --wash: #f5f7f9;
  --first: #0072b2; --second: #d55e00; --grid: #e6eaee; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --quiet: #9aa5b1; --rule: #333b44;
  --wash: #1c2228; --first: #56b4e9; --second: #e69f00; --grid: #272e36; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
h1, h2 { line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h1 { margin: .1rem 0 0; font-size: 1.9rem; }
h2 { margin: 3.25rem 0 .35rem; font-size: 1.2rem; }
h1, h2, p, summary, .wrap { overflow-wrap: anywhere; }
p { margin: .35rem 0; max-width: 46rem; }
.quiet, figcaption, thead th { color: var(--quiet); }
.lead { margin: .9rem 0 1rem; font-size: 1.2rem; line-height: 1.45; }
.over { margin: 0; font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; color: var(--quiet); }
figure { margin: .9rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35; }
figcaption { max-width: 52rem; padding-top: .45rem; font-size: 12.5px; line-height: 1.45; }
th, td { padding: .3rem .42rem; text-align: left; vertical-align: baseline; font-weight: 400; }
thead th { font-size: 12px; vertical-align: bottom; }
thead tr:last-child th, thead [rowspan] { border-bottom: 1px solid var(--ink); }
thead th[colspan] { border-bottom: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 1px solid var(--rule); }
tbody + tbody tr:first-child > * { border-top: 1px solid var(--rule); }
th.part { padding-top: .8rem; font-size: 12px; color: var(--quiet); }
td.n, th.n { text-align: right; }
td { white-space: nowrap; }
td.ci { color: var(--quiet); }
td.n + td.ci { padding-left: 0; }
tr.small > * { color: var(--quiet); }
tr.small b, td.small b { font-weight: 400; }
.scroll th[scope=row] { position: sticky; left: 0; background: var(--paper); min-width: 6rem; }
svg.strip { display: block; width: 100%; overflow: visible; }
td.strip { min-width: 7rem; padding-block: 0; vertical-align: middle; }
th:first-child, td:first-child { padding-left: 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1.1rem; margin: .8rem 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
ul.notes { margin: 1.2rem 0; max-width: 56rem; padding: .65rem 1rem .65rem 2.1rem; border-left: 3px solid var(--second);
  background: var(--wash); }
ul.notes li { margin: .2rem 0; max-width: 52rem; overflow-wrap: anywhere; }
ul.notes li::marker { content: "!  "; font-weight: 700; color: var(--second); }
details > summary { cursor: pointer; }
pre { margin: .3rem 0; padding: .55rem .75rem; max-height: 22rem; overflow: auto; background: var(--wash);
  font: inherit; font-size: 13.5px; white-space: pre-wrap; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
@media (max-width: 40rem) { body { padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.5rem; } .lead { font-size: 1.05rem; }
  h2 { margin-top: 2.25rem; } }
@media (min-width: 64rem) { th[scope=row] { white-space: nowrap; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } pre { max-height: none; }
  .scroll { overflow: visible; } .scroll th[scope=row] { position: static; min-width: 0; background: none; }
  table { font-size: 7pt; } thead th, th.part { font-size: 6.5pt; } th, td { padding: .15rem .2rem; }
  td.strip { min-width: 4.5rem; } th[scope=row] { white-space: nowrap; } tr { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .screen { display: none !important; } }
"""


class Html(str):
    """Text that is markup already; `element` takes it as it is."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def element(tag: str, /, *children: Child, **attributes: str | bool | None) -> Html:
    """An element of `children`: `Html` as it is, other text escaped and made harmless, None left out.

    Attributes are escaped too. `class_` is `class`, an underscore elsewhere is a hyphen, True has no value, and None
    or False leave the attribute out.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(lines(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    opened = f"<{tag}{shown}>"
    return Html(opened if tag in _VOID else f"{opened}{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """`children` one after the other, as `element` takes them."""
    return Html("".join(_flat(children)))


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield html.escape(lines(child), quote=False)
        elif child is not None:
            yield from _flat(child)


def page(title: str, *body: Child, css: str = "") -> str:
    """A whole document. Its own policy forbids scripts and everything from outside, should an escape ever fail."""
    head = (
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'\">"
        ),
        element("title", title),
        element("style", Html(_CSS + css)),
    )
    document = element("html", element("head", head), "\n", element("body", body), "\n", lang="en")
    return f"<!doctype html>\n{document}\n"


def table(head: Sequence[Html], body: Sequence[Html], caption: str | None = None) -> Html:
    """A table that scrolls sideways in itself where the window is narrow.

    Args:
        head: its heading rows.
        body: its rows, or its bodies.
    """
    bodies = body if body and body[0].startswith("<tbody") else [element("tbody", body)]
    scrolled = element("div", element("table", element("thead", head), bodies), class_="scroll", tabindex="0")
    return element("figure", "\n", scrolled, element("figcaption", caption) if caption else None)


def strip(bars: Sequence[tuple[float, float, float]], title: str, *, filled: bool) -> Html:
    """Shares (value, low, high) on a line from 0 to 1, the first solid and the second hollow, with their intervals.

    `filled` draws bars from 0; otherwise only the values stand there. In per cent of the width, so text never scales.
    """
    tall, thick = (34, 12) if filled else (22, 0)
    places = (tall * 0.3, tall * 0.7) if len(bars) > 1 else (tall * 0.5,)
    marks = [  # reach into the rows above and below, as one line
        element("line", x1=f"{x}%", x2=f"{x}%", y1="-6", y2=f"{tall + 6}", stroke="var(--grid)")
        for x in (0, 25, 50, 75, 100)
    ]
    for number, ((value, low, high), y) in enumerate(zip(bars, places, strict=True)):
        colour = "var(--second)" if number else "var(--first)"
        inside = "var(--paper)" if number else colour
        if filled:
            box = {"x": "0", "y": f"{y - thick / 2:g}", "width": _at(value), "height": f"{thick}"}
            marks.append(element("rect", **box, fill=inside, stroke=colour, stroke_width="1.2"))
        marks.append(_line(low, high, y, "var(--ink)" if filled else colour))
        if filled and not number:  # ink would be lost on the solid bar
            marks.append(_line(low, value, y, "var(--paper)"))
        if not filled:
            dot = {"cx": _at(value), "cy": f"{y:g}", "r": "3.4"}
            marks.append(element("circle", **dot, fill=inside, stroke=colour, stroke_width="1.6"))
    return element(
        "svg", element("title", title), *marks, class_="strip", role="img", aria_label=title, height=f"{tall}"
    )


def _line(low: float, high: float, y: float, stroke: str) -> Html:
    return element("line", x1=_at(low), x2=_at(high), y1=f"{y:g}", y2=f"{y:g}", stroke=stroke, stroke_width="1.6")


def _at(share: float) -> str:
    return f"{share * 100:.2f}%"


def shade(share: float) -> str:
    """The style of a heat map's cell: white at 0 to blue at 1, with whichever of black and white reads better."""
    channels = [255 + (full - 255) * share for full in (0x00, 0x72, 0xB2)]
    ink = "#000" if luminance([c / 255 for c in channels]) > MIDDLE else "#fff"
    return f"background:#{''.join(f'{round(c):02x}' for c in channels)};color:{ink}"
