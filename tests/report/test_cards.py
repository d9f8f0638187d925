"""Model cards as those who read them see them: a YAML parser, a Markdown parser, a person."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pomona.report.cards import Parent, command_line, common_licence, model_card, stated_licence

HOSTILE = (
    "a|b\n---\n| c `x` ``` <script>alert(1)</script> [l](http://e.org) \x1b[31m \u202e ![i](x)\n# h\n"
    "- {a: b} 'q' \"d\" \\"
)
APACHE = Parent("one", "expert", "Apache-2.0", "org/one")


def _card(**changed: Any) -> str:
    told: dict[str, Any] = {
        "parents": [APACHE, Parent("two", "adapter, weight 0.5", "apache-2.0", "org/two")],
        "method": ["Experts were averaged.", "Sums were in float32."],
        "command": "pomona meo-convert org/one -o out",
        "metrics": {"relative drift": "0.013", "perplexity": "12.3"},
        "limits": ["Nothing was measured in German."],
        "tags": ["merge", "meo"],
        "usage": 'AutoModel.from_pretrained("out")',
    }
    return model_card("A model", "One expert of four.", **{**told, **changed})


def _front(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def _tokens(card: str) -> list[Any]:
    flat = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.split("---\n", 2)[2]):
        flat += [token, *(token.children or [])]
    return flat


def _seen(card: str) -> str:
    return " ".join(token.content for token in _tokens(card) if token.type in ("text", "fence", "code_inline"))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert _front(_card()) == {
        "license": "apache-2.0",
        "base_model": ["org/one", "org/two"],
        "tags": ["pomona", "merge", "meo"],
        "library_name": "transformers",
    }
    assert _card().startswith("---\nlicense:")


def test_everything_told_is_seen_in_order() -> None:
    seen = _seen(_card())
    parts = [
        *("A model", "One expert of four.", "two", "adapter, weight 0.5", "apache-2.0", "Experts were averaged."),
        *("pomona meo-convert org/one -o out", "relative drift", "0.013", 'AutoModel.from_pretrained("out")'),
        "Nothing was measured in German.",
    ]
    places = [seen.index(part) for part in parts]
    assert places == sorted(places)
    assert "asks for holds here too" not in seen


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["Apache-2.0", "apache-2.0 "], "apache-2.0"),
        (["mit"], "mit"),
        (["mit", "apache-2.0"], "other"),
        (["mit", None], "other"),
        ([None], "other"),
        (["See the file\nLICENCE"], "other"),
        ([], "other"),
    ],
)
def test_the_licence_is_that_of_all_parents_or_other(licences: list[str | None], expected: str) -> None:
    parents = [Parent(f"p{place}", "expert", licence) for place, licence in enumerate(licences)]
    card = _card(parents=parents)
    assert common_licence(parents) == _front(card)["license"] == expected
    said = [text for text in ("asks for holds here too", "states no licence") if text in _seen(card)]
    assert len(said) == (expected == "other")


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        ([None], "Its parent states no licence"),
        (["See the file"], "What its parent's licence asks for"),
        (["mit", None], "Its parents do not state one licence for all"),
    ],
)
def test_of_one_parent_nothing_is_said_in_the_plural(licences: list[str | None], said: str) -> None:
    parents = [Parent(f"p{place}", "expert", licence) for place, licence in enumerate(licences)]
    assert said in _seen(_card(parents=parents))


def test_a_parent_without_a_licence_is_said_to_have_none() -> None:
    assert "not stated" in _seen(_card(parents=[Parent("p", "expert")]))


def test_places_on_a_machine_are_no_base_models() -> None:
    names = ["/data/model", "../model", "org/one/two", "a b", "minilm", "org/one", "org/one"]
    card = _card(parents=[Parent("p", "expert", "mit", name) for name in names])
    assert _front(card)["base_model"] == ["minilm", "org/one"]
    assert "base_model" not in _front(_card(parents=[Parent("p", "expert", "mit")]))


@settings(max_examples=60, deadline=None)
@example(HOSTILE)
@example("- a")
@example("12. a")
@example("---")
@given(st.text(max_size=60))
def test_no_text_becomes_markup(text: str) -> None:
    plain = [token.type for token in _tokens(_card()) if token.type not in ("text", "softbreak")]
    card = model_card(
        text, text, parents=[Parent(text, text, text, text)] * 2, method=[text, text], command=text,
        metrics={text: text, text + "x": text}, limits=[text], tags=[text], usage=f"x{text}",
    )  # fmt: skip
    found = [token.type for token in _tokens(card) if token.type not in ("text", "softbreak")]
    assert not {"html_block", "html_inline", "link_open", "image", "code_inline"} & set(found)
    for kind in ("heading_open", "tr_open", "td_open", "bullet_list_open", "ordered_list_open", "hr", "fence"):
        assert found.count(kind) == plain.count(kind), kind
    assert set(_front(card)) <= {"license", "base_model", "tags", "library_name"}
    assert not set(card) & set("\x1b\u202e\x00")


def test_a_command_cannot_leave_its_block() -> None:
    fences = [
        token
        for token in _tokens(_card(command="pomona ````\n``` x", usage="a = '''\n````\n'''"))
        if token.type == "fence"
    ]
    assert [token.content for token in fences] == ["pomona ```` ``` x\n", "a = '''\n````\n'''\n"]


def test_without_figures_or_limits_the_card_says_so() -> None:
    card = _card(metrics={}, limits=[], usage=None, library=None)
    assert "Measured" not in card and "library_name" not in card and "## Use" not in card
    assert "Nothing was measured" in card


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# t\n", "apache-2.0"),
        ("---\r\ntags:\r\n- a\r\nlicense: 'MIT' # ours\r\n---\r\n", "MIT"),
        ('\ufeff---\nlicence: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("---\nlicense: mit\x1b[31m\n---\n", "mit\ufffd[31m"),
        ("---\nlicense:\n- mit\n- gpl\n---\n", None),
        ("---\ntitle: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_licence_is_read_in_the_front_matter_alone(tmp_path: Path, readme: str | None, expected: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme.encode())
    assert stated_licence(tmp_path) == expected


def test_a_card_states_the_licence_it_gives(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(_card(), "utf-8")
    assert stated_licence(tmp_path) == "apache-2.0"
    assert stated_licence(tmp_path / "absent") is None


@dataclass(frozen=True)
class Options:
    words: str = "as they are"
    on: bool = True
    off: bool = False
    number: float | None = None
    a_file: Path | None = None


def test_a_command_line_repeats_what_was_asked_and_nothing_else() -> None:
    given = Options("a 'b' $c", on=False, off=True, number=1.5, a_file=Path("/data/me/in.jsonl"))
    assert shlex.split(command_line("do", ["x y"], given, Options(a_file=Path("near/in.jsonl")))) == [
        *("pomona", "do", "x y", "--words", "a 'b' $c", "--no-on", "--off", "--number", "1.5", "--a-file", "in.jsonl"),
        *("--a-file", "near/in.jsonl", "-o", "DIR"),
    ]
    assert command_line("do", [], Options()) == "pomona do -o DIR"
    assert "secret" not in command_line("do", [], Options(words="http://me:secret@host/x"))
