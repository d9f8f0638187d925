"""HTML pieces: nothing that is text becomes markup, and colours stay legible."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.report.html import element, page, shade, strip, table
from pomona.report.text import lines


class Seen(HTMLParser):
    """Tags, attributes and texts of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def _seen(document: str) -> Seen:
    seen = Seen()
    seen.feed(document)
    seen.close()
    return seen


@settings(max_examples=100)
@given(st.text(max_size=80) | st.sampled_from(["</p><script>x</script>", '" onload="x', "&lt;b&gt;", "<!--", "]]>"]))
def test_text_and_attributes_come_back_as_they_went_in(text: str) -> None:
    seen = _seen(element("p", text, title=text))
    assert seen.tags == ["p"]
    assert seen.attributes == [("title", lines(text))]
    assert seen.text == lines(text)


def test_a_page_forbids_scripts_and_everything_from_outside() -> None:
    seen = _seen(page("<t>", element("p", "x")))
    policy = dict(seen.attributes)["content"] or ""
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert seen.tags[:2] == ["html", "head"] and "script" not in seen.tags and "<t>" in seen.text


def test_a_shade_is_legible_everywhere() -> None:
    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(101):
        pair = re.fullmatch(r"background:#(\w{6});color:#(\w{3})", shade(step / 100))
        assert pair is not None
        high, low = sorted((luminance(pair[1]), luminance(pair[2])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_a_strip_says_in_words_what_it_draws() -> None:
    drawn = _seen(strip([(0.5, 0.4, 0.6), (0.25, 0.2, 0.3)], "zs: 50%", filled=True))
    assert ("aria-label", "zs: 50%") in drawn.attributes and drawn.text == "zs: 50%"
    widths = [value for key, value in drawn.attributes if key == "width"]
    assert widths == ["50.00%", "25.00%"]


def test_a_table_takes_rows_or_bodies() -> None:
    row = element("tr", element("td", "1"))
    assert _seen(table([row], [row])).tags == _seen(table([row], [element("tbody", row)])).tags
