"""lm-evaluation-harness's own graders on the answers of `graders.py`, which starts this in an environment that has it.

    .venv-trl/bin/python benchmarks/peer_graders.py < ANSWERS     # JSON lines of {"ground_truth", "text"}

Prints a JSON object of verdicts for each line. Imports nothing of ours. `gsm8k strict` and `gsm8k flexible` are the two
filters of its task gsm8k with that task's exact match, as its gsm8k.yaml has them; `hendrycks_math` is that task's
is_equiv on its own reading of the last box. Its tasks are loaded by file: their package imports what nobody needs here.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from lm_eval.filters.extraction import RegexFilter

TASKS = Path(RegexFilter.__init__.__code__.co_filename).parents[1] / "tasks"


def hendrycks_math() -> Any:
    spec = importlib.util.spec_from_file_location("hendrycks_math_utils", TASKS / "hendrycks_math" / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gsm8k() -> dict[str, Callable[[str, str], bool]]:
    """Its filters by name: (ground truth, text) -> right."""
    task = yaml.safe_load((TASKS / "gsm8k" / "gsm8k.yaml").read_text())
    ignored = task["metric_list"][0]["regexes_to_ignore"]

    def normal(text: str) -> str:
        for pattern in ignored:
            text = re.sub(pattern, "", text)
        return text.lower()

    def grader(extract: RegexFilter) -> Callable[[str, str], bool]:
        return lambda truth, text: normal(extract.apply([[text]], [])[0][0]) == normal(truth)

    found = {}
    for one in task["filter_list"]:
        options = {key: value for key, value in one["filter"][0].items() if key != "function"}
        found[f"gsm8k {one['name'].partition('-')[0]}"] = grader(RegexFilter(**options))
    return found


def main() -> None:
    math, graders = hendrycks_math(), gsm8k()

    def equivalent(truth: str, text: str) -> bool:
        box = math.last_boxed_only_string(text)
        try:
            return box is not None and bool(math.is_equiv(math.remove_boxed(box), truth))
        except AssertionError:  # remove_boxed's own check, of a box that it cannot open
            return False

    graders["hendrycks_math"] = equivalent
    for line in sys.stdin:
        answer = json.loads(line)
        print(json.dumps({name: right(answer["ground_truth"], answer["text"]) for name, right in graders.items()}))


if __name__ == "__main__":
    main()
