"""Writes the starter configs of `gft init`: four commented YAML files with the defaults spelled out."""

from importlib.resources import files
from pathlib import Path

from gftdata.errors import UserError

NAMES = ("generate.yaml", "train.yaml", "eval.yaml", "compare.yaml")


def write_starter(folder: Path, *, model: str, prompts: str) -> list[Path]:
    """Write the four files; none is overwritten."""
    targets = [folder / name for name in NAMES]
    for target in targets:
        if target.exists():
            raise UserError(f"{target}: exists already and is not overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        text = files("gftcli.starter").joinpath(target.name).read_text(encoding="utf-8")
        target.write_text(text.replace("{{model}}", model).replace("{{prompts}}", prompts), encoding="utf-8")
    return targets
