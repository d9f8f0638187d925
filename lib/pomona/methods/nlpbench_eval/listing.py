"""Every question of the HTML report, folded, with what each arm made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pomona.methods.nlpbench_eval import replies
from pomona.methods.nlpbench_eval.arms import Arm
from pomona.methods.nlpbench_eval.findings import NAMES, Reading
from pomona.methods.nlpbench_eval.replies import Line, Question
from pomona.report.html import Child, Html, element, join
from pomona.report.text import one_line

_REPLY = 4000  # characters of a text that the page shows
_TITLE = 140

_FILTERS = (
    ("all", "all"),
    ("wrong", "✗ wrong"),
    ("unanswered", "∅ no answer"),
    ("unscored", "? not scored"),
    ("differ", "runs differ"),
    ("format", "readings differ"),
)

# The filter is a radio button that a selector looks at: no script, and without the selector everything is shown.
CSS = """
h3 { margin: 1.6rem 0 -.3rem; font-size: .95rem; font-weight: 600; }
dl.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.6rem; font-size: 13.5px; }
dl.facts div { display: flex; gap: .5rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3.5rem; align-items: flex-start; }
td.wide { width: 22rem; padding-block: .15rem; } tr.bar > * { vertical-align: middle; }
.scale { display: flex; justify-content: space-between; font-weight: 400; font-size: .92em; }
.heat table { border-spacing: 2px; border-collapse: separate; }
.heat td { min-width: 8.2rem; padding: .35rem .6rem; }
.heat td span { display: block; font-size: 11.5px; white-space: nowrap; }
.heat td.small, .heat td.none { color: var(--quiet); background: var(--wash); }
.heat thead > *, .heat tbody > tr > * { border: 0 !important; }
.heat tbody + tbody::before { content: ""; display: block; height: .6rem; }
fieldset { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .8rem 0 1rem; padding: 0; border: 0; }
legend { float: left; padding: 0; margin-right: 1rem; color: var(--quiet); }
.group { border-top: 1px solid var(--rule); }
.group > .context { padding: .5rem 0; color: var(--quiet); font-size: 13.5px; }
.group > .context > pre { color: var(--ink); }
.group.many > .q { margin-left: 1rem; }
.q > summary { display: grid; grid-template-columns: 6rem minmax(0, 1fr) auto; gap: .1rem 1rem; padding: .42rem 0; }
.q > summary::marker, .q > summary::-webkit-details-marker { content: ""; display: none; }
.q > summary:hover .ask, .q[open] > summary .ask { text-decoration: underline; text-underline-offset: 3px;
  text-decoration-color: var(--rule); }
.q .id::before { content: "▸ "; } .q[open] .id::before { content: "▾ "; }
.q .id { color: var(--quiet); font-size: 13px; overflow-wrap: anywhere; }
.q .ask { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.q[open] .ask { white-space: normal; }
.marks { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: 13px; }
.mark { white-space: nowrap; } .mark i { font-style: normal; color: var(--quiet); }
.many-arms .mark { min-width: 7.6rem; }
.wrong, .unanswered { font-weight: 600; }
.mark.wrong { color: var(--second); } .mark.right { color: var(--first); }
.q > .body { margin: .2rem 0 1.6rem; }
.q ol { margin: .3rem 0 .6rem; padding-left: 2rem; }
.q ol li.gold { font-weight: 600; }
.arms { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  margin-top: .9rem; }
.arm h4 { margin: 0; font-size: 14px; font-weight: 600; }
.arm p, .arm dl { font-size: 13px; } .arm dl { margin: .4rem 0; gap: 0 .8rem; }
.arm summary { font-size: 13px; color: var(--quiet); }
.cut { font-style: italic; }
@media (max-width: 40rem) { .q > summary { grid-template-columns: minmax(0, 1fr); } .group.many > .q { margin-left: 0; }
  .q .ask { white-space: normal; } .many-arms .mark { min-width: 0; } }
""" + "".join(
    f".listing:has(#show-{key}:checked) .q:not(.is-{key}),"
    f".listing:has(#show-{key}:checked) .group:not(:has(.is-{key})) {{ display: none; }}\n"
    for key, _ in _FILTERS[1:]
)


def listing(arms: Sequence[Arm], parser: Reading) -> Html:
    """All questions, those of one context together; a filter where there is something to filter."""
    sections, counts = [], dict.fromkeys((key for key, _ in _FILTERS), 0)
    for questions in replies.groups(arms):
        folded = []
        for question in questions:
            kinds = _kinds(question, parser)
            for kind in ("all", *kinds):
                counts[kind] += 1
            folded.append(_question(question, kinds, arms, parser))
        many = len(questions) > 1
        sections.append(element("div", "\n", _context(questions), *folded, class_="group many" if many else "group"))
    radios = [
        element(
            "label",
            element("input", type="radio", name="show", id=f"show-{key}", checked=key == "all"),
            f" {said} ",
            element("span", f"{counts[key]:,}", class_="quiet"),
        )
        for key, said in _FILTERS
        if counts[key]
    ]
    return element(
        "section",
        "\n",
        element("h2", "Questions"),
        element("fieldset", element("legend", "show"), *radios, class_="screen") if len(radios) > 1 else None,
        *sections,
        class_="listing many-arms" if len(arms) > 1 else "listing",
    )


def _kinds(question: Question, parser: Reading) -> list[str]:
    fates = [replies.fate(line, parser) for line in question.replies]
    kinds = [kind for kind in ("wrong", "unanswered", "unscored") if any(fate.kind == kind for fate in fates)]
    if len({fate.kind for fate in fates}) > 1:
        kinds.append("differ")
    correct = [
        (replies.read(line, r).get("correct") for r in ("strict", "lenient")) for line in question.replies if line
    ]
    return [*kinds, "format"] if any(strict != lenient for strict, lenient in correct) else kinds


def _context(questions: Sequence[Question]) -> Html | None:
    said = replies.context(questions[0].asked)
    if said is None:
        return None
    group, number = one_line(str(questions[0].asked.get("group") or ""), 40), len(questions)
    named = f"{group}: context of {number} question{'s' if number > 1 else ''}"
    return element("details", element("summary", named), _block(said), class_="context")


def _question(question: Question, kinds: Sequence[str], arms: Sequence[Arm], parser: Reading) -> Html:
    asked = question.asked
    words = replies.text(asked, "question") or ""
    marks = [
        _mark(replies.fate(line, parser).short, replies.fate(line, parser).kind, arm.name if len(arms) > 1 else None)
        for arm, line in zip(arms, question.replies, strict=True)
    ]
    summary = element(
        "summary",
        element("span", one_line(str(asked["id"]), 40), class_="id"),
        element("span", one_line(words, _TITLE), class_="ask"),
        element("span", *marks, class_="marks"),
    )
    kind, category = (NAMES.get(str(asked.get(k))) or str(asked.get(k)) for k in ("type", "category"))
    options = _options(asked)  # they mark the right ones
    body = element(
        "div",
        element("p", f"{one_line(kind, 40)}; {one_line(category, 40).lower()}", class_="quiet"),
        _block(words) if len(words) > _TITLE or "\n" in words else None,
        options or element("p", element("b", "Gold "), one_line(replies.gold(asked), 1000)),
        element("div", *(
            _arm(arm.name, line, parser) for arm, line in zip(arms, question.replies, strict=True)
        ), class_="arms"),
        class_="body",
    )  # fmt: skip
    return element("details", summary, body, class_=" ".join(["q", *(f"is-{kind}" for kind in kinds)]))


def _options(asked: Line) -> Html | None:
    options, gold = replies.options(asked), asked.get("gold")
    if not options or options == [replies.WITHHELD]:
        return None
    right = gold if isinstance(gold, list | tuple) else ()
    return element("ol", *(
        element("li", one_line(option, 1000), " ← gold" if number in right else None,
                class_="gold" if number in right else None)
        for number, option in enumerate(options)
    ), start="0")  # fmt: skip


def _mark(said: str, kind: str, name: str | None) -> Html:
    before = element("i", f"{one_line(name, 24)} ") if name else None
    return element("span", before, said, class_=f"mark {kind}")


def _arm(name: str, line: Line | None, parser: Reading) -> Html:
    fate = replies.fate(line, parser)
    title = element("h4", one_line(name, 60), " ", _mark(str(fate), fate.kind, None))
    if line is None:
        return element("div", title, class_="arm")
    readings = ("lenient", "strict") if parser == "lenient" else ("strict", "lenient")
    facts = [(reading, replies.parsed(line, reading)) for reading in readings] if replies.read(line, parser) else []
    if said := replies.judgement(line):
        facts.append(("judge", one_line(said, 1000)))
    if notes := replies.notes(line):
        facts.append(("reply", "; ".join(notes)))
    return element(
        "div",
        title,
        element("dl", *(join(element("dt", k), element("dd", v)) for k, v in facts)),
        _block(replies.reply(line)),
        _folded("Thoughts", replies.thoughts(line)),
        _folded("Votes", replies.samples(line)),
        class_="arm",
    )


def _folded(title: str, texts: Sequence[str]) -> Html | None:
    if not texts:
        return None
    return element("details", element("summary", f"{title} ({len(texts)})"), *(_block(said) for said in texts))


def _block(whole: str) -> Html:
    return join(_shown(whole))


def _shown(whole: str) -> Iterator[Child]:
    shown, cut = replies.excerpt(whole, _REPLY)
    yield element("pre", shown, dir="auto")
    if cut:
        yield element("p", cut, class_="quiet cut")
