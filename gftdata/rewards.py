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
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from gftdata.answers import chosen_letter, is_no_claim, last_number, marked_answer, other_scale, without_grouping
from gftdata.errors import UserError
from gftdata.evaluated import answer_is_harmless, entry_is_harmless
from gftdata.types import Prompt, Verdict

Reward = Callable[[Prompt, str], Verdict | float | int | bool | None]

RIGHT = Verdict(1.0, "ok")
WRONG = Verdict(0.0, "ok")
NO_GROUND_TRUTH = Verdict(None, "no_ground_truth")
BAD_GROUND_TRUTH = Verdict(None, "error:unparsable_ground_truth")
FLOAT32_MAX = 3.4028234e38  # rewards are stored as float32


def _own_words(prompt: Prompt, text: str) -> str:
    """`text` without a verbatim copy of the question at its start: what the question says is not an answer."""
    return text.strip().removeprefix(prompt.messages[-1].content.strip() if prompt.messages else "")


def numeric(prompt: Prompt, text: str) -> Verdict:
    """1 when the last number of `text` equals the ground truth's, compared exactly; see `last_number`."""
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    gold = last_number(prompt.ground_truth)
    if gold is None:
        return BAD_GROUND_TRUTH
    words = _own_words(prompt, text)
    answer = last_number(words)
    if answer is None or other_scale(prompt.ground_truth, words):
        return WRONG
    return RIGHT if Fraction(answer) == Fraction(gold) else WRONG


def exact(prompt: Prompt, text: str) -> Verdict:
    """1 when text and ground truth are the same string, white space at both ends aside."""
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    return RIGHT if text.strip() == prompt.ground_truth.strip() else WRONG


_GOLD_LETTER = re.compile(r"\(?([A-Ja-j])[).:]*")


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

    gold = without_grouping(ground_truth.rpartition("####")[2].strip())
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

    A text that ends in `#### <answer>` and has no box is judged by that alone, where it can be read. An answer that
    cannot be parsed or compared is wrong. No time limit of its own: run it in `judging.judge_pool`.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody limits the time: the pool does
    if prompt.ground_truth is None:
        return NO_GROUND_TRUTH
    gold = _parse_gold(prompt.ground_truth)
    if gold is None:
        return BAD_GROUND_TRUTH
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    words = _own_words(prompt, text)
    if other_scale(prompt.ground_truth, words) or is_no_claim(prompt.ground_truth, words):
        return WRONG
    words = without_grouping(words)
    try:
        # of a whole solution, what follows the word `answer` would come first: "He answered 7 questions ... #### 35"
        marked = marked_answer(words)
        answer = parse(marked, config, parsing_timeout=None, raise_on_error=True) if marked else []
        answer = answer or parse(words, config, parsing_timeout=None, raise_on_error=True)
        return RIGHT if verify(list(gold), answer, timeout_seconds=None, raise_on_error=True) else WRONG
    except MemoryError:
        raise
    except Exception:  # the ground truth has been compared with itself, so this is the answer's doing
        return WRONG


def reasoning_gym(prompt: Prompt, text: str) -> Verdict:
    """The score (0 to 1) of the reasoning-gym task that made the prompt, for the last `<answer>` or the whole text.

    Expects `{"reasoning_gym": {"task": name, "entry": {question, answer, metadata}}}` in `prompt.extra`. Some tasks
    run the answer through Python's `eval`: one that is more than numbers, symbols and functions is wrong.
    """
    try:
        source = json.loads(prompt.extra)["reasoning_gym"]
        task, entry, expected = str(source["task"]), dict(source["entry"]), source["entry"]["answer"]
    except (ValueError, KeyError, TypeError):
        return Verdict(None, "error:no_reasoning_gym_entry")
    if (score := _gym_scorer(task)) is None:
        return Verdict(None, "error:unknown_reasoning_gym_task")
    if not entry_is_harmless(task, entry):
        return Verdict(None, "error:reasoning_gym_entry_is_no_expression")
    if expected is not None and score(answer=expected, entry=entry) != 1:
        entry = _with_tuples(entry)  # JSON has made lists of tuples, and some tasks (arc_agi, rearc) compare them
        if score(answer=expected, entry=entry) != 1:
            return Verdict(None, "error:reasoning_gym_entry_rejects_its_own_answer")
    before, closing, _ = text.rpartition("</answer>")
    answer = (before.rpartition("<answer>")[2] if closing and "<answer>" in before else text).strip()
    if not answer or not answer_is_harmless(task, answer, expected):  # some tasks credit any string
        return WRONG
    try:
        return _as_verdict(score(answer=answer, entry=entry))
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
