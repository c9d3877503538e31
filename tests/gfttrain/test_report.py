"""The report's data: what is read, chosen, weighed, cut to fit and made safe. The page itself: tests/browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aid.report_runs import MODEL, metrics_of, odd_data, write_results, write_run
from hypothesis import given
from hypothesis import strategies as st

from gftdata.errors import UserError
from gftdata.locations import open_data, read_index
from gfttrain.advantage import group_advantages
from gfttrain.config import FilterConfig, ObjectiveConfig
from gfttrain.examples import choose_groups, read_examples, score, view
from gfttrain.html_page import PAGE, PLOTLY, to_json, visible
from gfttrain.report import MAX_BYTES, Options, run_labels, write_report

PLOTLY_SHA256 = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"  # of version 4.1.1 on npm


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """A GFT run, an SFT run and the results of the base model."""
    folder = tmp_path_factory.mktemp("runs")
    gft = write_results(write_run(folder / "gft", data), 0.6)
    sft = write_run(folder / "sft", data, seed=1, objective={"sources": ["expert"], "advantage": "one", "tau": 0.0})
    return [gft, write_results(sft, 0.3), write_results(folder / "base", 0.5)]


def test_the_page_holds_what_the_runs_hold(tmp_path: Path, runs: list[Path], data: Path):
    out = tmp_path / "report.html"
    written = write_report(runs, out, Options(groups=5))
    assert written.runs == 3 and written.groups == 5 and written.points == 0 and not written.missing
    assert written.num_bytes == out.stat().st_size < MAX_BYTES
    page = data_of(out)

    assert [run["label"] for run in page["runs"]] == ["gft", "sft", "base"]
    assert [run["steps"] for run in page["runs"]] == [5, 5, 0]
    assert page["differing"] == ["objective.sources", "objective.advantage", "objective.tau"]
    assert page["runs"][1]["settings"] == ["expert", "one", "0.0"] and page["runs"][2]["settings"] == [None] * 3
    assert page["shared"]["optim.lr"] == "1e-06"

    curve = page["series"][1]["grad_norm"]
    expected = [metrics_of(step, 1)["grad_norm"] for step in range(1, 6)]
    assert np.cumsum(curve["x"]).tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(curve["y"], expected, rtol=1e-5)
    assert curve["table"]["last"] == [5, expected[-1]]
    assert curve["table"]["highest"] == [1 + int(np.argmax(expected)), max(expected)]
    charted = [name for chart in page["charts"] for name in chart["metrics"]]
    assert set(charted) == set(page["series"][0]) and len(charted) == len(set(charted))
    np.testing.assert_array_equal(
        np.sum(page["weights"][0]["before"], 0), np.sum([metrics_of(s)["weights_before"] for s in range(1, 6)], 0)
    )

    [sums] = page["benchmarks"]
    assert sums["differing"] == []
    assert sums["ks"] == [1, 2, 4] and sums["results"][2]["pass_at"]["1"]["value"] == 0.5
    assert sums["results"][0]["pass_at"]["4"]["low"] == 0.6 + 0.1 - 0.031

    [examples] = page["examples"]
    stored = read_examples([str(data)], 5)
    gft, sft = page["views"]
    for group, shown in zip(stored.groups, examples["groups"], strict=True):
        assert shown["prompt"] == [["user", group.prompt.messages[0].content]]
        for response, card in zip(group.responses, shown["responses"], strict=True):
            np.testing.assert_array_equal(floats(card["ref"]), response.ref_logprobs)
            ids = np.frombuffer(base64.b64decode(card["ids"]), "<i4")
            np.testing.assert_array_equal(ids, response.completion.response_ids)
            text = "".join(examples["texts"][str(i)] for i in ids).removesuffix("<eos>")
            assert text == response.completion.text
    for number, group in enumerate(stored.groups):
        own = group_advantages([r.verdict.reward for r in group.responses])
        np.testing.assert_allclose(gft["advantages"][number], own)
        assert sft["used"][number] == [r.completion.source == "expert" for r in group.responses]
    assert page["preferred"] == 0


def test_without_scoring_nothing_needs_torch(tmp_path: Path, runs: list[Path]):
    program = (
        "import sys; from pathlib import Path; from gfttrain.report import write_report\n"
        f"print(write_report({[str(r) for r in runs]} and [Path(r) for r in {[str(r) for r in runs]}], "
        f"Path({str(tmp_path / 'r.html')!r})).groups)\n"
        "assert not {'torch', 'transformers', 'polars'} & set(sys.modules), 'torch or transformers was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12\n"


def test_the_trained_models_own_log_probs(tmp_path: Path, data: Path):
    run = write_run(tmp_path / "untrained", data)
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match="is not finished"):
        score(read_examples([str(data)], 2), run)
    shutil.copytree(MODEL, run / "final")
    written = write_report([run], tmp_path / "r.html", Options(groups=2, score=True))
    assert not written.missing
    page = data_of(tmp_path / "r.html")
    # a model that did not move gives what is stored
    for rows, group in zip(page["views"][0]["logprobs"], page["examples"][0]["groups"], strict=True):
        for row, response in zip(rows, group["responses"], strict=True):
            np.testing.assert_allclose(floats(row), floats(response["ref"]), atol=2e-4)


def test_a_run_that_cannot_be_scored_is_said(tmp_path: Path, data: Path):
    run = write_run(tmp_path / "run", data)
    shutil.rmtree(run / "final")
    written = write_report([run], tmp_path / "r.html", Options(groups=2, score=True))
    assert written.groups == 2 and "not finished" in written.missing[0]
    assert data_of(tmp_path / "r.html")["missing"] == list(written.missing)


def test_the_same_groups_for_every_run_first_those_with_a_signal(data: Path):
    index = read_index(open_data(str(data)).shards)
    chosen = choose_groups(index, 12)
    assert len(set(chosen)) == 12 and chosen == choose_groups(index, 12)
    signal = [bool(group_advantages(index.rewards[index.offsets[g] : index.offsets[g + 1]]).any()) for g in chosen]
    assert signal == sorted(signal, reverse=True) and signal[0]
    everything = choose_groups(index, 10_000)
    assert sorted(everything) == list(range(index.num_groups))
    assert choose_groups(index, 0) == ()


def test_advantages_are_those_of_the_objective_and_its_filter(data: Path):
    examples = read_examples([str(data)], 48)
    seen = view(examples, ObjectiveConfig(sources=("self",)), FilterConfig(min_pass=0.5))
    for group, advantages, used in zip(examples.groups, seen.advantages, seen.used, strict=True):
        own = [r.completion.source == "self" for r in group.responses]
        rewards = [r.verdict.reward for r in group.responses]
        passed = np.mean([reward == 1.0 for reward, mine in zip(rewards, own, strict=True) if mine])
        assert list(used) == (own if passed >= 0.5 else [False] * len(own))
        if passed >= 0.5:
            np.testing.assert_allclose(advantages, group_advantages(rewards, own))


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path):
    paths = [tmp_path / "a" / "gft", tmp_path / "b" / "gft", tmp_path / "sft"]
    assert run_labels(paths) == ["a/gft", "b/gft", "sft"]
    deeper = [tmp_path / "x" / "a" / "gft", tmp_path / "y" / "a" / "gft"]
    assert run_labels(deeper) == ["x/a/gft", "y/a/gft"]


def test_a_run_named_twice_is_there_once(tmp_path: Path, runs: list[Path]):
    again = runs[0].parent / "sft" / ".." / "gft"
    assert write_report([runs[0], again], tmp_path / "r.html").runs == 1


def test_an_unfinished_run_and_torn_last_lines_are_shown(tmp_path: Path, data: Path):
    run = write_results(write_run(tmp_path / "run", data), 0.5)
    shutil.rmtree(run / "final")
    for name in ("metrics.jsonl", "evals.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 6, "benchm')
    write_report([run], tmp_path / "r.html")
    page = data_of(tmp_path / "r.html")
    assert page["runs"][0]["steps"] == 5 and not page["runs"][0]["finished"]
    assert page["benchmarks"][0]["name"] == "sums"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "no such run folder"),
        ("empty", "no steps in metrics.jsonl.*no results in evals.jsonl"),
        ("compared", r"is no run but holds some; name those to report, as in .*/compared/\*/$"),
    ],
)
def test_a_folder_with_nothing_to_show_is_a_mistake(tmp_path: Path, name: str, said: str):
    (tmp_path / "empty").mkdir()
    write_results(tmp_path / "compared" / "base", 0.5)
    with pytest.raises(UserError, match=said):
        write_report([tmp_path / name], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_settings_that_are_none_are_a_mistake(tmp_path: Path, data: Path):
    run = write_run(tmp_path / "run", data)
    settings = json.loads((run / "run.json").read_text())
    for broken, said in [
        ("[]", "cannot be read as the settings"),
        (json.dumps({"config": settings["config"] | {"data": 3}}), "its data is not a list"),
        (json.dumps({"config": settings["config"] | {"objective": {"tau": "x"}}}), "objective or filter .* tau"),
    ]:
        (run / "run.json").write_text(broken)
        with pytest.raises(UserError, match=said):
            write_report([run], tmp_path / "r.html")


def test_numbers_that_json_has_none_of_are_no_obstacle(tmp_path: Path, data: Path):
    run = write_results(write_run(tmp_path / "run", data), 0.5)
    evals = run / "evals.jsonl"
    evals.write_text(evals.read_text().replace('"entropy": 0.2134', '"entropy": NaN'))
    write_report([run], tmp_path / "r.html")
    page = data_of(tmp_path / "r.html")
    assert page["benchmarks"][0]["results"][0]["entropy"] is None


def test_results_that_were_not_measured_alike_are_said(tmp_path: Path):
    one = write_results(tmp_path / "one", 0.5)
    other = write_results(tmp_path / "other", 0.5, settings={"num_samples": 8, "sampling": {"temperature": 1.0}})
    write_report([one, other], tmp_path / "r.html")
    assert data_of(tmp_path / "r.html")["benchmarks"][0]["differing"] == ["num_samples", "sampling.temperature"]


def test_data_out_of_reach_is_said_and_can_be_named(tmp_path: Path, data: Path):
    run = write_run(tmp_path / "run", tmp_path / "moved-away")
    written = write_report([run], tmp_path / "r.html")
    assert written.groups == 0 and "no such data set folder" in written.missing[0]
    assert data_of(tmp_path / "r.html")["series"][0]["loss"]
    assert write_report([run], tmp_path / "r.html", Options(data=str(data))).groups == 12
    with pytest.raises(UserError, match="nowhere: no such data set folder"):  # asked for by hand
        write_report([run], tmp_path / "r.html", Options(data=str(tmp_path / "nowhere")))


def test_a_model_does_not_score_the_tokens_of_another(tmp_path: Path, data: Path):
    run = write_run(tmp_path / "run", data)
    found = read_examples([str(data)], 2)
    shutil.rmtree(run / "final")
    shutil.copytree(MODEL, run / "final")
    assert len(score(found, run)) == 2
    with pytest.raises(UserError, match="not scored: its tokenizer is not that of"):
        score(replace(found, tokenizers=frozenset({"another"})), run)


def test_without_a_tokenizer_the_numbers_are_there(tmp_path: Path, data: Path):
    run = write_run(tmp_path / "run", data)
    shutil.rmtree(run / "final")
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["model"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(settings))
    written = write_report([run], tmp_path / "r.html")
    assert "the text of tokens" in written.missing[0] and written.groups == 12
    assert data_of(tmp_path / "r.html")["examples"][0]["texts"] == {}


def test_long_responses_are_cut_until_the_page_fits(tmp_path: Path, data: Path):
    long = odd_data(data, tmp_path / "long", ["a", "b" * 1_000_000, "c"], [100_000, 40_000])
    run = write_run(tmp_path / "run", long)
    shutil.copy(long / "model" / "tokenizer.json", run / "final" / "tokenizer.json")
    written = write_report([run], tmp_path / "r.html", Options(groups=48))
    assert written.num_bytes < MAX_BYTES
    page = data_of(tmp_path / "r.html")
    response = page["examples"][0]["groups"][0]["responses"][0]
    assert response["tokens"] == 100_000 and len(floats(response["ref"])) == page["shown_tokens"] < 2000
    assert page["examples"][0]["texts"]["1"] == "b" * 200 + "… (1,000,000 characters)"
    assert len(page["examples"][0]["groups"][0]["prompt"][0][1]) < 5000


def test_many_curves_are_thinned_until_the_page_fits(tmp_path: Path):
    run = write_run(tmp_path / "run", None, steps=1)
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(2, 1500):
            noise = {f"m{n}": float(v) for n, v in enumerate(rng.normal(size=300))}
            file.write(json.dumps({"step": step, "loss": 1e6 if step == 777 else 0.1, **noise}) + "\n")
    written = write_report([run], tmp_path / "r.html")
    assert written.num_bytes < MAX_BYTES and written.points
    page = data_of(tmp_path / "r.html")
    assert page["points"] == written.points
    loss = page["series"][0]["loss"]
    assert 1e6 in loss["y"] and np.cumsum(loss["x"])[loss["y"].index(1e6)] == 777


def test_the_charts_library_is_the_one_named():
    assert hashlib.sha256((PAGE / PLOTLY).read_bytes()).hexdigest() == PLOTLY_SHA256
    assert "4.1.1" in (PAGE / "README.md").read_text() and "MIT" in (PAGE / "plotly-LICENSE").read_text()


def test_the_policy_names_the_two_scripts_of_the_page(tmp_path: Path, runs: list[Path]):
    write_report(runs, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and len(scripts) == 2
    assert "default-src 'none'" in policy[1] and "unsafe-eval" not in policy[1]
    [allowed] = re.findall(r"script-src ([^;]*);", policy[1])
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert allowed == " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert "innerHTML" not in scripts[1] and "insertAdjacentHTML" not in scripts[1]


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_json_in_the_page_cannot_leave_its_element(data: Any):
    written = to_json(data)
    assert written.isascii() and not set(written) & set("<>&")
    assert json.loads(written) == data


@given(st.text())
def test_visible_text_steers_nothing(text: str):
    shown = visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    if text.isascii() and text.isprintable():
        assert shown == text


def test_what_turns_text_around_is_named():
    assert visible("a\u202eb\x1b[31m\x00\n") == "a⟨U+202E⟩b⟨U+001B⟩[31m⟨U+0000⟩\n"
    assert visible("x" * 5000) == "x" * 4000 + "… (5,000 characters)"
