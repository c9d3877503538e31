"""JSON files that say of themselves whether they are whole: the key `checksum`, over all the other keys.

What a file holds is its owner's: shards.py (manifest), prepare.py (plan), gfttrain/checkpoint.py (state). One without
the key was written before there was one, and is taken as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from gftdata.errors import UserError, first_line

CHECKSUM = "checksum"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, which JSON can say, with its checksum."""
    plain = json.loads(json.dumps(data, allow_nan=False))  # as it will be read back: lists, and keys that are texts
    return {**plain, CHECKSUM: _checksum(plain)}


def read_sealed(content: bytes, where: str, kind: str) -> dict[str, Any]:
    """The JSON object of these bytes, without its checksum; `where` and `kind` (a manifest) are for errors.

    Raises UserError for what is no JSON object, has a key twice or a number that JSON has not, or was changed.
    """
    try:
        data = json.loads(content, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not {kind}: {first_line(error)[:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: not {kind}: expected a JSON object, found {type(data).__name__}")
    said = data.pop(CHECKSUM, None)
    if said is not None and said != _checksum(data):
        raise UserError(
            f"{where}: damaged or changed: its checksum is not that of its content; restore the file (whoever changed "
            f"it on purpose takes out the key {CHECKSUM})"
        )
    return data


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:40]!r} is there twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
