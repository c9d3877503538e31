"""Answers that are made to hurt the judges or to score without being right, in the pool that judges real ones.

Between them stand honest answers, which must all be judged as if they were alone.
"""

import ast
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from aid import nasty

from gftdata.evaluated import EVALUATED_ANSWERS, EVALUATED_ENTRIES
from gftdata.judging import judge_pool
from gftdata.rewards import judge
from gftdata.types import Message, Prompt, Verdict

PROMISE = "adversarial answers, reward {}: judged or given up, none scores, memory bounded, honest ones unaffected"
TIMEOUT_S, MEMORY_GB, IMPORTS_GB = 4.0, 1.0, 0.75
FOREVER_S = 300.0  # a judgement that has not ended by then is a hang
HONEST = {
    "math": [("42", "so \\boxed{42}"), ("\\frac{1}{2}", "\\boxed{0.5}"), ("x^2-1", "\\boxed{(x-1)(x+1)}")],
    "numeric": [("42", "so \\boxed{42}"), ("1234", "It is 1,234."), ("9 #### 18", "\\boxed{18\\text{ dollars}}")],
    "exact": [("42", " 42\n")],
    "choice": [("B", "\\boxed{B}"), ("C", "The answer is (C)."), ("A", "A")],
}
GIVEN_UP = ("timeout", "error:worker_died", "error:MemoryError", "error:unparsable_ground_truth")


def prompt(ground_truth: str | None, extra: str = "{}") -> Prompt:
    return Prompt("id", None, (Message("user", "What is it?"),), ground_truth, "test", (), extra, "What is it?")


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """GiB that the largest child process held, looked at twenty times a second."""
    peak, stopped = [0.0], threading.Event()

    def look() -> None:
        while not stopped.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                try:
                    peak[0] = max(peak[0], child.memory_info().rss / 2**30)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize(
    ("reward", "sample"), [("math", 48), ("numeric", 120), ("exact", 60), ("choice", 28)], ids=lambda value: str(value)
)
def test_nasty_answers(
    reward: str,
    sample: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rng: Random,
    num_cases: Any,
    tried: Any,
) -> None:
    kinds = (nasty.letters,) if reward == "choice" else nasty.KINDS
    answers = [answer for kind in kinds for answer in kind()]
    assert reward == "choice" or len(answers) > 300
    answers = rng.sample(answers, num_cases(min(sample, len(answers)), len(answers)))
    tried(PROMISE.format(reward), len(answers))
    monkeypatch.chdir(tmp_path)
    honest, judged = HONEST[reward], list[tuple[tuple[str, str], Future[Verdict]]]()
    controls = list[Future[Verdict]]()
    with peak_memory() as peak, judge_pool(reward, timeout_s=TIMEOUT_S, workers=2, memory_gb=MEMORY_GB) as submit:
        for number, (truth, text) in enumerate(answers):
            judged.append(((truth, text), submit(prompt(truth), text)))
            if number % 3 == 0:
                truth, text = honest[number // 3 % len(honest)]
                controls.append(submit(prompt(truth), text))
        verdicts = [(answer, future.result(FOREVER_S)) for answer, future in judged]
        found = [future.result(FOREVER_S) for future in controls]
    for (truth, text), verdict in verdicts:
        said = f"{text[:80]!r} for {truth!r}: {verdict}"
        assert verdict == Verdict(0.0, "ok") or verdict.status in GIVEN_UP, said
    assert found == [Verdict(1.0, "ok")] * len(controls)
    assert peak[0] < MEMORY_GB + IMPORTS_GB
    assert list(tmp_path.iterdir()) == []


CONVENTIONS = [
    ("math", "42", "It's not 42", "of running text the last number is the answer, whatever is said of it"),
    ("numeric", "42", "It's not 42", "of running text the last number is the answer, whatever is said of it"),
    ("math", "42", "41 or 42", "of running text the last number is the answer"),
    ("numeric", "42", "41 or 42", "of running text the last number is the answer"),
    ("choice", "B", "none of B", "of running text the last letter on its own is the answer"),
    ("math", "\\{1,2\\}", "\\boxed{(1,2)}", "math-verify takes a tuple for the set of its elements"),
    ("math", "AB", "\\boxed{BA}", "math-verify takes letters for factors"),
    ("math", "\\frac{1}{3}", "\\boxed{0.333333}", "math-verify compares decimals to six places"),
]


@pytest.mark.parametrize(
    ("reward", "truth", "text"),
    [pytest.param(*case[:3], marks=pytest.mark.xfail(strict=True, reason=case[3])) for case in CONVENTIONS],
)
def test_what_scores_by_convention(reward: str, truth: str, text: str) -> None:
    """Known, and said: should one of these be mended, its mark has to go."""
    assert judge(reward, prompt(truth), text) == Verdict(0.0, "ok")


def gym(task: str, entry: dict[str, Any]) -> Prompt:
    return prompt(None, json.dumps({"reasoning_gym": {"task": task, "entry": entry}}, default=str))


ESCAPES = [
    *dict.fromkeys(text for _, text in nasty.code() if "boxed" not in text),
    "oracle_answer",
    "entry['answer']",
    "valid_solutions",
    "[oracle_answer]",
    "Integral(x, x)",
    "sin('\\145val\\50\"1\"\\51')",
    "sin(eval('1'))",
    "x.subs(x, 1)",
    "(lambda: 1)()",
    "\uff45\uff56\uff41\uff4c('1')",
    "Function('f')(x)",
]


def test_no_answer_and_no_entry_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: Random, num_cases: Any, tried: Any
) -> None:
    """By the scorers of reasoning-gym that call `eval`, or sympy's parser, which is one."""
    import reasoning_gym

    cases = [(task, text) for task in EVALUATED_ANSWERS for text in ESCAPES]
    cases = rng.sample(cases, num_cases(80, len(cases)))
    tried(PROMISE.format("reasoning_gym"), len(cases) + 2 * len(EVALUATED_ENTRIES))
    monkeypatch.chdir(tmp_path)
    entries = {t: reasoning_gym.create_dataset(t, size=1, seed=3)[0] for t in {*EVALUATED_ANSWERS, *EVALUATED_ENTRIES}}
    with judge_pool("reasoning_gym", timeout_s=20.0, workers=2, memory_gb=2.0) as submit:
        wrong = [(task, text, submit(gym(task, entries[task]), text)) for task, text in cases]
        right = [submit(gym(task, entry), str(entry["answer"])) for task, entry in entries.items()]
        hostile = []
        for task, (place, _) in EVALUATED_ENTRIES.items():
            for text in ("__import__('os').system('touch pwned')", "open('pwned', 'w')"):
                entry: dict[str, Any] = json.loads(json.dumps(entries[task], default=str))
                (entry if len(place) == 1 else entry[place[0]])[place[-1]] = text
                hostile.append(submit(gym(task, entry), "1"))
        for task, text, future in wrong:
            verdict = future.result(FOREVER_S)
            assert verdict.status == "ok" and verdict.reward is not None and verdict.reward <= 0.05, (task, text)
        assert [future.result(FOREVER_S) for future in right] == [Verdict(1.0, "ok")] * len(entries)
        refused = Verdict(None, "error:reasoning_gym_entry_is_no_expression")
        assert [future.result(FOREVER_S) for future in hostile] == [refused] * len(hostile)
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_all_scorers_that_evaluate_are_known() -> None:
    """Of the version that is installed: a new one must be looked through before it is taken."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    evaluating = set()
    root = Path(reasoning_gym.__file__).parent
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.value.value for n in ast.walk(tree) if is_dataset_name(n)}
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        scorers = [f for f in functions if f.name in ("score_answer", "verify_solution")]
        if any(evaluates(node) for scorer in scorers for node in ast.walk(scorer)):
            evaluating |= names & set(DATASETS)
    assert evaluating == {*EVALUATED_ANSWERS, *EVALUATED_ENTRIES}


def is_dataset_name(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["DATASET_NAME"]
    )


def evaluates(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    return name in ("eval", "exec", "parse_expr", "sympify", "compile", "S", "simplify_logic", "__import__")
