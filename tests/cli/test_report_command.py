"""`gft report` as its user sees it."""

from pathlib import Path

from aid.commands import Gft
from aid.report_runs import write_results, write_run


def test_it_says_what_it_wrote_and_what_is_missing(gft: Gft, tmp_path: Path):
    run = write_run(tmp_path / "run", tmp_path / "gone\x1b[31m")
    base = write_results(tmp_path / "base", 0.5)
    done = gft("report", str(run), str(base), "--out", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert f"page {tmp_path / 'page.html'} (1." in said
    assert "runs 2, with every step of every curve" in said
    assert "without groups: " in said and "no such data set folder" in said and "\x1b" not in done.out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_folder_with_nothing_in_it_is_one_line(gft: Gft, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    done = gft("report", str(tmp_path / "empty"))
    assert done.code == 2 and done.err.startswith(f"error: {tmp_path / 'empty'}: nothing to report")
    assert "metrics.jsonl" in done.err and "evals.jsonl" in done.err and done.err.count("\n") == 1


def test_a_page_is_not_written_over_a_folder(gft: Gft, tmp_path: Path):
    run = write_results(tmp_path / "run", 0.5)
    done = gft("report", str(run), "--out", str(tmp_path))
    assert done.code == 2 and "is a folder; name the file to write" in done.err
