"""What evaluations found, in the folder of a run: written by evaluate.py, read by report.py and compare.py.

RUN/evals.jsonl                    a Result a line, appended as a benchmark is finished; its last line counts
RUN/evals/<benchmark>/             evaluate.py's: every sample with its verdict

A folder of results need not be a run's: the untrained model's results stand in a folder with nothing else in it.
No torch here: a report is made where no model runs.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gftdata.errors import UserError
from gftdata.store import named, read_file

EVALS, EVALS_FOLDER = "evals.jsonl", "evals"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, with a 95 % bootstrap interval over prompts; the bounds are null for a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark, one model. Averages are over prompts with at least one judged sample."""

    benchmark: str
    model: str
    revision: str  # of the model's files, as the manifest of a data set has it
    finished_at: str  # UTC, ISO 8601
    prompts: int
    prompts_too_long: int
    samples_per_prompt: int
    unjudged_samples: int
    truncated_samples: int
    mean_tokens: float
    mean_reward: Estimate
    pass_at: dict[int, Estimate]  # k -> unbiased estimate over prompts with k judged samples; pass_at[1] is avg@n
    greedy: Estimate | None
    entropy: float | None  # nats per token, mean of -log pi over samples of pi itself
    kl: float | None  # KL(model || reference), nats per token, likewise
    settings: dict[str, Any]  # of this benchmark: prompts, reward, sampling, limits, seed


_RESULT = TypeAdapter(Result)


def append_result(run: Path, result: Result) -> None:
    """Add a line to RUN/evals.jsonl, in one write; the torn line that a kill left before it goes."""
    run.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(result), ensure_ascii=False, allow_nan=False) + "\n"
    with named(run / EVALS), (run / EVALS).open("a+b") as file:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_results(run: Path) -> dict[str, Result]:
    """The latest result of each benchmark, in the order in which they were first evaluated; empty without any.

    Raises UserError for a line that is no result; a torn last line is passed over.
    """
    try:
        lines = read_file(run / EVALS).split(b"\n")
    except FileNotFoundError:
        return {}
    found: dict[str, Result] = {}
    torn = len(lines)  # what stands after the last line end
    for number, line in enumerate(lines, 1):
        if number == torn and not line:
            break
        try:
            result = _RESULT.validate_json(line)
        except ValidationError:
            if number == torn:
                break
            raise UserError(f"{run / EVALS}, line {number}: is no result of gft eval; remove the line") from None
        found[result.benchmark] = result
    return found
