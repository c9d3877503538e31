"""Our rewards `math` and `numeric` against verdicts that others published with their models' answers.

    python benchmarks/graders.py                                    # downloads what it needs, 17 MB; under a minute
    python benchmarks/graders.py --peer .venv-trl/bin/python        # and those of lm-evaluation-harness
    python benchmarks/graders.py FILE [FILE ...]                    # files of these forms, instead

What is downloaded (`PUBLIC`; into runs/graders, or where --folder says, and checked by sha256) are answers to GSM8K and
MATH with the verdict of their authors' own grader: OpenAI's of 6B and 175B models (MIT), Abel's of 7B to 70B, also to
GSM8K with other numbers, and what MathCoder-L-7B had right by MathCoder's (Apache-2.0). Where there is no way to
GitHub, put the files there under these names. A file of your own has a line {"question", "ground_truth", "response",
"label"} for each answer; `label` is true, false, or null where nobody has judged.

The table counts, for each file and grader, answers that it and the label call right and wrong, those that only one of
them calls right, and those it could not judge. Then every answer is printed about which a reward of ours and the label
disagree, with all verdicts and how it ends, so that one can see who is right. Labels are no truth: MathCoder's grader
takes 1/10 for 11/100, and Abel's does not take `#### 10.` for 10.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, print_end, print_table

RAW = "https://raw.githubusercontent.com"
GPT3 = f"{RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
ABEL = f"{RAW}/GAIR-NLP/abel/3a24ef24e9ea32708fe4fa4c36bf504a74b4bdf0/outputs"
MATHCODER = f"{RAW}/mathllm/MathCoder/d6c91fbd8c02ad9f9669423f4ff331dc1605d126/outs/MathCoder-L-7b/MATH"
PUBLIC = {  # file: (address, sha256)
    "gsm8k-gpt3.jsonl": (
        f"{GPT3}/example_model_solutions.jsonl",
        "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b",
    ),
    "gsm8k-abel-7b.jsonl": (
        f"{ABEL}/gsm8k/7b.jsonl",
        "7a262e37425799300720db1b947e9a7f06b53b4820a355323f5ac297331c783a",
    ),
    "gsm8k-abel-13b.jsonl": (
        f"{ABEL}/gsm8k/13b.jsonl",
        "468ca9dd156162a08afcfab64a8b064b3e72b7784938e7178ecf02c88ca53b1c",
    ),
    "gsm8k-abel-70b.jsonl": (
        f"{ABEL}/gsm8k/70b.jsonl",
        "65824961215beab1dd7fb2a648a04a47333d4acb102c7187ecd1c360e2299cea",
    ),
    "gsm8k-robust-abel-7b.jsonl": (
        f"{ABEL}/gsm8k_robust/7b.jsonl",
        "576798df3ef89d6eec656c353b3de8da0573e22af7d6699831f27c2ab90c2a11",
    ),
    "gsm8k-robust-abel-13b.jsonl": (
        f"{ABEL}/gsm8k_robust/13b.jsonl",
        "d0b49f8cdd8e8aafcaa1e3105d06ac5c40622d50e20530844ec325d38b55d45f",
    ),
    "gsm8k-robust-abel-70b.jsonl": (
        f"{ABEL}/gsm8k_robust/70b.jsonl",
        "28f8f7e89a12b5981989c6f065fcf9e1231e2c4ea9c1b9b89a6d356766fcf444",
    ),
    "math-mathcoder-7b-correct.jsonl": (
        f"{MATHCODER}/MATH_test_result-20230917-2026-correct.jsonl",
        "e728910591b701bfc08e9a3a5a92e34cce662eaec1c722df41461d1aa098baca",
    ),
}
REWARDS = ("math", "numeric")
PEERS = ("gsm8k strict", "gsm8k flexible", "hendrycks_math")
FOR_NUMBERS = ("numeric", "gsm8k strict", "gsm8k flexible")  # not asked where some ground truth is a formula
FOR_FORMULAS = ("hendrycks_math",)
NUMBER = re.compile(r"-?[\d,]+(?:\.\d+)?")
SHOWN = 70  # characters of an answer's end

Verdicts = dict[str, bool | None]  # grader -> right, or None where it could not judge


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered, and whether its publisher calls it right."""

    where: str
    question: str
    ground_truth: str
    text: str
    label: bool | None


def of_gpt3(row: dict[str, Any], where: str) -> Iterator[Answer]:
    """OpenAI's: four models answer a question; solutions end in `A: 18`."""
    truth = row["ground_truth"].rpartition("A:")[2].strip()
    for model, given in row.items():
        if isinstance(given, dict):
            yield Answer(f"{where} {model}", row["question"], truth, given["solution"], given["is_correct"])


def of_abel(row: dict[str, Any], where: str) -> Iterator[Answer]:
    yield Answer(where, row["prompt"], str(row["gold"]), row["response"], row["result"])


def of_mathcoder(row: dict[str, Any], where: str) -> Iterator[Answer]:
    """The texts between the programs; the last is what MathCoder's grader took as the answer. Only right ones."""
    texts = [part["content"] for part in row["debug_result"] if part["role"] == "text"]
    question = row["messages"][-1]["content"][0]["content"]
    solution = "\n".join(texts[:-1] or texts)
    yield Answer(where, question, row["ground_truth"]["answer"], solution, True)


def of_own(row: dict[str, Any], where: str) -> Iterator[Answer]:
    yield Answer(where, row["question"], row["ground_truth"], row["response"], row["label"])


FORMS: dict[str, Callable[[dict[str, Any], str], Iterator[Answer]]] = {  # by a key that only its rows have
    "175b_finetuning": of_gpt3,
    "gold": of_abel,
    "debug_result": of_mathcoder,
    "label": of_own,
}


def read_answers(path: Path) -> list[Answer]:
    """The answers in a file. Ends the program where it has none of the forms."""
    answers: list[Answer] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        form = next((read for key, read in FORMS.items() if key in row), None)
        if form is None:
            sys.exit(f"{path}: line {number}: expected one of the keys {', '.join(FORMS)}, found {', '.join(row)}")
        answers += form(row, f"line {number}")
    if not answers:
        sys.exit(f"{path}: no answers")
    return answers


def download(folder: Path) -> list[Path]:
    """The public files, those that are missing from GitHub."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (address, expected) in PUBLIC.items():
        path = folder / name
        if not path.is_file():
            try:
                with urllib.request.urlopen(address, timeout=60) as answer:
                    content = answer.read()
            except (urllib.error.URLError, TimeoutError) as error:
                sys.exit(f"{address}: {error}; where it can be had, download it as {path}")
            path.write_bytes(content)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            sys.exit(f"{path}: sha256 {found}, expected {expected}: not what {address} was; remove it and try again")
    return [folder / name for name in PUBLIC]


def our_verdicts(answers: Sequence[Answer]) -> list[Verdicts]:
    from gftdata.rewards import judge
    from gftdata.types import Message, Prompt

    found = []
    for answer in answers:
        messages = (Message("user", answer.question),)
        prompt = Prompt("", None, messages, answer.ground_truth, "public", (), "{}", answer.question)
        rewards = {name: judge(name, prompt, answer.text).reward for name in REWARDS}
        found.append({name: None if reward is None else reward == 1.0 for name, reward in rewards.items()})
    return found


def peer_verdicts(python: str, answers: Sequence[Answer]) -> list[Verdicts]:
    """Those of lm-evaluation-harness, by an interpreter that has it. Ends the program where that fails."""
    lines = [json.dumps({"ground_truth": answer.ground_truth, "text": answer.text}) for answer in answers]
    command = [python, str(Path(__file__).with_name("peer_graders.py"))]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\nexit code {done.returncode} of: {' '.join(command)}")
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]  # is_equiv prints warnings
    found: list[Verdicts] = [json.loads(line) for line in printed]
    assert len(found) == len(answers)
    return found


def table_row(name: str, grader: str, answers: Sequence[Answer], verdicts: Sequence[Verdicts]) -> list[str]:
    """One grader against the labels of one file."""
    pairs = [(v[grader], a.label) for v, a in zip(verdicts, answers, strict=True) if a.label is not None]
    count = Counter(pairs)
    unjudged = count[None, True] + count[None, False]
    both = (count[True, True], count[False, False])
    cells = [*both, count[True, False], count[False, True], unjudged]
    return [name, grader, f"{len(pairs):,}", *(f"{n:,}" for n in cells), f"{sum(both) / max(1, len(pairs)):.4f}"]


def shown(verdict: bool | None) -> str:
    return {True: "right", False: "wrong", None: "unjudged"}[verdict]


def print_disagreements(name: str, answers: Sequence[Answer], verdicts: Sequence[Verdicts], asked: set[str]) -> int:
    """Answers about which a reward of ours and the label differ."""
    number = 0
    for answer, found in zip(answers, verdicts, strict=True):
        if answer.label is None or all(found[r] == answer.label for r in REWARDS if r in asked):
            continue
        number += 1
        said = ", ".join(f"{grader} {shown(found[grader])}" for grader in found if grader in asked)
        print(f"\n{name} {answer.where}: label {shown(answer.label)}; {said}")
        print(f"  ground truth {answer.ground_truth!r}, the answer ends in {answer.text.strip()[-SHOWN:]!r}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="instead of the public ones")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "graders", help="where those are, or go")
    parser.add_argument("--peer", help="interpreter that has lm-eval")
    options = parser.parse_args()
    rows, judged = [], []
    for path in options.files or download(options.folder):
        answers = read_answers(path)
        verdicts = our_verdicts(answers)
        if options.peer:
            theirs = peer_verdicts(options.peer, answers)
            verdicts = [{**a, **b} for a, b in zip(verdicts, theirs, strict=True)]
        numbers = all(NUMBER.fullmatch(answer.ground_truth) for answer in answers)
        asked = {*REWARDS, *(PEERS if options.peer else ())} - set(FOR_FORMULAS if numbers else FOR_NUMBERS)
        rows += [table_row(path.stem, grader, answers, verdicts) for grader in verdicts[0] if grader in asked]
        judged.append((path.stem, answers, verdicts, asked))
    header = ("file", "grader", "answers", "both right", "both wrong", "only it", "only label", "unjudged", "agree")
    print_table(header, rows, left=2)
    if not sum([print_disagreements(*one) for one in judged]):
        print("\nNo answer about which our rewards and the labels disagree.")
    print_end("gft-toolkit", "math-verify")


if __name__ == "__main__":
    main()
