"""Data of other programs -> prompts.jsonl and a generate.yaml, from which `gft generate` makes groups.

Two layouts, and the first is the second with more in it: the Parquet files of the paper's authors and those of verl.
Neither has log-probs, so neither is a data set of groups yet: it is judged, sampled and scored first. Of each row, what
a prompt has a place for goes there as it stands; all the rest goes along in `extra`, from where `gft export` to verl
puts it back. The other direction: `exports.py`.
"""

import difflib
import filecmp
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gftdata.errors import UserError
from gftdata.prompts import file_rows, hub_rows
from gftdata.shards import check_writable, write_atomic
from gftdata.store import replacing

LAYOUTS = ("authors", "verl")

PROMPTS, CONFIG = "prompts.jsonl", "generate.yaml"
VERL = "verl"  # the column of what a prompt has no place for: {row, expert, teacher}
ANSWER, MODEL_ANSWER = "extra_info.answer", "extra_info.model_answer"
INDEX, TRUTH = "extra_info.index", "reward_model.ground_truth"
AUTHORS_TEACHERS = 3  # the authors' loader puts `answer` first and takes the first four
INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."  # the paper's


@dataclass(frozen=True, slots=True)
class Places:
    """Where a row keeps the responses it came with; `a.b` is inside a struct."""

    expert: str | None = None  # a text, or a list of them
    teacher: str | None = None  # of a stronger model: a text, or a list of them


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made."""

    prompts: Path
    config: Path
    rows_read: int
    rows: int
    with_expert: int
    teacher_texts: int
    max_teacher_texts: int  # of one row
    instructed: int  # rows whose prompt ends with the paper's instruction
    without_ground_truth: int
    left_out: Mapping[str, int]  # reason -> rows


def import_prompts(
    layout: str,
    source: str,
    out: Path,
    *,
    expert: str | None = None,
    teacher: str | None = None,
    subset: str | None = None,
    split: str = "train",
    model: str = "PATH-OR-HUB-ID",
) -> Imported:
    """Write OUT/prompts.jsonl and OUT/generate.yaml.

    `source` is a .parquet or .jsonl file, a folder that `datasets` loads, or a data set on the Hub. `expert` and
    `teacher` are columns of responses; the authors' layout has extra_info.answer and extra_info.model_answer.
    Raises UserError for a source that cannot be read or lacks a column, and for files that exist. A row that cannot be
    a prompt is left out and counted.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown format {layout!r}: expected {' or '.join(LAYOUTS)}")
    own = Places(ANSWER, MODEL_ANSWER) if layout == "authors" else Places()
    places = Places(expert or own.expert, teacher or own.teacher)
    prompts, config = out / PROMPTS, out / CONFIG
    if config.exists():
        refuse_existing(prompts if prompts.exists() else config)
    check_writable(out)
    rows = file_rows(source, "SOURCE") if Path(source).is_file() else _loaded(source, subset, split)
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    most_texts = 0
    with replacing(prompts) as file:
        for number, row in enumerate(rows, start=1):
            counts["read"] = number
            if number == 1:
                _check_columns(row, places, f"{source}: row 1")
            if reason := unusable(row):
                left_out[reason] += 1
                continue
            made = prompt_row(row, places)
            line = _json_line(made, f"{source}: row {number}")
            if line is None:
                left_out["with half of a surrogate pair in a text"] += 1
                continue
            file.write(line)
            texts = _num_texts(made["teacher"])
            most_texts = max(most_texts, texts)
            counts["rows"] += 1
            counts["expert"] += _num_texts(made["expert"]) > 0
            counts["teacher"] += texts
            counts["instructed"] += made["prompt"][-1]["content"].endswith(INSTRUCTION)
            counts["no truth"] += made["ground_truth"] is None
        if not counts["rows"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
            raise UserError(f"{source}: no row of it can be a prompt ({reasons or 'it has none'})")
        file.flush()
        # the same: left by an import that was cut off before it wrote the config
        if prompts.exists() and not filecmp.cmp(file.name, prompts, shallow=False):
            refuse_existing(prompts)
    imported = Imported(
        prompts=prompts,
        config=config,
        rows_read=counts["read"],
        rows=counts["rows"],
        with_expert=counts["expert"],
        teacher_texts=counts["teacher"],
        max_teacher_texts=most_texts,
        instructed=counts["instructed"],
        without_ground_truth=counts["no truth"],
        left_out=left_out,
    )
    write_atomic(config, config_text(layout, source, imported, places, model))
    return imported


def refuse_existing(path: Path) -> NoReturn:
    raise UserError(f"{path}: exists already and is not overwritten; name another folder (--out)")


def _loaded(source: str, subset: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    if source.endswith((".parquet", ".json", ".jsonl", ".ndjson")):
        raise UserError(f"{source}: no such file")
    return hub_rows(source, subset, split, "SOURCE")


def unusable(row: Mapping[str, Any]) -> str:
    """Why a row cannot be a prompt, as what can be said of several rows; empty where it can."""
    chat = row.get("prompt")
    try:
        whole = bool(chat) and all(isinstance(message["content"], str) and message["role"] for message in chat or ())
    except (TypeError, KeyError):
        whole = False
    if not whole or not isinstance(chat, list) or chat[-1]["role"] != "user":
        return "whose prompt is not a chat of texts that ends with the user's"
    return "" if isinstance(row.get("data_source"), str) else "without the name of a data source"


def prompt_row(row: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """A row of prompts.jsonl; what is moved out of the row is no longer in its `verl.row`.

    A ground truth that is no text becomes JSON, and what the way back could not tell (a ground truth or demonstration
    that is no text, a list of responses with empty ones) stays in the row as well.
    """
    rest = deepcopy(dict(row))
    truth = look(rest, TRUTH)
    if isinstance(truth, str):
        _take(rest, TRUTH)
    made: dict[str, Any] = {
        "id": None if (index := look(rest, INDEX)) is None else str(index),
        "prompt": rest.pop("prompt"),
        "ground_truth": truth if truth is None or isinstance(truth, str) else json.dumps(truth, ensure_ascii=False),
        "data_source": rest.pop("data_source"),
    }
    for name, place in (("expert", places.expert), ("teacher", places.teacher)):
        made[name] = found = None if place is None else look(rest, place)
        of_texts = isinstance(found, list) and all(isinstance(text, str) and text for text in found)
        if place is not None and found and (isinstance(found, str) if name == "expert" else of_texts):
            _take(rest, place)
    return made | {VERL: {"row": rest, "expert": places.expert, "teacher": places.teacher}}


def look(row: Mapping[str, Any], place: str) -> Any:
    """The value at `a.b.c` of nested mappings; None where there is none."""
    value: Any = row
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _take(row: dict[str, Any], place: str) -> None:
    *parents, name = place.split(".")
    for part in parents:
        row = row[part]
    del row[name]


def _num_texts(value: Any) -> int:
    return sum(map(bool, value)) if isinstance(value, list) else int(bool(value))


def _json_line(row: Mapping[str, Any], where: str) -> bytes | None:
    """One line of JSON; None where a text has half of a surrogate pair, which is no character."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return None
    except (TypeError, ValueError) as error:
        columns = [name for name, value in row[VERL]["row"].items() if not _is_json(value)]
        raise UserError(
            f"{where}: column `{', '.join(columns)}` holds what JSON cannot ({error}); drop that column from the source"
        ) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _check_columns(row: Mapping[str, Any], places: Places, where: str) -> None:
    there = list(_columns(row, ""))
    wanted = {"prompt": "", "data_source": "", TRUTH: ""}
    wanted |= {place: f" (--{name})" for name in ("expert", "teacher") if (place := getattr(places, name))}
    for column, option in wanted.items():
        if column not in there:
            near = difflib.get_close_matches(column, there, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has: {', '.join(there)}"
            raise UserError(f"{where}: no column `{column}`{option}; {hint}")


def _columns(value: Mapping[str, Any], before: str) -> Iterator[str]:
    for name, item in value.items():
        yield before + name
        if isinstance(item, Mapping):
            yield from _columns(item, f"{before}{name}.")


def config_text(layout: str, source: str, imported: Imported, places: Places, model: str) -> str:
    """The generate.yaml of an import."""

    def quoted(text: object) -> str:
        return json.dumps(str(text), ensure_ascii=False)  # JSON's strings are YAML's too

    count = min(AUTHORS_TEACHERS, imported.max_teacher_texts)
    out = imported.config.parent
    expert = "    expert: expert\n" if places.expert else ""
    teachers = "  teachers: []\n"
    if count:
        name = "qwen2.5-math-72b" if layout == "authors" else "given"
        teachers = (
            f"  teachers:                       # the file has up to {imported.max_teacher_texts} for a prompt: count "
            "takes the first so many\n"
            f"    - {{name: {name}, column: teacher, count: {count}}}   # the paper: 1 expert + 3 teacher + 4 self\n"
        )
    return f"""\
# gft generate: response groups from {source}, as `gft import {layout}` read it. Try `--dry-run` first.

model: {quoted(model)}  # the model to fine-tune; it draws the self samples
out: {quoted(out / "data")}

prompts:
  path: {quoted(imported.prompts)}
  columns:
    messages: prompt                # as it stands: {imported.instructed:,} of {imported.rows:,} end with the paper's \
instruction
    ground_truth: ground_truth
{expert}    id: id
    data_source: data_source
    extra: [{VERL}]                   # the rest of each row; `gft export --format verl` puts it back
  max_prompt_tokens: 1024

reward: {{name: math}}                # math, numeric, exact, choice, reasoning_gym, or your own pkg.mod:function

responses:
  expert: {{count: {int(bool(places.expert))}}}
{teachers}  self: {{count: 4}}
  max_tokens: 2048                  # samples stop here; a longer given text is left out and counted
"""
