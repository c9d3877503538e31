"""What a log file says while a comparison runs."""

import io

import pytest
from rich.console import Console

from gftcli import progress
from gfttrain.evaluate import Event


def test_what_an_evaluation_is_doing_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    told = io.StringIO()
    with progress.comparison(Console(file=told, width=120)) as listeners:
        listeners.on_eval(Event("anew", "sums", note="`seed` was 0 and is now 1"))
        listeners.on_eval(Event("there", "words"))
        listeners.on_eval(Event("benchmark", "sums", count=1000, done=10))
        listeners.on_eval(Event("sample", "sums", tokens=3))
        listeners.on_eval(Event("reference", "sums", count=900))
    lines = [line.removeprefix(": ") for line in told.getvalue().splitlines()]
    assert lines == [
        "note: sums begins anew, and the samples there go: `seed` was 0 and is now 1",
        "words: already there",
        "sums: 10 of 1,000 samples",
        "sums: 11 of 1,000 samples",
        "sums: scoring 900 samples with the reference",
    ]
