"""The folder of a training run: its names, and what marks it finished.

OUT/run.json        the settings and the exact base model
OUT/metrics.jsonl   a line each step
OUT/checkpoints/    see checkpoint.py
OUT/final/          the trained model: there when, and only when, the run is finished
"""

from pathlib import Path

from gftdata.errors import UserError

FINAL, RUN, METRICS = "final", "run.json", "metrics.jsonl"
LOCK = f".{RUN}.lock"  # held by the process that trains; no part of a run


def run_of(model: str) -> Path | None:
    """The run folder that a model is of: itself, or the one whose final/ it is."""
    folder = Path(model)
    if (folder / RUN).is_file():
        return folder
    return folder.parent if folder.name == FINAL and (folder.parent / RUN).is_file() else None


def finished_model(model: str) -> str:
    """The trained model of a run folder; any other model as it is. Raises UserError for a run that is not finished."""
    run = Path(model)
    if not (run / RUN).is_file():
        return model
    if not (run / FINAL).is_dir():
        raise UserError(f"{run}: this run of gft train is not finished; give its command again, and it goes on")
    return str(run / FINAL)
