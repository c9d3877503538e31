"""Sealed JSON: any change of content is found, and what was never sealed is read as it is."""

import json
from typing import Any

import pytest

from gftdata.errors import UserError
from gftdata.sealed import read_sealed, sealed

DATA: dict[str, Any] = {"a": 1, "b": [1.5, None, "\u00e9"], "c": {"2": True}, "d": (1, 2), "e": {10: "x", 9: "y"}}


def read(content: bytes) -> dict[str, Any]:
    return read_sealed(content, "some/file.json", "a manifest")


def test_what_is_sealed_reads_back_in_any_layout() -> None:
    plain = json.loads(json.dumps(DATA))
    for layout in ({}, {"indent": 2, "sort_keys": True}, {"ensure_ascii": False}):
        assert read(json.dumps(sealed(DATA), **layout).encode()) == plain
    assert read(json.dumps(DATA).encode()) == plain


def test_any_other_content_is_refused() -> None:
    whole = json.dumps(sealed(DATA))
    for old, new in (("1.5", "1.6"), ("null", "true"), ('"a"', '"z"'), ('"x"', '"X"')):
        with pytest.raises(UserError, match=r"^some/file.json: damaged or changed: its checksum"):
            read(whole.replace(old, new).encode())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": Infinity}', "Infinity is no number"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\xff", "not a manifest"),
        (b"[" * 100_000, "not a manifest"),
        (b"", "not a manifest"),
    ],
)
def test_what_is_no_object_of_json(content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=r"some/file.json") as caught:
        read(content)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_number_that_json_has_not_is_not_sealed() -> None:
    with pytest.raises(ValueError):
        sealed({"a": float("nan")})
