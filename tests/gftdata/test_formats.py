r"""GSM8K's and MATH's rows: the answers they are known to have, and that their own experts get the full reward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gftdata.config import GenerateConfig, PromptsConfig, validate_config
from gftdata.errors import UserError
from gftdata.formats import boxed_answer
from gftdata.groups import given_origins
from gftdata.prompts import read_prompts
from gftdata.rewards import judge
from gftdata.types import Prompt

WriteJsonl = Callable[..., Path]
OneLine = Callable[[BaseException], str]

GSM8K = [
    ("Each of 3 boxes has 4 pens. How many?", "3 boxes have 3*4=<<3*4=12>>12 pens.\n#### 12", "12"),
    ("And 1,000 boxes?", "That is 1000*4=$<<1000*4=4000>>4,000\n#### 4,000", "4000"),
    ("Owed?", "It is below zero: 5-7=<<5-7=-2>>-2\n#### -2", "-2"),
]
MATH = [
    ("Half?", r"So it is $\boxed{\frac{1}{2}}$.", None, r"\frac{1}{2}"),
    ("Set?", r"First \boxed{1}, but in the end $\boxed{\left\{x : x^{2} < \sqrt{2}\right\}}$", None,
     r"\left\{x : x^{2} < \sqrt{2}\right\}"),
    ("Bare?", r"We get $\boxed 2$ here", None, "2"),
    ("Frame?", r"We get $\fbox{-7}$", None, "-7"),
    ("Own answer?", r"It is \boxed{4.0}", "4", "4"),
    ("No solution?", None, 204, "204"),
]  # fmt: skip


def prompts(path: Path, name: str, **settings: Any) -> list[Prompt]:
    config = PromptsConfig.model_validate({"path": str(path), "format": name, **settings})
    return list(read_prompts(config, {"expert": (config.expert_column or "", 1)}, needs_ground_truth=True))


def test_gsm8k(write_jsonl: WriteJsonl) -> None:
    found = prompts(write_jsonl({"question": q, "answer": a} for q, a, _ in GSM8K), "gsm8k")
    assert [(p.question, p.ground_truth) for p in found] == [(q, truth) for q, _, truth in GSM8K]
    assert found[0].given[0].text == "3 boxes have 3*4=12 pens.\n#### 12"
    for prompt in found:
        assert "<<" not in prompt.given[0].text
        for reward in ("numeric", "math"):
            assert judge(reward, prompt, prompt.given[0].text).reward == 1.0
            assert judge(reward, prompt, "#### 77").reward == 0.0


def test_math(write_jsonl: WriteJsonl) -> None:
    rows = [{"problem": p, "solution": s, "answer": a, "level": 5} for p, s, a, _ in MATH]
    found = prompts(write_jsonl(rows), "math", columns={"extra": ["level"]}, template="{question} Think.")
    assert [(p.question, p.ground_truth) for p in found] == [(q, truth) for q, _, _, truth in MATH]
    assert [p.messages[-1].content for p in found] == [f"{q} Think." for q, *_ in MATH]
    assert found[0].extra == '{"level": 5}'
    assert [p.given[0].text if p.given else None for p in found] == [s for _, s, _, _ in MATH]
    assert judge("math", found[0], r"\boxed{0.5}").reward == 1.0
    assert judge("math", found[0], r"\boxed{2}").reward == 0.0


def test_a_box_is_found_whole() -> None:
    assert boxed_answer(r"\boxed{a{b{c}}d}") == "a{b{c}}d"
    assert boxed_answer("nothing") is None


def test_what_is_wrong_with_a_row(write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    def said(name: str, row: dict[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            prompts(write_jsonl([row]), name)
        return one_line(caught.value)

    assert "row 1: column `answer`: expected a solution that ends in `#### " in said(
        "gsm8k", {"question": "q", "answer": "42"}
    )
    assert "no column `question` (prompts.format is gsm8k); it has: problem" in said(
        "gsm8k", {"problem": "q", "answer": "#### 4"}
    )
    assert "neither `solution` nor `answer`" in said("math", {"problem": "q"})
    assert r"expected an answer in \boxed{...}" in said("math", {"problem": "q", "solution": "It is 4."})
    assert "no column `problem`" in said("math", {"question": "q", "answer": "4"})


def test_a_format_and_columns_do_not_contradict_each_other() -> None:
    with pytest.raises(UserError, match="format gsm8k reads the columns itself: ground_truth cannot be set"):
        validate_config(PromptsConfig, {"path": "p", "format": "gsm8k", "columns": {"ground_truth": "a"}}, "c")
    with pytest.raises(UserError, match="reuse takes prompts as they are: format"):
        validate_config(PromptsConfig, {"reuse": "d", "format": "math"}, "c")
    with pytest.raises(UserError, match="format is of files"):
        validate_config(PromptsConfig, {"reasoning_gym": {"task": "t"}, "format": "math"}, "c")


def test_generate_takes_the_expert_from_it() -> None:
    settings = {"model": "m", "out": "o", "prompts": {"path": "p.parquet", "format": "gsm8k"}}
    config = validate_config(GenerateConfig, settings, "c")
    assert given_origins(config) == {"expert": ("expert", 1)}
