"""The folder of a training run: its names, and what marks it finished.

OUT/run.json        the settings and the exact base model
OUT/metrics.jsonl   a line each step
OUT/checkpoints/    see checkpoint.py
OUT/final/          the trained model: there when, and only when, the run is finished
"""

from pathlib import Path

from gftdata.errors import UserError

FINAL, RUN, METRICS = "final", "run.json", "metrics.jsonl"


def finished_model(model: str) -> str:
    """The trained model of a run folder; any other model as it is. Raises UserError for a run that is not finished."""
    run = Path(model)
    if not (run / RUN).is_file():
        return model
    if not (run / FINAL).is_dir():
        raise UserError(f"{run}: this run of gft train is not finished; give its command again, and it goes on")
    return str(run / FINAL)
