"""A `gft` command that was run, as its user sees it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Gft = Callable[..., Result]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content's hash; folders too, so that an empty one is seen."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
