"""The samples of a benchmark on disk: what a failing disk must not do to them."""

from pathlib import Path

import pytest

from gfttrain.samples import RECIPE, begin, read_recipe


def test_samples_are_kept_where_their_recipe_cannot_be_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, {"a": 1})
    (tmp_path / "samples.parquet").write_text("samples")

    def fails(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / RECIPE}'"):
            begin(tmp_path, {"a": 1})
    assert read_recipe(tmp_path) == {"a": 1} and (tmp_path / "samples.parquet").exists()
