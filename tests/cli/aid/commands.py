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


def refused(gft: Gft, *arguments: str | Path, saying: tuple[str, ...]) -> None:
    """The command ends with one clear line and exit code 2, and has written nothing."""
    before = tree(Path.cwd())
    result = gft(*arguments)
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.err + result.out
    for words in saying:
        assert words in lines[0], lines[0]
    assert tree(Path.cwd()) == before
