"""The value of a number as a student writes it: decimals, fractions, roots, powers, logarithms, in LaTeX or plain.

Nothing is evaluated as code. The grammar is a dozen rules; lengths, nesting and powers are bounded, so that a hostile
text costs no more than a long honest one.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 1_000
"""Characters of an answer; longer texts are no numbers."""
ROW = "\ue000"
"""What stands for the end of a matrix row in tidied text: a backslash would begin a command."""
_DEEPEST = 40
_MOST_BITS = 4_000  # of an exact number; beyond that it is taken in floating point
_LARGEST_EXPONENT = 400  # of a decimal; floating point ends there

BASES = (math.e, 2.0, 10.0)
"""What `log` without a base may mean."""


class Unreadable(ValueError):
    """Not a number in our grammar, or one without a finite value."""


@dataclass(frozen=True, slots=True)
class Value:
    """A finite number.

    Attributes:
        number: exact where the text is rational.
        step: one unit in the last place it is written to; None where it is exact (`1/3`, `12`, `sqrt(2)`).
        digits: significant digits of a decimal.
    """

    number: Fraction | float
    step: Fraction | None = None
    digits: int = 0

    @property
    def exact(self) -> bool:
        return self.step is None and isinstance(self.number, Fraction)


_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_SUBSTITUTES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), put)
    for pattern, put in [
        (r"\\\\", ROW),
        (r"[−–—]", "-"),
        (r"\u2044|÷|\\div(?![a-zA-Z])", "/"),
        (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|\\!|\$|\\[()\[\]]", ""),
        (r"\\(?:quad|qquad)(?![a-zA-Z])|\\[,;: ]|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\(?:text|mathrm|mathbf|textbf|operatorname|mbox|rm)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|\\ast(?![a-zA-Z])|×|·|∙|⋅|∗", "*"),
        (r"\*\*", "^"),
        (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"),
        (r"\\approx(?![a-zA-Z])|\\simeq(?![a-zA-Z])|\\sim(?![a-zA-Z])|≃|≅|~=", "≈"),
        (r"\\?√|\\sqrt(?![a-zA-Z])", "sqrt"),
        (r"\\pi(?![a-zA-Z])", "π"),
        (r"\\infty(?![a-zA-Z])", "∞"),
        (r"\\%", "%"),
        (r"\\(log|ln|lg|exp|sqrt)(?![a-zA-Z])", r"\1"),
        (r"\blog(2|10)(?=\s*[({\\]|\s+\d)", r"log_{\1} "),
        (r"\s+", " "),
    ]
]


def tidy(text: str) -> str:
    """`text` in the one spelling that is parsed: LaTeX commands and Unicode signs replaced, no Markdown, no dollars."""
    text = text[: 4 * LONGEST].strip("*`\"' \t\r\n")
    text = _SUPERSCRIPTS.sub(lambda run: "^{" + unicodedata.normalize("NFKC", run[0]).replace("−", "-") + "}", text)
    text = _VULGAR.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]), text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, put in _SUBSTITUTES:
        text = pattern.sub(put, text)
    return text.strip()


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_LITERAL = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<digits>{_DECIMAL})"
    r"(?:[eE](?P<e>[+-]?\d+)| ?\* ?10 ?\^ ?(?:\{ ?(?P<braced>[+-]? ?\d+) ?\}|\(? ?(?P<plain>[+-]?\d+) ?\)?))?"
    r" ?(?P<percent>%|percent\b|per cent\b)?",
    re.ASCII,
)
_TOKEN = re.compile(rf" ?(?:(?P<number>{_DECIMAL}(?:[eE][+-]?\d+)?)|(?P<name>\\?[a-zA-Zπ]+)|(?P<sign>\S))", re.ASCII)
_MIXED = re.compile(r"(?<![\w.,)}\]^/*])(\d+) (\d+) ?/ ?(\d+)(?![\d.,])")


def evaluate(text: str, base: float = math.e) -> Value:
    """The value of tidied `text`.

    Args:
        base: of a `log` or `lg` that names none.

    Raises:
        Unreadable: it is no number of ours.
    """
    if len(text) > LONGEST:
        raise Unreadable("too long")
    if literal := _LITERAL.fullmatch(text):
        return _literal(literal)
    parser = _Parser(_MIXED.sub(_mixed, text), base)
    try:
        number = parser.sum()
        finite = math.isfinite(float(number))
    except (OverflowError, ZeroDivisionError) as error:
        raise Unreadable(str(error)) from error
    if parser.token is not None or not finite:
        raise Unreadable("not read to its end, or not finite")
    return Value(number)


def _literal(literal: re.Match[str]) -> Value:
    whole, point, decimals = literal["digits"].replace(",", "").partition(".")
    exponent = int((literal["e"] or literal["braced"] or literal["plain"] or "0").replace(" ", ""))
    if abs(exponent) > _LARGEST_EXPONENT:
        raise Unreadable("out of range")
    places = exponent - len(decimals) - (2 if literal["percent"] else 0)
    step = Fraction(10) ** places
    number = int(literal["sign"] + whole + decimals) * step
    rounded = point or literal["percent"] or literal["e"] or literal["braced"] or literal["plain"]
    return Value(number, step, len((whole + decimals).lstrip("0"))) if rounded else Value(number)


def _mixed(match: re.Match[str]) -> str:
    whole, above, below = (int(group[:30]) for group in match.groups())
    return f"({whole}+{above}/{below})" if 0 < above < below else match[0]


def _bounded(number: Fraction | float) -> Fraction | float:
    """`number`, in floating point if its fraction has grown large."""
    if isinstance(number, Fraction) and _bits(number) > _MOST_BITS:
        return float(number)
    return number


def _bits(number: Fraction) -> int:
    return number.numerator.bit_length() + number.denominator.bit_length()


class _Parser:
    """Recursive descent over one expression; `token` is the next one, None at the end."""

    def __init__(self, text: str, base: float) -> None:
        self.base = base
        self.tokens = [(str(match.lastgroup), match[match.lastgroup or 0]) for match in _TOKEN.finditer(text)]
        self.place = 0
        self.depth = 0

    @property
    def token(self) -> str | None:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else None

    @property
    def kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else "end"

    def take(self, *expected: str) -> bool:
        """Whether the next token is one of these; it is passed over then."""
        found = self.token in expected
        self.place += found
        return found

    def demand(self, expected: str) -> None:
        if not self.take(expected):
            raise Unreadable(f"{expected} expected, not {self.token}")

    def sum(self) -> Fraction | float:
        number = self.product()
        while self.token in ("+", "-"):
            sign = -1 if self.take("-") else 1
            self.take("+")
            number = _bounded(number + sign * self.product())
        return number

    def product(self) -> Fraction | float:
        number = self.signed()
        while True:
            if self.take("*"):
                number = _bounded(number * self.signed())
            elif self.take("/"):
                number = _bounded(number / self.signed())
            elif self.kind == "name" or self.token in ("(", "{"):  # 2 log 3, 2(1/3), 3 sqrt(2)
                number = _bounded(number * self.power())
            else:
                return number

    def signed(self) -> Fraction | float:
        negative = False
        while self.token in ("+", "-"):
            negative ^= self.take("-") or not self.take("+")
        number = self.power()
        return -number if negative else number

    def power(self) -> Fraction | float:
        number = self.atom()
        if self.take("^"):
            number = _power(number, self.exponent())
        while self.take("%"):
            number = number / 100
        return number

    def exponent(self) -> Fraction | float:
        self.deeper()
        number = self.signed()  # to the right first: 2^3^2 is 2^9
        self.depth -= 1
        return number

    def atom(self) -> Fraction | float:
        if self.kind == "number":
            return self.number()
        for opening, closing in (("(", ")"), ("{", "}"), ("[", "]")):
            if self.take(opening):
                self.deeper()
                number = self.sum()
                self.depth -= 1
                self.demand(closing)
                return number
        name = self.token if self.kind == "name" else None
        if name is None:
            raise Unreadable(f"number expected, not {self.token}")
        self.place += 1
        self.deeper()
        number = self.named(name)
        self.depth -= 1
        return number

    def number(self) -> Fraction | float:
        text = (self.token or "").replace(",", "")
        _, _, exponent = text.lower().partition("e")
        if len(exponent) > 4 or abs(int(exponent or 0)) > _LARGEST_EXPONENT:
            raise Unreadable("out of range")
        self.place += 1
        whole = "." not in text and not exponent
        number = Fraction(text if text[0] != "." else "0" + text)
        if whole and self.token == "\\frac":  # 2\frac{1}{2} is a mixed number, 2\frac{3}{2} a product
            part = self.atom()
            return number + part if isinstance(part, Fraction) and 0 < part < 1 else number * part
        if self.kind == "number":
            raise Unreadable("two numbers side by side")
        return number

    def named(self, name: str) -> Fraction | float:
        if name == "π" or name == "pi":
            return math.pi
        if name == "e":
            return math.e
        if name == "\\frac":
            above = self.group()
            return above / self.group()
        if name == "sqrt":
            degree: Fraction | float = Fraction(2)
            if self.take("["):
                degree = self.sum()
                self.demand("]")
            return _power(self.argument(), 1 / degree)
        if name == "exp":
            return math.exp(self.argument())
        if name in ("log", "lg", "ln"):
            base: Fraction | float = math.e if name == "ln" else self.base
            if name == "log" and self.take("_"):
                base = self.group() if self.token == "{" else self.atom_of_base()
            return _logarithm(self.argument(), base)
        raise Unreadable(f"unknown name {name}")

    def group(self) -> Fraction | float:
        if self.token != "{":
            raise Unreadable("braces expected")
        return self.atom()

    def atom_of_base(self) -> Fraction | float:
        """The base in `log_2 3`; of `log_23` nobody can tell."""
        if self.kind == "number":
            number = Fraction((self.token or "").replace(",", ""))
            if number not in (2, 3, 10) and self.tokens[self.place + 1 : self.place + 2]:
                raise Unreadable("base not set apart")
            self.place += 1
            return number
        return self.atom()

    def argument(self) -> Fraction | float:
        """What a function is taken of; `log 1/2` is left unread, as it means one thing to one person."""
        bracketed = self.token in ("(", "{", "[")
        number = self.power() if not bracketed else self.atom()
        if self.token == "^" or (not bracketed and self.token == "/"):
            raise Unreadable("argument not set apart")
        return number

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("nested too deep")


def _power(number: Fraction | float, exponent: Fraction | float) -> Fraction | float:
    if isinstance(number, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1 and abs(exponent) * _bits(number) < _MOST_BITS:
            return number**exponent.numerator
        if exponent.denominator == 2 and exponent.numerator == 1 and number >= 0:
            root = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
            if root * root == number:
                return root
    try:
        return math.pow(number, exponent)
    except ValueError as error:
        raise Unreadable(str(error)) from error


def _logarithm(number: Fraction | float, base: Fraction | float) -> float:
    try:
        if base == 2:
            return math.log2(number)
        return math.log10(number) if base == 10 else math.log(number) / math.log(base)
    except ValueError as error:
        raise Unreadable(str(error)) from error
