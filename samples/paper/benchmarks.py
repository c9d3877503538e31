"""Write the paper's benchmarks as prompt files for `gft eval` and `gft compare`: a question and its answer a line.

    python samples/paper/benchmarks.py --out runs/paper/benchmarks       # needs the Hub

Each question ends with the paper's instruction. Which copies of the benchmarks the paper used it does not say; these
are the ones most papers use. SAT is not here: no copy of it is the usual one.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

from gftdata.imports import INSTRUCTION
from gftdata.shards import write_atomic

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"


def plain(question: str, answer: str) -> Callable[[Row], dict[str, str]]:
    """Of two columns."""
    return lambda row: {"question": str(row[question]), "answer": str(row[answer])}


def math500(row: Row) -> dict[str, str]:
    return {"question": row["problem"], "answer": row["answer"]}


def olympiad(row: Row) -> dict[str, str]:
    """A question may have several final answers, all of which are asked for."""
    return {"question": row["question"], "answer": ", ".join(row["final_answer"])}


def svamp(row: Row) -> dict[str, str]:
    return {"question": f"{row['Body'].strip()} {row['Question'].strip()}", "answer": str(row["Answer"])}


def mmlu_stem(row: Row) -> dict[str, str]:
    """The choices, lettered, stand in the question; the answer is the letter."""
    choices = "\n".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(row["choices"]))
    return {"question": f"{row['question']}\n{choices}", "answer": LETTERS[row["answer"]]}


# name -> Hub data set, split, what makes a line of a row
BENCHMARKS: dict[str, tuple[str, str, Callable[[Row], dict[str, str]]]] = {
    "amc23": ("math-ai/amc23", "test", plain("question", "answer")),
    "math500": ("HuggingFaceH4/MATH-500", "test", math500),
    "olympiad": ("math-ai/olympiadbench", "test", olympiad),
    "minerva": ("math-ai/minervamath", "test", plain("question", "answer")),
    "mawps": ("MU-NLPC/Calc-mawps", "test", plain("question", "result_float")),
    "svamp": ("ChilleD/SVAMP", "test", svamp),
    "mmlu_stem": ("TIGER-Lab/MMLU-STEM", "test", mmlu_stem),
}


def write(name: str, rows: Any, out: Path) -> Path:
    """OUT/<name>.jsonl. Raises KeyError, naming the benchmark, for rows without the columns that it is known by."""
    _, _, line = BENCHMARKS[name]
    try:
        made = [line(row) for row in rows]
    except KeyError as error:
        raise KeyError(f"{name}: its rows have no column {error}; has the data set changed?") from None
    path = out / f"{name}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    asked = ({**each, "question": f"{each['question']} {INSTRUCTION}"} for each in made)
    write_atomic(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in asked))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    options = parser.parse_args()
    for name in options.only:
        dataset, split, _ = BENCHMARKS[name]
        rows = load_dataset(dataset, split=split)
        print(f"{write(name, rows, options.out)}: {len(rows):,} questions of {dataset}")


if __name__ == "__main__":
    main()
