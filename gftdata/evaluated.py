"""What scorers of reasoning-gym run through Python's `eval`, and whether a text may go there.

Some tasks evaluate the answer as a list or as an expression (sympy's `parse_expr` is `eval` as well), two of them what
the data says of the task. Nothing that calls, looks up or names anything but numbers, symbols and the functions below
gets so far. How a response is scored is rewards.py's.
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

TRIGONOMETRIC = ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh")
FUNCTIONS = frozenset(
    (*TRIGONOMETRIC, "asin", "acos", "atan", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "abs")
)
_CHARACTERS = re.compile(r"[A-Za-z0-9_\s+\-*/^().,~&|<>]*+")
_FORBIDDEN = re.compile(r"__|\.\s*[A-Za-z_]|\)\s*\(")  # hidden names, attributes, calls of what an expression gives
_CALLED = re.compile(r"([A-Za-z0-9_]+)\s*\(")


def is_literal(text: str) -> bool:
    """Whether Python evaluates the text to a literal, or not at all."""
    try:
        ast.literal_eval(text)
    except SyntaxError:
        return True  # `eval` does not get further either
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_expression(text: str) -> bool:
    """Whether the text is made of numbers, symbols, operators and FUNCTIONS alone."""
    return _calls_only(text, FUNCTIONS)


def _is_solution(text: str) -> bool:
    # as a response, an integral that is left standing would be its own right answer
    return _calls_only(text, FUNCTIONS | {"Integral"})


def _calls_only(text: str, functions: frozenset[str]) -> bool:
    harmless = _CHARACTERS.fullmatch(text) is not None and not _FORBIDDEN.search(text)
    return harmless and functions.issuperset(_CALLED.findall(text))


_Check = Callable[[str], bool]
EVALUATED_ANSWERS: dict[str, _Check] = {
    "binary_matrix": is_literal,
    "n_queens": is_literal,
    "spiral_matrix": is_literal,
    "string_insertion": is_literal,
    "countdown": is_expression,
    "intermediate_integration": is_expression,
    "polynomial_multiplication": is_expression,
    "puzzle24": is_expression,
    "simple_integration": is_expression,
}
EVALUATED_ENTRIES: dict[str, tuple[tuple[str, ...], _Check]] = {  # task: where in its entry, what it may be
    "bitwise_arithmetic": (("metadata", "problem"), is_expression),
    "intermediate_integration": (("metadata", "integrand"), is_expression),
    "number_sorting": (("answer",), is_literal),
    "polynomial_multiplication": (("answer",), is_expression),
    "simple_integration": (("metadata", "integrand"), is_expression),
}


def answer_is_harmless(task: str, answer: str, expected: object) -> bool:
    """Whether the scorer of a task may be given this answer. What is expected is not evaluated: it is compared first.

    A mere name is no literal: `oracle_answer` is what some scorers call the right answer, and would be evaluated to it.
    """
    check = EVALUATED_ANSWERS.get(task)
    return check is None or check(answer) or (check is is_literal and answer == expected)


def entry_is_harmless(task: str, entry: Mapping[str, Any]) -> bool:
    """Whether the scorer of a task may be given this entry."""
    expected = entry.get("answer")
    if isinstance(expected, str) and EVALUATED_ANSWERS.get(task) is is_expression and not _is_solution(expected):
        return False  # it is scored as an answer is
    if task not in EVALUATED_ENTRIES:
        return True
    place, check = EVALUATED_ENTRIES[task]
    value: Any = entry
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value is None or (isinstance(value, str) and check(value))
