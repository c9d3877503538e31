r"""Rows as the usual benchmarks publish them -> `question`, `ground_truth` and `expert`, which prompts.py then reads.

gsm8k: `question`, and `answer`: a worked solution with calculator marks `<<3+4=7>>` that ends in `#### 1,234`
math:  `problem`, `solution` with the answer in `\boxed{...}`, or the answer by itself in `answer` (or both)
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from gftdata.answers import last_boxed
from gftdata.errors import UserError

Format = Literal["gsm8k", "math"]
GROUND_TRUTH, EXPERT_COLUMN = "ground_truth", "expert"  # of a row that was read, beside `question`

_MARKS = re.compile(r"<<[^<>]*>>")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s${}\\]+)")  # `\boxed 2`, as a few solutions of MATH have it


def read_row(name: Format, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with `question`, `ground_truth` and `expert` (null where it has none). Raises UserError."""
    read = {"gsm8k": _gsm8k, "math": _math}[name]
    return {**row, **read(row, where)}


def _gsm8k(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    solution = _text(row, "answer", "gsm8k", where)
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise UserError(
            f"{where}: column `answer`: expected a solution that ends in `#### <answer>` (prompts.format is gsm8k), "
            f"found {solution[-40:]!r}"
        )
    return {
        "question": _text(row, "question", "gsm8k", where),
        GROUND_TRUTH: answer.strip().replace(",", ""),
        EXPERT_COLUMN: _MARKS.sub("", solution),
    }


def _math(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if row.get("solution") is None and row.get("answer") is None:
        raise UserError(f"{where}: neither `solution` nor `answer` (prompts.format is math); it has: {', '.join(row)}")
    solution = None if row.get("solution") is None else _text(row, "solution", "math", where)
    answer = row.get("answer")
    if answer is None and solution is not None:
        answer = boxed_answer(solution)
        if answer is None:
            raise UserError(
                rf"{where}: column `solution`: expected an answer in \boxed{{...}} (prompts.format is math), "
                f"found {solution[-40:]!r}"
            )
    return {"question": _text(row, "problem", "math", where), GROUND_TRUTH: answer, EXPERT_COLUMN: solution}


def boxed_answer(solution: str) -> str | None:
    r"""What is in the last `\boxed{...}` (or `\fbox{...}`) of a solution, braces in it and all; also `\boxed 2`."""
    text = solution.replace(r"\fbox", r"\boxed")
    if (boxed := last_boxed(text)) is not None:
        return boxed.strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1] if bare else None


def _text(row: Mapping[str, Any], column: str, name: Format, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: no column `{column}` (prompts.format is {name}); it has: {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: column `{column}`: expected a text (prompts.format is {name}), found {value!r}")
    return value
