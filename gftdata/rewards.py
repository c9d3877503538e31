"""Rewards: a reward is a function `(Prompt, text) -> Verdict` that says how good one response is.

Built-in ones are in BUILTIN; anything else is named `pkg.mod:function` and may also return a number, a bool or None.
Nothing here limits time or memory: `judging.py` runs rewards in processes that can be killed.
"""

import difflib
import functools
import importlib
import json
import logging
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from gftdata.errors import UserError
from gftdata.types import Prompt, Verdict

Reward = Callable[[Prompt, str], Verdict | float | int | bool | None]

RIGHT = Verdict(1.0, "ok")
WRONG = Verdict(0.0, "ok")
NO_GROUND_TRUTH = Verdict(None, "no_ground_truth")
BAD_GROUND_TRUTH = Verdict(None, "error:unparsable_ground_truth")
FLOAT32_MAX = 3.4028234e38  # rewards are stored as float32
MAX_DIGITS, MAX_EXPONENT_DIGITS = 4000, 4  # int() refuses 4301 digits, and no answer has that many


def _own_words(prompt: Prompt, text: str) -> str:
    """`text` without a verbatim copy of the question at its start: what the question says is not an answer."""
    return text.strip().removeprefix(prompt.messages[-1].content.strip() if prompt.messages else "")


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


def _pick(text: str, *, fractions: bool, first: bool = False) -> Decimal | Fraction | None:
    """The last (or first) number of `text`; superscripts and subscripts (`m^2`, `a_{10}`) are not numbers."""
    chosen = None
    found = _FRACTION_OR_NUMBER_RE.finditer(_SLASH_RE.sub(r"\\frac{\1}{\2}", text)) if fractions else None
    for match in found or _NUMBER_RE.finditer(text):
        if not match.string[max(match.start() - 2, 0) : match.start()].endswith(("^", "_", "^{", "_{")):
            chosen = match
            if first:
                break
    return None if chosen is None else _value(chosen)


def last_number(text: str) -> Decimal | Fraction | None:
    r"""The number a text ends in: in the last `\boxed{}`, else after the last `####`, else the last one of all.

    Fractions of integers are understood in a box, after `####` and as the whole text. None when there is no number or
    it has over 4,000 digits or 4 exponent digits. Linear in the length of the text.
    """
    boxed = last_boxed(text)
    if boxed is not None and (value := _pick(boxed, fractions=True)) is not None:
        return value
    _, marker, after = text.rpartition("####")
    if marker and (value := _pick(after, fractions=True, first=True)) is not None:
        return value
    return _pick(text, fractions=_FRACTION_ONLY.fullmatch(text.strip()) is not None)


def numeric(prompt: Prompt, text: str) -> Verdict:
    """1 when the last number of `text` equals the ground truth's, compared exactly; see `last_number`."""
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    gold = last_number(prompt.ground_truth)
    if gold is None:
        return BAD_GROUND_TRUTH
    answer = last_number(_own_words(prompt, text))
    return RIGHT if answer is not None and Fraction(answer) == Fraction(gold) else WRONG


def exact(prompt: Prompt, text: str) -> Verdict:
    """1 when text and ground truth are the same string, white space at both ends aside."""
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    return RIGHT if text.strip() == prompt.ground_truth.strip() else WRONG


_GOLD_LETTER = re.compile(r"\(?([A-Ja-j])[).:]*")
_BOXED_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf|mathsf)\s*\{)?[\s(]*([A-J])(?=[).:}\s]|\Z)")
_STATED_LETTER = re.compile(
    r"(?i:answer)\s{0,3}(?i:is|:|=)[\s:*$]{0,9}(?:(?i:option|choice)\s{1,3})?[*$]{0,3}"
    r"(?:\(([A-J])\)|(?:\\(?:text|boxed|mathrm|mathbf)\{)?\(?(?:([A-HJ])(?![\w'\u2019-])|(I)(?=[).,:*$}\n]|\Z)))"
)
_LONE_LETTER = re.compile(r"\(([A-J])\)|(?<![\w'\u2019])([A-J])(?![\w'\u2019])")


def chosen_letter(text: str) -> str | None:
    r"""The option A to J a text settles on: last `\boxed{B}`, else last "answer is B", else last letter on its own.

    A bare A or I in running text is an article or a pronoun: it counts only as the whole text or at its end.
    """
    boxed = last_boxed(text)
    if boxed is not None and (match := _BOXED_LETTER.match(boxed.strip())):
        return match[1]
    if stated := _STATED_LETTER.findall(text):
        return "".join(stated[-1])
    end = len(text.rstrip(" \t\r\n.*)]}$"))
    letters = [m[1] or m[2] for m in _LONE_LETTER.finditer(text) if m[1] or m[2] not in "AI" or m.end() == end]
    return letters[-1] if letters else None


def choice(prompt: Prompt, text: str) -> Verdict:
    """1 when `text` settles on the ground truth's letter (`B` or `(B)`); see `chosen_letter`."""
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    gold = _GOLD_LETTER.fullmatch(prompt.ground_truth.strip())
    if gold is None:
        return BAD_GROUND_TRUTH
    return RIGHT if chosen_letter(_own_words(prompt, text)) == gold[1].upper() else WRONG


_DELIMITED = re.compile(r"\\boxed|\\\(|\\\[|\$[^$]+\$")
_SCIENTIFIC = re.compile(r"^([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})$")
_PROSE = re.compile(r"\n|(?i:\banswer\b)")


@functools.lru_cache(maxsize=256)
def _parse_gold(ground_truth: str) -> tuple[Any, ...] | None:
    """The ground truth as math-verify reads it; None when it cannot be read or does not equal itself."""
    from math_verify import LatexExtractionConfig, parse, verify

    gold = ground_truth.rpartition("####")[2].strip()
    if not _DELIMITED.search(gold):
        if not gold or _PROSE.search(gold):
            return None
        # Never parsed as it stands: math-verify would find the 2 of `2x+3` and the 1.2 of `1,2,3`, and stop there.
        gold = "\\boxed{" + _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", gold).replace("**", "^") + "}"
    try:
        parsed = parse(gold, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None, raise_on_error=True)
        unread = all(isinstance(item, str) for item in parsed)  # it gives back as a string what it cannot parse
        usable = not unread and verify(parsed, parsed, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return None
    return tuple(parsed) if usable else None


def math(prompt: Prompt, text: str) -> Verdict:
    r"""1 when math-verify finds the answer equal to the ground truth: LaTeX (`\boxed{}` first) or a plain expression.

    An answer that cannot be parsed or compared is wrong. No time limit of its own: run it in `judging.judge_pool`.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody limits the time: the pool does
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    gold = _parse_gold(prompt.ground_truth)
    if gold is None:
        return BAD_GROUND_TRUTH
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    try:
        answer = parse(_own_words(prompt, text), config, parsing_timeout=None, raise_on_error=True)
        return RIGHT if verify(list(gold), answer, timeout_seconds=None, raise_on_error=True) else WRONG
    except MemoryError:
        raise
    except Exception:  # the ground truth has been compared with itself, so this is the answer's doing
        return WRONG


def reasoning_gym(prompt: Prompt, text: str) -> Verdict:
    """The score (0 to 1) of the reasoning-gym task that made the prompt, for the last `<answer>` or the whole text.

    Expects `{"reasoning_gym": {"task": name, "entry": {question, answer, metadata}}}` in `prompt.extra`. Some tasks
    run the answer through Python's `eval`: give such a job a sandbox (a container) if the model is not trusted.
    """
    try:
        source = json.loads(prompt.extra)["reasoning_gym"]
        task, entry, expected = str(source["task"]), dict(source["entry"]), source["entry"]["answer"]
    except (ValueError, KeyError, TypeError):
        return Verdict(None, "error:no_reasoning_gym_entry")
    if (score := _gym_scorer(task)) is None:
        return Verdict(None, "error:unknown_reasoning_gym_task")
    if expected is not None and score(answer=expected, entry=entry) != 1:
        entry = _with_tuples(entry)  # JSON has made lists of tuples, and some tasks (arc_agi, rearc) compare them
        if score(answer=expected, entry=entry) != 1:
            return Verdict(None, "error:reasoning_gym_entry_rejects_its_own_answer")
    before, closing, _ = text.rpartition("</answer>")
    answer = (before.rpartition("<answer>")[2] if closing and "<answer>" in before else text).strip()
    try:
        return _as_verdict(score(answer=answer, entry=entry)) if answer else WRONG  # some tasks credit any string
    except Exception as error:
        if isinstance(error, MemoryError) or expected is None:
            raise
        return WRONG  # the entry has been scored with its own answer, so this is the response's doing


@functools.cache
def _gym_scorer(task: str) -> Callable[..., Any] | None:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    return get_score_answer_fn(task) if task in DATASETS else None  # reads the task's data first: seconds for some


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


NEEDS_GROUND_TRUTH = frozenset({"math", "numeric", "exact", "choice"})
BUILTIN: dict[str, Reward]
BUILTIN = {"math": math, "numeric": numeric, "exact": exact, "choice": choice, "reasoning_gym": reasoning_gym}


def _as_verdict(result: object) -> Verdict:
    if isinstance(result, Verdict):
        return result if result.reward is None else _as_verdict(result.reward)
    if result is None:
        return Verdict(None, "error:none")
    if not isinstance(result, Real):
        return Verdict(None, "error:bad_return_type")
    number: Any = result
    return Verdict(float(number), "ok") if abs(number) <= FLOAT32_MAX else Verdict(None, "error:not_finite")


@functools.cache
def resolve(name: str) -> Reward:
    """The reward `name`: built in, or `pkg.mod:function` (current directory first). Raises UserError if not found."""
    if name in BUILTIN:
        return BUILTIN[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        hint = "".join(f"did you mean {near!r}? " for near in difflib.get_close_matches(name, BUILTIN, n=1))
        raise UserError(f"unknown reward {name!r}: {hint}built in: {', '.join(BUILTIN)}; your own: 'pkg.mod:function'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"reward {name!r}: cannot import {module_name!r}, from {here} either ({reason})") from error
    reward: Reward | None = getattr(module, attribute, None)
    if not callable(reward):
        found = type(reward).__name__ if hasattr(module, attribute) else "no such name"
        raise UserError(f"reward {name!r}: expected a function {attribute!r} in {module.__file__}, found {found}")
    return reward


def judge(name: str, prompt: Prompt, text: str) -> Verdict:
    """The verdict of reward `name`; what it raises becomes `error:<class>`. Raises UserError for an unknown name."""
    reward = resolve(name)
    try:
        return _as_verdict(reward(prompt, text))
    except (Exception, SystemExit) as error:
        return Verdict(None, f"error:{type(error).__name__}")
