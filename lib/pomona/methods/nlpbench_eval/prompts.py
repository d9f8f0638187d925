"""What the model is shown: instruction, demonstrations, question and cue, in one user message.

The wording is ours, the structure the paper's. Everything that is the same from question to question comes first, byte
for byte, so that a server's prefix cache serves it. `Wording` holds the texts of one run; `released_wording` reads
the original ones from a copy of the authors' repository that the user has, as constants, without running it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pomona.errors import MissingError, UsageError
from pomona.io.records import parse
from pomona.methods.nlpbench_eval.questions import TYPES, Question, QuestionType

CUE = "Answer:"
"""What a reasoned reply puts before its final answer; the strict parsers hold the model to it."""

QUESTION = "Question: "
REASONING = "Thoughts:"
"""What a message ends in that asks for reasoning first."""

INSTRUCTIONS: dict[QuestionType, str] = {
    "mc": "Answer the multiple-choice question below. One or several options may be right.",
    "sa": "Answer the short-answer question below in at most 150 words.",
    "math": "Answer the mathematical question below with a number, a list of numbers, or a LaTeX expression.",
}
FORMS: dict[QuestionType, str] = {
    "mc": "Reply with the numbers of all right options, separated by commas, and nothing else.",
    "sa": "Reply with the answer and nothing else.",
    "math": "Reply with the final result and nothing else.",
}
REASONED_FORMS: dict[QuestionType, str] = {
    "mc": f'Think step by step. Then end with a line that is "{CUE}" followed by the numbers of all right options, '
    "separated by commas.",
    "sa": f'Think step by step. Then end with a line that begins with "{CUE}" and holds the answer.',
    "math": f'Think step by step. Then end with a line that is "{CUE}" followed by the final result.',
}
SYSTEM: dict[QuestionType, str] = {
    "mc": "You sit an exam in natural language processing. For multiple-choice questions, pick the one option or the "
    "several options that are right.",
    "sa": "You sit an exam in natural language processing. Give short-answer questions a concise answer, with any "
    "mathematics in LaTeX.",
    "math": "You sit an exam in natural language processing. Answer mathematical questions with numbers or LaTeX "
    "expressions; keep fractions and matrices in LaTeX and exact forms exact.",
}
THOUGHT_REQUEST = "Before answering, think step by step about what the question asks. Write down your thoughts only."
THOUGHT_HEADER = "Your thoughts:"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A worked example of one question type."""

    question: str
    answer: str
    thought: str = ""
    options: tuple[str, ...] = ()


DEMONSTRATIONS: dict[QuestionType, tuple[Demonstration, ...]] = {
    "mc": (
        Demonstration(
            "Which of these are open word classes in English?",
            "1,3",
            "Open classes take in new members. English keeps coining nouns and verbs, while its determiners and "
            "prepositions hardly change. So nouns and verbs, options 1 and 3.",
            ("Determiners", "Nouns", "Prepositions", "Verbs"),
        ),
        Demonstration(
            "A unigram model takes the order of words into account.",
            "1",
            "A unigram model multiplies the probabilities of single words, and a product does not depend on the order "
            "of its factors. The statement is false, option 1.",
            ("True", "False"),
        ),
        Demonstration(
            "What does lemmatization map the word 'mice' to?",
            "2",
            "Lemmatization gives the dictionary form. 'Mice' is the plural of 'mouse', option 2.",
            ("mic", "mices", "mouse"),
        ),
    ),
    "sa": (
        Demonstration(
            "What is the difference between a type and a token?",
            "A type is a distinct word form, a token one occurrence of it in running text.",
            "Counting words can mean two things: how many different forms there are, or how many occurrences. The "
            "forms are types, the occurrences tokens.",
        ),
        Demonstration(
            "Name two sources of ambiguity in natural language.",
            "Words with several senses (lexical ambiguity) and sentences with several parses (structural ambiguity).",
            "A word such as 'bank' has several senses. A sentence such as 'I saw her duck' has several parses. Those "
            "are two sources.",
        ),
        Demonstration(
            "Why is accuracy a poor measure for spam detection when one message in a hundred is spam?",
            "Because calling every message harmless is right 99 % of the time and finds no spam at all.",
            "With 1 % spam, a classifier that never says spam is right on 99 of 100 messages. So a high accuracy tells "
            "nothing about the spam that is found.",
        ),
    ),
    "math": (
        Demonstration(
            "The word 'tree' occurs 3 times among 12 tokens. What is its maximum likelihood unigram probability?",
            r"\frac{1}{4}",
            r"The estimate is the count over the number of tokens, 3/12 = \frac{1}{4}.",
        ),
        Demonstration(
            "A classifier has 6 true positives, 2 false positives and 4 false negatives. Give precision and recall.",
            r"\frac{3}{4}, \frac{3}{5}",
            r"Precision is 6/(6+2) = \frac{3}{4}, recall is 6/(6+4) = \frac{3}{5}.",
        ),
        Demonstration(
            "What is the entropy in bits of a fair choice among 8 words?",
            "3",
            r"The entropy is \log_2 8 = 3.",
        ),
    ),
}

_OFFICIAL_NAMES: dict[QuestionType, str] = {"mc": "MULTICHOICE_STD", "sa": "SHORTANS", "math": "MATH"}
_OFFICIAL_SYSTEM: dict[QuestionType, str] = {"mc": "MULTICHOICE", "sa": "SHORTANS", "math": "MATH"}


@dataclass(frozen=True)
class Wording:
    """The texts of one run.

    Attributes:
        shots: demonstrations shown for each question type.
        reasoned: demonstrations carry a thought, and the reply ends with the cue (chain of thought).
        instructed: the reply's form is asked for as the reasoned one. The released code shows thoughts but asks for
            bare output; then this is False while `reasoned` is True.
        system: the system message for each type; empty for none.
        templates: whole messages with a place for the question, by type, instead of the above.
    """

    shots: Mapping[QuestionType, Sequence[Demonstration]]
    reasoned: bool = False
    instructed: bool = False
    system: Mapping[QuestionType, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)

    def sha256(self) -> str:
        """A digest of every text."""
        return hashlib.sha256(repr(self).encode("utf-8", "surrogatepass")).hexdigest()

    def ask(self, question: Question, *, thought: str | None = None, first: bool = True) -> str:
        """The user message that asks `question`.

        Args:
            thought: a thought to paste in before the answer is given.
            first: whether instruction and demonstrations are shown; later questions of the same type in one
                conversation do without.
        """
        template = self.templates.get(question.type if thought is None else f"{question.type} thought")
        if template is not None:
            return _filled(template, input=asked(question), thought=thought or "")
        lines: list[str] = []
        if first:
            form = REASONED_FORMS if self.instructed and thought is None else FORMS
            lines += [f"{INSTRUCTIONS[question.type]} {form[question.type]}", ""]
            for number, shot in enumerate(self.shots.get(question.type, ()), 1):
                lines += [f"Example {number}", f"{QUESTION}{_with_options(shot.question, shot.options)}"]
                if self.reasoned and thought is None:
                    lines.append(f"{REASONING} {shot.thought}")
                lines += [f"{CUE} {shot.answer}", ""]
        lines.append(f"{QUESTION}{asked(question)}")
        if thought is not None:
            lines += ["", THOUGHT_HEADER, thought.strip(), ""]
        lines.append(REASONING if self.instructed and thought is None else CUE)
        return "\n".join(lines)

    def ask_thought(self, question: Question) -> str:
        """The user message that asks for a thought alone, before the answer is asked for."""
        template = self.templates.get(f"{question.type} first")
        if template is not None:
            return _filled(template, input=asked(question))
        return f"{INSTRUCTIONS[question.type]}\n\n{QUESTION}{asked(question)}\n\n{THOUGHT_REQUEST}"


def asked(question: Question) -> str:
    """The question with its options, numbered from 0."""
    return _with_options(question.question, question.options)


def in_context(context: str, message: str) -> str:
    """The first message of a conversation about `context`."""
    return f"The questions that follow are about this:\n\n{context}\n\n{message}"


def _with_options(text: str, options: Sequence[str]) -> str:
    return "\n".join([text, *(f"{index}: {option}" for index, option in enumerate(options))])


def _filled(template: str, **values: str) -> str:
    """`template` as `str.format` would fill it, but with anything else in braces left alone."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", value.replace("{", "\0").replace("}", "\1"))
    return template.replace("{{", "{").replace("}}", "}").replace("\0", "{").replace("\1", "}")


def read_shots(path: Path) -> dict[QuestionType, tuple[Demonstration, ...]]:
    """Demonstrations from a JSONL file: type, question, answer (as a model should write it), thought, options.

    Raises:
        MissingError: the file cannot be read.
        UsageError: a line is no demonstration, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(f"--shot-file {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    found: dict[QuestionType, list[Demonstration]] = {kind: [] for kind in TYPES}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = parse(line.encode())
            texts = [entry["question"], entry["answer"], entry.get("thought", ""), *(entry.get("options") or [])]
            if not all(isinstance(text, str) for text in texts) or isinstance(entry.get("options"), str):
                raise TypeError
            question, answer, thought, *options = texts
            found[entry["type"]].append(Demonstration(question, answer, thought, tuple(options)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--shot-file {path}:{number}: not a demonstration",
                hint='each line is {"type": "mc", "question": ..., "options": [...], "answer": "0,2", "thought": ...}',
            ) from error
    if not any(found.values()):
        raise UsageError(f"--shot-file {path}: no demonstration in it")
    return {kind: tuple(shots) for kind, shots in found.items()}


def released_wording(folder: Path, *, few_shot: bool, reasoned: bool, system: bool) -> Wording:
    """The wording of the authors' `prompts/` folder at `folder`, read as text constants; none of it is run.

    Raises:
        MissingError: the folder lacks a file or a constant.
    """
    constants: dict[str, str] = {}
    for name in ("qa_prompt.py", "sys_prompt.py"):
        try:
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise MissingError(
                f"--prompts {folder}: {name} cannot be read", hint="give the prompts/ folder of the released code"
            ) from error
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                constants |= {t.id: node.value.value for t in node.targets if isinstance(t, ast.Name)}
    shot, cot = "FS" if few_shot else "ZS", "_COT" if reasoned else ""
    named: dict[str, str] = {kind: f"{name}_{shot}{cot}" for kind, name in _OFFICIAL_NAMES.items()}
    if reasoned and not few_shot:
        named |= {"sa first": "SHORTANS_ZS_COT_ST1", "sa thought": "SHORTANS_ZS_COT"}
    systems = {kind: f"SYS_PROMPT_{name}" for kind, name in _OFFICIAL_SYSTEM.items()} if system else {}
    if lacking := sorted({*named.values(), *systems.values()} - constants.keys()):
        raise MissingError(f"--prompts {folder}: {lacking[0]} is not defined there ({len(lacking)} missing)")
    return Wording(
        {},
        reasoned=reasoned,
        system={kind: constants[name] for kind, name in systems.items()},
        templates={kind: constants[name] for kind, name in named.items()},
    )
