"""What tells of the machine that made a data set, or opens a door, and must not be in what is shared.

`shareable` and `shown_name` in models.py keep it out when a manifest is made; this is the look before it leaves.
"""

import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET_VARIABLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.I)
SECRET_SETTING = re.compile(r"(?:^|[_-])(?:api_?key|secret|token|password|authorization)$", re.I)
KNOWN_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16}|Bearer \S{8,})")
USER_INFO = re.compile(r"\w+://[^/\s:@]*:(?P<password>[^/\s@]+)@")
URL = re.compile(r"\b(?!(?:hf|s3)://)[A-Za-z][\w+.-]*://")
ABSOLUTE = re.compile(r"(?<![\w<:/~.*)\]}$])/(?:[\w.@+~-]+/)+[\w.@+~-]+|(?<![\w/])~/\w|\b[A-Za-z]:\\\w")
TEXTS = ("template", "system", "stop")  # settings that are words for a model: slashes and URLs there mean nothing here
MIN_SECRET = 8  # characters; shorter ones are in any text by chance
MIN_HOST = 6  # letters of a host's name that has no digit, hyphen or dot: `data` and `train` are other things as well


@dataclass(frozen=True, slots=True)
class Private:
    """What must not leave."""

    secrets: Mapping[str, str]  # where each is -> the secret
    folders: tuple[str, ...]
    hosts: tuple[str, ...]


def private_here(environment: Mapping[str, str]) -> Private:
    """What is private to this machine and user: secrets of the environment, a stored Hub token, folders, host names."""
    from huggingface_hub import get_token

    secrets = {name: value for name, value in environment.items() if SECRET_VARIABLE.search(name)}
    for name, value in environment.items():
        if match := USER_INFO.search(value):
            secrets[f"{name} (its password)"] = match["password"]
    secrets["the Hub token"] = get_token() or ""
    folders = {str(folder) for path in (Path.home(), Path.cwd()) for folder in (path, path.resolve())}
    host = socket.gethostname()
    names = {host, host.partition(".")[0]}
    return Private(
        secrets={name: value for name, value in secrets.items() if len(value) >= MIN_SECRET},
        folders=tuple(sorted(folders - {"/"})),
        hosts=tuple(sorted(n for n in names if n != "localhost" and (len(n) >= MIN_HOST or not n.isalpha()) and n)),
    )


def find_leaks(value: Any, private: Private, key: str = "") -> Iterator[str]:
    """Each place in nested settings that holds something private, as `key: what`, without the private thing itself."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            here = f"{key}.{name}" if key else str(name)
            if isinstance(item, str) and item and SECRET_SETTING.search(str(name)):
                yield f"{here}: a setting that holds a secret"
            elif found := _leak(str(name), private, is_text=False):
                yield f"a key in {key or 'it'}: {found}"
            else:
                yield from find_leaks(item, private, here)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from find_leaks(item, private, f"{key}.{number}")
    elif isinstance(value, str):
        is_text = any(part in TEXTS for part in key.split("."))
        if found := _leak(value, private, is_text=is_text):
            yield f"{key}: {found}"


def _leak(text: str, private: Private, *, is_text: bool) -> str | None:
    if found := find_secret(text, private):
        return found
    if any(_is_in(host, text) for host in private.hosts):
        return "the name of this machine"
    if is_text:
        return None
    if URL.search(text):
        return "a URL"
    if ABSOLUTE.search(text) or (text.startswith("/") and len(text) < 200 and Path(text).exists()):
        return "an absolute path"
    return None


def find_secret(text: str, private: Private) -> str | None:
    """What any text, a card for instance, must not hold: the name of the first secret or folder that is in it."""
    for name, secret in private.secrets.items():
        if secret in text:
            return f"the value of {name}"
    if KNOWN_TOKEN.search(text):
        return "what looks like a token"
    if USER_INFO.search(text):
        return "a password in a URL"
    if any(_is_in(folder, text) for folder in private.folders):
        return "a path of this machine"
    return None


def _is_in(name: str, text: str) -> bool:
    """Whether a path or host name is in a text as a whole."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text, re.I) is not None
