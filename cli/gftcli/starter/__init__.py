"""Writes the starter configs of `gft init`: four commented YAML files with the defaults spelled out."""

from importlib.resources import files
from pathlib import Path

from gftdata.errors import UserError
from gftdata.shards import write_atomic
from gftdata.store import read_file

NAMES = ("generate.yaml", "train.yaml", "eval.yaml", "compare.yaml")


def write_starter(folder: Path, *, model: str, prompts: str) -> list[Path]:
    """Write the four files, or those that are missing of them; none is overwritten."""
    texts = {folder / name: _filled(name, model, prompts) for name in NAMES}
    there = [target for target in texts if target.exists()]
    for target in there:
        if len(there) == len(texts) or read_file(target).decode(errors="replace") != texts[target]:
            raise UserError(f"{target}: exists already and is not overwritten; name another folder")
    for target, text in texts.items():
        if target not in there:
            write_atomic(target, text)
    return list(texts)


def _filled(name: str, model: str, prompts: str) -> str:
    text = files("gftcli.starter").joinpath(name).read_text(encoding="utf-8")
    return text.replace("{{model}}", model).replace("{{prompts}}", prompts)
