"""What a text says its answer is: the content of its last box, a number, the letter of an option; linear in its length.

Whether that answer is right is rewards.py's.
"""

import re
from decimal import Decimal
from fractions import Fraction
from itertools import islice

MAX_DIGITS, MAX_EXPONENT_DIGITS = 4000, 4  # int() refuses 4301 digits, and no answer has that many
MAX_EQUATIONS = 32  # in a box: a longer chain has no value
MAX_NUMBERS = 8  # that are looked at where one is wanted


_BRACES = re.compile(r"\\boxed\s*+\{|(?<!\\)[{}]")


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that opens last among those that are closed; one pass."""
    opened: list[int] = []  # of each open brace: where its box's content starts, -1 for a plain brace
    start, end = -1, -1
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if match[0] != "{" else -1)
        elif opened and (content_start := opened.pop()) > start:
            start, end = content_start, match.start()
    return None if end < 0 else text[start:end]


# Possessive quantifiers: nothing is tried in two ways, so a megabyte of digits or blanks takes linear time.
_SIGN = r"(?P<{}>(?<![\d)\]}}])[-\u2212])?"  # directly after a digit or closing bracket it is the operator
_NUMBER = (
    _SIGN.format("sign") + r"(?:\\?\$)?(?P<inner_sign>[-\u2212](?<=\$.))?"
    r"(?P<body>\d{1,3}(?:(?:,|\{,\}|,\\!|\\,)\d{3}(?!\d))++(?:\.\d++)?|\d++(?:\.\d++)?|(?<!\d)\.\d++)"
    r"(?:[eE](?P<exponent>[+-]?\d++))?"
)
_FRACTION = (
    _SIGN.format("fraction_sign") + r"(?:(?P<whole>\d++)\s*+)?\\[dt]?frac\s*+"
    r"\{\s*+(?P<top>-?\d++)\s*+\}\s*+\{\s*+(?P<bottom>-?\d++)\s*+\}"
)
_NUMBER_RE = re.compile(_NUMBER)
_FRACTION_OR_NUMBER_RE = re.compile(f"{_FRACTION}|{_NUMBER}")
_FRACTION_ONLY = re.compile(rf"-?\d++\s*+/\s*+\d++|{_FRACTION}")
_SLASH_RE = re.compile(r"(?<![\d./])(\d++)\s*+/\s*+(\d++)(?![./]?\d)")


def _value(match: re.Match[str]) -> Decimal | Fraction | None:
    found = match.groupdict()
    if found.get("top"):
        parts = found["whole"] or "0", found["top"], found["bottom"]
        if max(map(len, parts)) > MAX_DIGITS or int(parts[2]) == 0:
            return None
        value = int(parts[0]) + Fraction(int(parts[1]), int(parts[2]))
        return -value if found["fraction_sign"] else value
    digits, exponent = re.sub(r"[^\d.]", "", found["body"]), found["exponent"] or "0"
    if len(digits) > MAX_DIGITS or len(exponent.lstrip("+-")) > MAX_EXPONENT_DIGITS:
        return None
    return Decimal(f"{'-' if found['sign'] or found['inner_sign'] else ''}{digits}E{exponent}")


def _found(text: str, *, fractions: bool, first: bool = False) -> re.Match[str] | None:
    """The last (or first) number of `text`; superscripts and subscripts (`m^2`, `a_{10}`) are not numbers."""
    chosen = None
    found = _FRACTION_OR_NUMBER_RE.finditer(_SLASH_RE.sub(r"\\frac{\1}{\2}", text)) if fractions else None
    for match in found or _NUMBER_RE.finditer(text):
        if not _is_script(match):
            chosen = match
            if first:
                break
    return chosen


# In a box: what makes of the number beside it another value, or no single one.
_NOT_ITS_VALUE = re.compile(
    r"[<>\u2260\u2264\u2265\u00b1\u00ac\u221a!]|(?i:\bnot\b)|\d\s*+i(?![a-zA-Z])|(?<=\d)[\u00b2\u00b3\u00b9\u2070-\u2079]"
    r"|[\u00bc-\u00be\u2150-\u215e]|\\(?!"
    r"(?:text|textbf|textit|mathrm|mathbf|mbox|[dt]?frac|left|right|approx|circ|degree|cdot|times|q?quad|displaystyle|boxed)"
    r"(?![a-zA-Z])|[^a-zA-Z])"
)
_SEPARATOR = re.compile(r"(?<!\\)[,;]")  # not a thin space, \,
_POWER = re.compile(r"\s*+\^(?!\s*+\{?\s*+\\circ)")
_ANOTHER = re.compile(r"\s*+(?:[,;]|(?i:and|or)\b)\s*+[-\u2212$\\]{0,3}\d")  # directly after a number
_OR = re.compile(r"(?i:\b(?:and|or)\b)|\\(?:vee|lor|wedge|land)(?![a-zA-Z])|[,;]")
_SCALE = re.compile(r"(?i:\b(hundred|thousand|million|billion|trillion|dozen|percent)s?\b)")


def _value_of_box(boxed: str) -> tuple[bool, Decimal | Fraction | None]:
    """Whether a box holds numbers at all; and its value, where it is one: of a chain of equations the last, if true."""
    parts = [part for part in boxed.split("=") if _NUMBER_RE.search(part)]
    if not parts:
        return False, None
    if _NOT_ITS_VALUE.search(boxed) or len(parts) > MAX_EQUATIONS or (_OR.search(boxed) and len(parts) > 1):
        return True, None
    values = [_only_number(part) for part in parts]
    plain = [value for part, value in zip(parts, values, strict=True) if value is not None and _is_plain(part)]
    if any(Fraction(value) != Fraction(plain[-1]) for value in plain):
        return True, None
    return True, values[-1]


def _is_plain(part: str) -> bool:
    return _FRACTION_OR_NUMBER_RE.fullmatch(part.strip()) is not None


def _only_number(text: str) -> Decimal | Fraction | None:
    """The value of a text with a single number in it, superscripts and subscripts aside."""
    text = _SLASH_RE.sub(r"\\frac{\1}{\2}", text)
    found = [match for match in islice(_FRACTION_OR_NUMBER_RE.finditer(text), MAX_NUMBERS) if not _is_script(match)]
    if len(found) != 1 or _POWER.match(text, found[0].end()):
        return None
    rest = text[: found[0].start()] + text[found[0].end() :]
    return None if _SEPARATOR.search(rest) else _value(found[0])


def _is_script(match: re.Match[str]) -> bool:
    return match.string[max(match.start() - 2, 0) : match.start()].endswith(("^", "_", "^{", "_{"))


def last_number(text: str) -> Decimal | Fraction | None:
    r"""The number a text ends in: in the last `\boxed{}`, else after the last `####`, else the last one of all.

    A box that holds numbers is the answer: one that names several, or a range, or what the answer is not, has no value;
    nor has `#### 12, 13` or `#### 12 or 13`. Fractions of integers are understood in a box, after `####` and as the
    whole text. None when there is no number or it has over 4,000 digits or 4 exponent digits. Linear in the length of
    the text.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        has_numbers, value = _value_of_box(boxed)
        if has_numbers:
            return value
    _, marker, after = text.rpartition("####")
    if marker and (first := _found(after, fractions=True, first=True)) is not None:
        return None if _ANOTHER.match(first.string, first.end()) else _value(first)
    chosen = _found(text, fractions=_FRACTION_ONLY.fullmatch(text.strip()) is not None)
    return None if chosen is None else _value(chosen)


def marked_answer(text: str) -> str | None:
    r"""What a text without a `\boxed{}` ends in after `####`, as GSM8K's solutions do; None where it ends otherwise."""
    _, marker, after = text.rstrip().rpartition("####")
    if not marker or "\n" in after or last_boxed(text) is not None:
        return None
    return after.strip() or None


_GROUPED = re.compile(r"(?<!\\)\{\s*+(\d{1,3}(?:,\d{3})++)\s*+\}")


def without_grouping(text: str) -> str:
    r"""The text with `{5,525}` as `{5525}`: math-verify does not read `\frac{12}{5,525}`, as MATH has it."""
    return _GROUPED.sub(lambda match: "{" + match[1].replace(",", "") + "}", text)


def other_scale(ground_truth: str, text: str) -> bool:
    """Whether the text's last box counts in thousands, say, and the ground truth does not."""
    boxed = last_boxed(text)
    scales = set() if boxed is None else {word.lower() for word in _SCALE.findall(boxed)}
    return not scales <= {"percent", *(word.lower() for word in _SCALE.findall(ground_truth))}


_NEGATION = re.compile(
    r"\\(?:neq?|not|neg|lnot)(?![a-zA-Z])|[\u2260\u00ac]|(?i:\bnot\b)|(?<=\d)[\u00b2\u00b3\u00b9\u2070-\u2079]"
)
_NO_NUMBER = re.compile(r"[<>\u2264\u2265]|\\(?:leq?|geq?|[lg]t|vee|lor|wedge|land|cup|cap)(?![a-zA-Z])")


def is_no_claim(ground_truth: str, text: str) -> bool:
    """Whether the last box says what the answer is not, names a range for a number, or an equation that is not true.

    math-verify reads `\\neq 42`, `> 42`, `41 \\vee 42` and `43 = 42` as 42.
    """
    boxed = last_boxed(text)
    if boxed is None:
        return False
    gold = ground_truth.rpartition("####")[2]
    gold = last_boxed(gold) or gold
    if _NEGATION.search(boxed) and not _NEGATION.search(gold):
        return True
    if _NO_NUMBER.search(boxed) and _is_plain(gold.strip(" $")):
        return True
    parts = boxed.split("=")
    if len(parts) > MAX_EQUATIONS:
        return True
    values = [_only_number(part) for part in parts if _is_plain(part)]
    return len({Fraction(value) for value in values if value is not None}) > 1


_BOXED_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf|mathsf)\s*\{)?[\s(]*([A-J])(?=[).:,/&+}\s]|\Z)")
_STATED_LETTER = re.compile(
    r"(?i:answer)\s{0,3}(?i:is|:|=)[\s:*$]{0,9}(?:(?i:option|choice)\s{1,3})?[*$]{0,3}"
    r"(?:\(([A-J])\)|(?:\\(?:text|boxed|mathrm|mathbf)\{)?\(?(?:([A-HJ])(?![\w'\u2019-])|(I)(?=[).,:*$}\n]|\Z)))"
)
_LONE_LETTER = re.compile(r"\(([A-J])\)|(?<![\w'\u2019])([A-J])(?![\w'\u2019])")

_AND_MORE = re.compile(
    r"[\s).:*}$]{0,9}(?:(?:,|/|&|\\&|\+|(?i:or|and)\b)[\s(*$]{0,9}){1,3}(?:(?i:option|choice)\s{1,3})?(?:\\text\{)?[A-J](?![\w'\u2019])"
    r"|[\s)]{0,3}[\s(]{1,3}[B-HJ](?![\w'\u2019])"
)


def chosen_letter(text: str) -> str | None:
    r"""The option A to J a text settles on: last `\boxed{B}`, else last "answer is B", else last letter on its own.

    A bare A or I in running text is an article or a pronoun: it counts only as the whole text or at its end. A box or a
    statement that goes on to another option (`A or B`, `A, B, C`) settles on none.
    """
    boxed = last_boxed(text)
    if boxed is not None and (match := _BOXED_LETTER.match(boxed.strip())):
        return None if _AND_MORE.match(boxed.strip(), match.end()) else match[1]
    if stated := list(_STATED_LETTER.finditer(text)):
        last = stated[-1]
        return None if _AND_MORE.match(text, last.end()) else "".join(letter or "" for letter in last.groups())
    end = len(text.rstrip(" \t\r\n.*)]}$"))
    letters = [m[1] or m[2] for m in _LONE_LETTER.finditer(text) if m[1] or m[2] not in "AI" or m.end() == end]
    return letters[-1] if letters else None
