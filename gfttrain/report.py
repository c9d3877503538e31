"""`gft report`: run folders and shards -> one HTML page that needs nothing else.

What is read is curves.py's, examples.py's and results.py's; charts.py says what is drawn, html_page.py makes a page of
it, and how that looks is page/'s. Here the parts are put together, and made to fit.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from gftdata.errors import UserError
from gftdata.shards import check_writable, toolkit_version, write_atomic
from gftdata.store import read_file
from gftdata.types import Response
from gfttrain.charts import fit_curves, weights_data
from gfttrain.config import FilterConfig, ObjectiveConfig
from gfttrain.curves import History, read_history
from gfttrain.examples import MAX_TOKENS, Examples, View, read_examples, score, texts, tokenizer_of, view
from gfttrain.html_page import assemble, to_json, visible
from gfttrain.results import EVALS, Result, read_results
from gfttrain.runs import FINAL, METRICS, RUN

MAX_BYTES = 6_000_000
EXAMPLES_BYTES = 1_700_000  # of MAX_BYTES, at most; curves get what the page and the rest leave
SPARE_BYTES = 20_000
SHOWN_TOKENS = (MAX_TOKENS, 1000, 500, 250, 120, 60)  # of a response; the first that fit
MAX_TOKEN_TEXT = 200
MODELS_OWN = "revision"  # among the settings of a result: of the model that was measured, not of how


@dataclass(frozen=True, slots=True)
class Options:
    """What `gft report` can be told."""

    groups: int = 12  # of each data set
    score: bool = False  # run the trained models over the shown groups
    data: str | None = None  # where the data is now, if not where the runs found it


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder, read."""

    folder: Path
    label: str
    history: History
    results: dict[str, Result]
    config: dict[str, Any]  # of run.json; empty where there is none
    finished: bool


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_report` did."""

    path: Path
    num_bytes: int
    runs: int
    points: int  # drawn of each long curve, at most; 0: all of every curve
    groups: int
    missing: tuple[str, ...]  # what the page does without, and why


def write_report(runs: Sequence[Path], out: Path, options: Options | None = None) -> Written:
    """Write the page, whole or not at all. Raises UserError for a folder with nothing to show."""
    options = options or Options()
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write, as in {out / 'report.html'}")
    check_writable(out.absolute().parent)
    found = read_runs(runs)
    missing: list[str] = []
    examples, views = _examples(found, options, missing)
    data = {
        "toolkit": toolkit_version(),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **_settings(found),
        "benchmarks": _benchmarks(found),
        **_fit_examples(found, examples, views, missing),
        "missing": missing,
        "weights": [weights_data(run.history) for run in found],
    }
    data |= fit_curves([run.history for run in found], MAX_BYTES - SPARE_BYTES - len(assemble(data).encode()))
    page = assemble(data)
    num_bytes = len(page.encode())
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"{len(found)} runs make a page of {num_bytes / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB are written; "
            "name fewer runs"
        )
    write_atomic(out, page)
    num_groups = sum(len(one["groups"]) for one in data["examples"])
    said = tuple(" ".join(visible(reason).split()) for reason in missing)
    return Written(out, num_bytes, len(found), data["points"], num_groups, said)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each once. Raises UserError for one with neither metrics nor results."""
    unique = list({folder.resolve(): folder for folder in folders}.values())
    labels = run_labels(unique)
    runs = []
    for folder, label in zip(unique, labels, strict=True):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run folder")
        history, results = read_history(folder / METRICS), read_results(folder)
        if not history.last_step and not results:
            if any((inner / name).is_file() for inner in folder.iterdir() for name in (METRICS, EVALS)):
                raise UserError(f"{folder}: is no run but holds some; name those to report, as in {folder}/*/")
            raise UserError(
                f"{folder}: nothing to report: no steps in {METRICS}, which gft train writes, and no results in "
                f"{EVALS}, which gft eval writes"
            )
        runs.append(Run(folder, label, history, results, _config(folder), (folder / FINAL).is_dir()))
    return runs


def run_labels(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many parents as it takes to tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    lengths = [1] * len(folders)
    while True:
        labels = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        clashing = [n for n, label in enumerate(labels) if labels.count(label) > 1 and lengths[n] < len(parts[n])]
        if not clashing:
            return labels
        for n in clashing:
            lengths[n] += 1


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_file(folder / RUN))["config"]
        if not isinstance(config, dict):
            raise TypeError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder / RUN}: cannot be read as the settings of a run of gft train") from None
    return config


def _settings(runs: Sequence[Run]) -> dict[str, Any]:
    """The runs, the settings in which they differ and those that they share."""
    flat = [dict(_flat(run.config)) for run in runs]
    known = [settings for settings in flat if settings]
    keys = list(dict.fromkeys(key for settings in known for key in settings if key != "out"))
    absent = object()
    differing = [key for key in keys if any(s.get(key, absent) != known[0].get(key, absent) for s in known)]
    return {
        "runs": [
            {
                "label": run.label,
                "folder": str(run.folder),
                "steps": run.history.last_step,
                "finished": run.finished,
                "seconds": _total(run.history, "seconds"),
                "tokens": _total(run.history, "computed_tokens"),
                "settings": [settings.get(key) for key in differing],
            }
            for run, settings in zip(runs, flat, strict=True)
        ],
        "preferred": _preferred(runs),
        "differing": differing,
        "shared": {key: known[0][key] for key in keys if key not in differing} if known else {},
    }


def _preferred(runs: Sequence[Run]) -> int | None:
    """The run whose groups and weights are shown first: one that does what the method is about, where there is one."""
    trained = [number for number, run in enumerate(runs) if run.config]
    for number in trained:
        objective = runs[number].config.get("objective")
        if isinstance(objective, dict) and objective.get("advantage") == "group":
            tau = objective.get("tau")
            if objective.get("coefficient") == "rectified" and isinstance(tau, float) and 0 < tau <= 1:
                return number
    return trained[0] if trained else None


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _words(value)


def _words(value: Any) -> str:
    """A setting as a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _total(history: History, key: str) -> float | None:
    return float(np.nansum(history.series[key].values)) if key in history.series else None


def _benchmarks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each benchmark with the results of the runs that have it, and the settings in which those differ."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    made = []
    for name in names:
        results = [run.results.get(name) for run in runs]
        settings = [dict(_flat(result.settings)) for result in results if result is not None]
        keys = dict.fromkeys(key for one in settings for key in one if key != MODELS_OWN)
        made.append(
            {
                "name": name,
                "differing": [key for key in keys if len({one.get(key) for one in settings}) > 1],
                "ks": sorted({k for result in results if result is not None for k in result.pass_at}),
                "results": [None if result is None else asdict(replace(result, settings={})) for result in results],
            }
        )
    return made


def _examples(
    runs: Sequence[Run], options: Options, missing: list[str]
) -> tuple[list[Examples], list[tuple[int, int, View]]]:
    """Groups of each data set of the runs, and what each run makes of them: (run, number of the data set, view)."""
    examples: list[Examples] = []
    views: list[tuple[int, int, View]] = []
    trained = [(number, run) for number, run in enumerate(runs) if run.config] if options.groups else []
    by_data = sorted(trained, key=lambda each: _locations(each[1], options))
    for locations, members in groupby(by_data, key=lambda each: _locations(each[1], options)):
        try:
            found = read_examples(locations, options.groups)
        except UserError as error:
            if options.data is not None:  # which somebody has named for this page
                raise
            missing.append(f"groups: {error}")
            continue
        examples.append(found)
        for number, run in members:
            views.append((number, len(examples) - 1, _view(run, found, options, missing)))
    return examples, sorted(views, key=lambda each: each[0])


def _locations(run: Run, options: Options) -> tuple[str, ...]:
    if options.data is not None:
        return (options.data,)
    data = run.config.get("data")
    if not isinstance(data, list) or not all(isinstance(location, str) for location in data):
        raise UserError(f"{run.folder / RUN}: its data is not a list of locations")
    return tuple(data)


def _view(run: Run, examples: Examples, options: Options, missing: list[str]) -> View:
    try:
        objective = ObjectiveConfig.model_validate_json(json.dumps(run.config.get("objective", {})))
        kept = FilterConfig.model_validate_json(json.dumps(run.config.get("filter", {})))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{run.folder / RUN}: objective or filter is not one of this version: {where}: {error.errors()[0]['msg']}"
        ) from None
    made = view(examples, objective, kept)
    if options.score:
        try:
            made = replace(made, logprobs=score(examples, run.folder))
        except UserError as error:
            missing.append(f"log-probs of the trained model: {error}")
    return made


def _fit_examples(
    runs: Sequence[Run], examples: Sequence[Examples], views: Sequence[tuple[int, int, View]], missing: list[str]
) -> dict[str, Any]:
    """Groups with as many tokens of each response as there is room for, then as many groups."""
    vocabularies = [
        _vocabulary([runs[run] for run, of, _ in views if of == number], one, missing)
        for number, one in enumerate(examples)
    ]
    asked = max((len(one.groups) for one in examples), default=0)
    room = [(asked, tokens) for tokens in SHOWN_TOKENS]
    room += [(groups, SHOWN_TOKENS[-1]) for groups in range(asked - 1, -1, -1)]
    for groups, tokens in room:
        made = {
            "examples": [
                _example_data(one, vocabulary, groups, tokens)
                for one, vocabulary in zip(examples, vocabularies, strict=True)
            ],
            "views": [_view_data(run, of, each, groups, tokens) for run, of, each in views],
        }
        if len(to_json(made)) <= EXAMPLES_BYTES:
            break
    if groups < asked:
        missing.append(f"groups: only {groups} of {asked} fit into the page")
    return made | {"shown_tokens": tokens}


def _vocabulary(runs: Sequence[Run], examples: Examples, missing: list[str]) -> dict[int, str]:
    models = [model for run in runs for model in tokenizer_of(run.folder)]
    models += [str(run.config["model"]) for run in runs if "model" in run.config]
    try:
        return texts(examples, list(dict.fromkeys(models)))
    except UserError as error:
        missing.append(f"the text of tokens: {error}")
        return {}


def _example_data(examples: Examples, vocabulary: dict[int, str], groups: int, tokens: int) -> dict[str, Any]:
    chosen = list(zip(examples.groups, examples.places, strict=True))[:groups]
    ids = {int(i) for group, _ in chosen for r in group.responses for i in r.completion.response_ids[:tokens]}
    return {
        "data": list(examples.locations),
        "texts": {str(i): visible(vocabulary[i], MAX_TOKEN_TEXT) for i in sorted(ids) if i in vocabulary},
        "groups": [
            {
                "place": place,
                "prompt": [[message.role, message.content] for message in group.prompt.messages],
                "truth": group.prompt.ground_truth,
                "source": group.prompt.data_source,
                "responses": [_response_data(response, tokens) for response in group.responses],
            }
            for group, place in chosen
        ],
    }


def _response_data(response: Response, tokens: int) -> dict[str, Any]:
    completion, reward = response.completion, response.verdict.reward
    return {
        "source": completion.source,
        "model": completion.model,
        "finish": completion.finish_reason,
        "reward": None if reward is None or not np.isfinite(reward) else reward,
        "status": response.verdict.status,
        "tokens": len(completion.response_ids),
        "ids": _base64(completion.response_ids[:tokens], "<i4"),
        "ref": _base64(response.ref_logprobs[:tokens], "<f4"),
    }


def _view_data(run: int, of: int, each: View, groups: int, tokens: int) -> dict[str, Any]:
    logprobs = None
    if each.logprobs is not None:
        logprobs = [[_base64(row[:tokens], "<f4") for row in rows] for rows in each.logprobs[:groups]]
    return {
        "run": run,
        "data": of,
        "tau": each.tau,
        "rectifies": each.rectifies,
        "advantages": [list(row) for row in each.advantages[:groups]],
        "used": [list(row) for row in each.used[:groups]],
        "logprobs": logprobs,
    }


def _base64(values: npt.NDArray[Any], dtype: str) -> bytes:
    """Exact, and about as long as four digits of text. Bytes, so that it is not taken for somebody's text."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes())
