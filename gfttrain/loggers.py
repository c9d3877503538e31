"""Optional loggers of a run, each a thin call: TensorBoard, Weights & Biases, trackio.

metrics.jsonl is metrics.py's, always written and exact; here its numbers are passed on, without lists and nulls. Each
logger keeps its files in the run folder, unless its own environment variables say otherwise, and those also choose
project, server and mode (WANDB_PROJECT, WANDB_MODE, TRACKIO_PROJECT, TRACKIO_SPACE_ID, ...).

A resumed run goes on as the same run: loggers.json in the run folder holds its id. Steps that are done again, from the
last checkpoint to where the run was killed, replace the old ones in TensorBoard, are ignored by Weights & Biases, and
stand twice in trackio.
"""

import importlib.util
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from gftdata.errors import UserError, first_line
from gftdata.shards import write_atomic

LoggerName = Literal["tensorboard", "wandb", "trackio"]
Numbers = dict[str, float | int]
Log = Callable[[Numbers, int], object]  # the numbers, the step that they are of
Close = Callable[[bool], object]  # whether the run failed

RUN_ID, PROJECT = "loggers.json", "gft"
KEPT = "training goes on, and metrics.jsonl has everything"


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise UserError where the package of a logger is missing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin: a mere folder of that name, such as wandb's own
            raise UserError(f"loggers: {name} is not installed; install it with pip install 'gft-toolkit[{name}]'")


@contextmanager
def open_loggers(
    names: Sequence[LoggerName],
    out: Path,
    run_config: Mapping[str, Any],
    *,
    first_step: int = 0,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that passes one line of metrics, with its `step`, to each logger.

    `first_step` is the number of steps already done. Only one rank of a run may name loggers. Raises UserError where a
    package is missing, and where a logger of a new run cannot start. A logger that fails later, or when a run is
    resumed, costs the run nothing: that is said once through `warn`, and the logger is left out from then on.
    """
    check_loggers(names)
    open_: dict[LoggerName, tuple[Log, Close]] = {}

    def log(metrics: Mapping[str, Any]) -> None:
        step = metrics["step"]
        numbers = {k: v for k, v in metrics.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)}
        for name, (send, _) in list(open_.items()):
            try:
                send(numbers, step)
            except Exception as error:
                del open_[name]
                warn(f"{name} failed at step {step} and gets nothing more: {first_line(error)}; {KEPT}")

    failed = True
    try:
        for name in dict.fromkeys(names):
            try:
                open_[name] = OPENERS[name](out, _run_id(out), run_config, first_step)
            except Exception as error:
                if first_step == 0:
                    problem = f"loggers: {name} does not start: {first_line(error)}"
                    raise UserError(f"{problem}; mend it, or leave {name} out of loggers") from None
                warn(f"{name} does not start and gets nothing: {first_line(error)}; {KEPT}")
        yield log
        failed = False
    finally:
        for name, (_, close) in open_.items():
            try:
                close(failed)
            except Exception as error:
                warn(f"{name} failed at the end of the run: {first_line(error)}; {KEPT}")


def _run_id(out: Path) -> str:
    """`<folder>-<8 hex digits>`. Random, and kept in the folder: one that is deleted and begun anew is another run."""
    path = out / RUN_ID
    if not path.is_file():
        name = re.sub(r"[^A-Za-z0-9_]+", "-", out.resolve().name).strip("-")[:64] or "run"
        write_atomic(path, json.dumps({"run_id": f"{name}-{uuid.uuid4().hex[:8]}"}) + "\n")
    return str(json.loads(path.read_bytes())["run_id"])


def _tensorboard(out: Path, run_id: str, run_config: Mapping[str, Any], first_step: int) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
    writer.add_text("config", f"```json\n{json.dumps(run_config, indent=2)}\n```", first_step)

    def send(numbers: Numbers, step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # its own rhythm of two minutes would lose steps that a checkpoint has

    return send, lambda failed: writer.close()


def _wandb(out: Path, run_id: str, run_config: Mapping[str, Any], first_step: int) -> tuple[Log, Close]:
    import wandb

    given = os.environ.get
    run = wandb.init(
        project=given("WANDB_PROJECT", PROJECT),
        id=given("WANDB_RUN_ID", run_id),
        name=given("WANDB_NAME", run_id),
        dir=given("WANDB_DIR", str(out)),
        config=dict(run_config),
        resume="allow",
        settings=wandb.Settings(console=given("WANDB_CONSOLE", "off")),  # else it wraps stdout, progress bar included
    )
    return run.log, lambda failed: run.finish(exit_code=int(failed))


def _trackio(out: Path, run_id: str, run_config: Mapping[str, Any], first_step: int) -> tuple[Log, Close]:
    os.environ.setdefault("TRACKIO_DIR", str(out.resolve() / "trackio"))  # read once a process, by the import
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = trackio.init(project, name=run_id, config=dict(run_config), resume="allow", embed=False)
    return run.log, lambda failed: run.finish()


OPENERS: dict[LoggerName, Callable[[Path, str, Mapping[str, Any], int], tuple[Log, Close]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
