"""What pushing to the Hub and pulling from it share: names, listings, what its errors mean.

Credentials come from the environment (HF_TOKEN, or what `hf auth login` has stored) and are in no message. To read a
data set of the Hub without a copy of one's own: locations.py, which says the same of errors.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gftdata.errors import UserError, first_line, quoted
from gftdata.manifest import QUARANTINE
from gftdata.store import FULL, HERE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

CARD, REFUSED = "README.md", f"{QUARANTINE}.jsonl"
REPO = re.compile(r"(?:hf://datasets/)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)")
ASKED_AT_ONCE = 500  # files whose sizes are asked for in one request
SHOWN = 5  # problems that an error names


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress."""

    kind: Literal["verify", "start", "file"]  # start: of the transfer
    name: str = ""
    bytes: int = 0  # start: to transfer; file: of it
    count: int = 0  # start: files to transfer; verify: shards in all


Listener = Callable[[Event], None]


def repo_name(repo: str) -> str:
    """`owner/name`, given so or as hf://datasets/owner/name. Raises UserError."""
    match = REPO.fullmatch(repo.rstrip("/"))
    if match is None:
        raise UserError(f"{repo}: expected owner/name, as in someone/my-groups")
    return match["repo"]


def open_api() -> "HfApi":
    """The Hub's client. Its bars are out of the way of ours, its warnings, with the URLs they quote, are not shown."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    set_verbosity(logging.ERROR)
    return HfApi()


def all_files(api: "HfApi", repo: str, commit: str) -> "dict[str, RepoFile]":
    from huggingface_hub import RepoFile

    listed = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
    return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


def listed_files(api: "HfApi", repo: str, commit: str, names: Sequence[str]) -> "dict[str, RepoFile]":
    """What the Hub's listing says of some files; those that are not there are missing."""
    from huggingface_hub import RepoFile

    listed = (
        entry
        for start in range(0, len(names), ASKED_AT_ONCE)
        for entry in api.get_paths_info(
            repo, list(names[start : start + ASKED_AT_ONCE]), repo_type="dataset", revision=commit
        )
    )
    return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


def failures() -> tuple[type[Exception], ...]:
    """What the Hub's clients raise: their own errors are of these, those of Xet and of uploads are RuntimeErrors."""
    import httpx2

    return OSError, ValueError, httpx2.HTTPError, RuntimeError


@contextmanager
def said_in_one_line(repo: str, command: Literal["push", "pull"], revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into a UserError."""
    try:
        yield
    except failures() as error:
        raise UserError(f"{repo}: {_explained(error, repo, command, revision)}") from None


def not_there(error: Exception, revision: str | None) -> str | None:
    """What to say where the Hub has no such data set or revision; None where it is another error."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no revision {revision} of it"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such data set, or not for you: check the name, and HF_TOKEN where it is private"
    return None


def _explained(error: Exception, repo: str, command: Literal["push", "pull"], revision: str | None) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # which says what was wrong
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if said := not_there(error, revision):
        return said
    if status == 401:
        return "the Hub does not know HF_TOKEN: set it to a token from https://huggingface.co/settings/tokens"
    if status == 403:
        needed = f"may write to {repo.partition('/')[0]}" if command == "push" else "may read it"
        return (
            f"the Hub refuses HF_TOKEN there: expected a token that {needed} (https://huggingface.co/settings/tokens)"
        )
    if status in (409, 412):
        return "it has changed on the Hub meanwhile; look at it there, then give the same command again"
    if status == 429:
        return "the Hub asks to wait: too many requests or commits; give the same command again later, it continues"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"cannot be kept: {first_line(error)}; make room, then give the same command again, it continues"
    if isinstance(error, OSError) and error.errno in HERE:
        return f"the disk here fails: {first_line(error)}; mend that, then give the same command again, it continues"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return f"the Hub has refused it: {' '.join(str(error).split())[:300]}"
    done = "taken" if command == "push" else "given"
    return (
        f"the Hub has not {done} it: {quoted(error)}; check the network, then give the same command again, it continues"
    )
