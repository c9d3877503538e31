"""The exception that means: the user can mend this. The command line prints it in one line and exits with 2."""

import re


class UserError(Exception):
    """Says what is wrong, where (file, row, key), what was expected and found, and what to do next."""


class OtherRankError(UserError):
    """A UserError that another process of the same run raises as well, and prints."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to be quoted in an error of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def storage_failed(error: OSError) -> str:
    """What to tell the user of a disk or network that fails: on which file, and in the system's words how."""
    where = next((f"{name}: " for name in (error.filename2, error.filename) if name is not None), "")
    said = (error.strerror or first_line(error)).rstrip(".")
    return f"{where}{said}; what was finished is kept: mend that, then give the same command again"


def quoted(error: BaseException) -> str:
    """A library's error in one line, without what a URL in it may hold: a password, a signature."""
    return re.sub(r"\?[^\s'\"]+", "?...", without_password(first_line(error))).rstrip(".")


def without_password(url: str) -> str:
    """A location as it may be shown: without `user:password@`."""
    return re.sub(r"(?<=//)[^/@\s]+@", "", url)
