"""Which model exactly: revisions, names, context lengths."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gftdata.errors import UserError
from gftdata.models import context_length, model_revision, shown_name


def test_a_copy_is_the_same_model_and_a_flipped_byte_another(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo / "model", copy)
    before = model_revision(str(copy))
    assert before == model_revision(str(demo / "model"))
    (copy / "tokenizer.json").write_text("{}")
    assert model_revision(str(copy)) == before, "weights and configuration make the model"
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_revision(str(copy)) != before
    shutil.copy(demo / "model" / "model.safetensors", copy)
    assert model_revision(str(copy)) == before
    with (copy / "config.json").open("a") as file:
        file.write(" ")
    assert model_revision(str(copy)) != before


def test_names_that_leave_the_machine_tell_nothing_of_it(tmp_path: Path) -> None:
    for parts, shown in [(("run", "final"), "run/final"), (("demo", "model"), "demo/model"), (("a", "b"), "b")]:
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True)
        assert shown_name(str(folder)) == shown
    assert shown_name("org/name") == "org/name"


def test_context_length(demo: Path, chat_model: Path) -> None:
    assert context_length(str(demo / "model")) == 128
    assert context_length(str(chat_model)) == 256


def test_a_model_that_cannot_be_had_is_the_users_error(
    tmp_path: Path, one_line: Callable[[BaseException], str]
) -> None:
    for ask in (model_revision, context_length):
        with pytest.raises(UserError) as caught:
            ask(str(tmp_path / "none"))
        assert "none" in one_line(caught.value)
        with pytest.raises(UserError) as caught:
            ask("no-such-org/no-such-model")
        assert "no-such-org/no-such-model" in one_line(caught.value)
