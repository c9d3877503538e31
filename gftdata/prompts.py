"""JSONL, Parquet, Hub data sets and task generators -> Prompt, by the field mapping of the config.

Rows are streamed; what is wrong with one is said with its file, row number and column.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from gftdata.config import PromptsConfig
from gftdata.errors import UserError, first_line
from gftdata.formats import GROUND_TRUTH, read_row
from gftdata.quality import Occurrences
from gftdata.reuse import reused_prompts
from gftdata.store import open_store
from gftdata.types import EXPERT, GivenText, Message, Prompt

Row = Mapping[str, Any]


def read_prompts(
    config: PromptsConfig, given: Mapping[str, tuple[str, int]], *, needs_ground_truth: bool
) -> Iterator[Prompt]:
    """Stream the prompts of a source.

    `given` maps a source (`expert`, `teacher:<name>`) to its column, or its source in a reused data set, and the number
    of texts to take from it.
    Raises UserError for a missing file, a missing column, an empty source or a malformed row.
    """
    where, prompts = _open_prompts(config, given)
    empty = True
    with Occurrences() as seen:
        for number, prompt in enumerate(itertools.islice(prompts, config.limit), start=1):
            empty = False
            _check(config, prompt, f"{where}: row {number}", needs_ground_truth)
            digest = _digest(prompt)
            yield _numbered(prompt, digest.hex(), seen.count(digest))
    if empty:
        raise UserError(f"{where}: holds no prompts")


def _check(config: PromptsConfig, prompt: Prompt, where: str, needs_ground_truth: bool) -> None:
    if prompt.ground_truth is None and needs_ground_truth and config.on_missing_ground_truth == "error":
        column = config.columns.ground_truth
        raise UserError(
            f"{where}: no ground truth "
            + (f"in column `{column}`" if column else "(prompts.columns.ground_truth names no column)")
            + ", which the reward needs; set prompts.on_missing_ground_truth=keep to leave its responses unjudged"
        )
    try:
        prompt_to_json(prompt).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a text holds half of a surrogate pair, which is no character") from None


def prompt_to_json(prompt: Prompt) -> str:
    """One line of JSON; the inverse is `prompt_from_json`."""
    return json.dumps(asdict(prompt), ensure_ascii=False)


def prompt_from_json(line: str) -> Prompt:
    """The prompt that `prompt_to_json` wrote."""
    data = json.loads(line)
    data["messages"] = tuple(Message(**message) for message in data["messages"])
    data["given"] = tuple(GivenText(**text) for text in data["given"])
    return Prompt(**data)


def asked_text(prompt: Prompt) -> str:
    """What a prompt asks, without system message and template: what duplicates and contamination are found by."""
    return "\n".join([*(m.content for m in prompt.messages[:-1] if m.role != "system"), prompt.question])


def is_repeated(prompt: Prompt) -> bool:
    """Whether the same messages and ground truth came before in its source."""
    return "-" in prompt.prompt_id


def _open_prompts(config: PromptsConfig, given: Mapping[str, tuple[str, int]]) -> tuple[str, Iterator[Prompt]]:
    if config.reuse is not None:
        return config.reuse, reused_prompts(config.reuse, given)
    where, rows = _open_rows(config)
    return where, (
        _to_prompt(config, given, row, f"{where}: row {number}", where) for number, row in enumerate(rows, start=1)
    )


def _open_rows(config: PromptsConfig) -> tuple[str, Iterator[Row]]:
    if config.path is not None:
        return config.path, file_rows(config.path, "prompts.path")
    if config.dataset is not None:
        return config.dataset, hub_rows(config.dataset, config.subset, config.split, "prompts.dataset")
    assert config.reasoning_gym is not None
    return f"reasoning_gym:{config.reasoning_gym.task}", _reasoning_gym_rows(config)


def file_rows(name: str, key: str) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file, which may be at s3://; `key` is the setting that names it.

    Raises UserError for a missing file and another kind of file, and while reading for a damaged one.
    """
    suffix = PurePosixPath(name).suffix
    if suffix in (".jsonl", ".json", ".ndjson"):
        read = _jsonl_rows
    elif suffix == ".parquet":
        read = _parquet_rows
    else:
        read = None
    if "://" in name and read is not None:
        return _fetched(name, key, read)
    if not Path(name).is_file():
        raise UserError(f"{name}: no such prompt file ({key})")
    if read is None:
        raise UserError(f"{name}: expected a .jsonl or .parquet file ({key})")
    return read(Path(name), name)


def _fetched(name: str, key: str, read: Callable[[Path, str], Iterator[Row]]) -> Iterator[Row]:
    folder, _, file = name.rpartition("/")
    try:
        with open_store(folder).local(file) as local:
            yield from read(local, name)
    except FileNotFoundError:
        raise UserError(f"{name}: no such prompt file ({key})") from None


def _jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{name}: line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{name}: line {number}: expected a JSON object, found {type(row).__name__}")
            yield row


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a Parquet file, or a damaged one: {first_line(error)}") from None


def hub_rows(dataset: str, subset: str | None, split: str, key: str) -> Iterator[Row]:
    """The rows of a data set on the Hub, or of a folder that `datasets` loads. Raises UserError where there is none."""
    import datasets

    try:
        data = datasets.load_dataset(dataset, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{dataset}: cannot load this data set ({key}): {first_line(error)}") from None
    return iter(data)


def _reasoning_gym_rows(config: PromptsConfig) -> Iterator[Row]:
    import reasoning_gym

    task = config.reasoning_gym
    assert task is not None
    try:
        entries = reasoning_gym.create_dataset(task.task, size=task.size, seed=task.seed, **task.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"reasoning_gym task `{task.task}`: {first_line(error)}") from None
    for raw in entries:
        entry = json.loads(json.dumps(raw, default=str))  # some have fractions among what they tell of themselves
        yield {**entry, "reasoning_gym": {"task": task.task, "entry": entry}}


def _to_prompt(
    config: PromptsConfig, given: Mapping[str, tuple[str, int]], row: Row, where: str, origin: str
) -> Prompt:
    columns = config.columns
    if config.format is not None:
        row = read_row(config.format, row, where)
    truth_column = (
        GROUND_TRUTH if config.format else columns.ground_truth or ("answer" if config.reasoning_gym else None)
    )
    extra_columns = (*columns.extra, *(["reasoning_gym"] if config.reasoning_gym else []))
    truth = cell(row, truth_column, where, "prompts.columns.ground_truth") if truth_column else None
    source_id = cell(row, columns.id, where, "prompts.columns.id") if columns.id else None
    texts: list[GivenText] = []
    for source, (column, count) in given.items():
        key = "prompts.columns.expert" if source == EXPERT else "responses.teachers.column"
        texts += [GivenText(source, text) for text in _texts(cell(row, column, where, key), column, where)[:count]]
    extra = {name: cell(row, name, where, "prompts.columns.extra") for name in extra_columns}
    try:
        extra_json = json.dumps(extra, ensure_ascii=False, sort_keys=True)
    except TypeError as error:
        raise UserError(f"{where}: extra columns must be JSON values: {error}") from None
    messages, question = _messages(config, row, where)
    return Prompt(
        prompt_id="",
        source_id=None if source_id is None else str(source_id),
        messages=messages,
        ground_truth=_scalar_text(truth, truth_column, where),
        data_source=_data_source(config, row, where, origin),
        given=tuple(texts),
        extra=extra_json,
        question=question,
    )


def _data_source(config: PromptsConfig, row: Row, where: str, origin: str) -> str:
    if (column := config.columns.data_source) is None:
        return config.data_source or (Path(origin).name if Path(origin).exists() else origin)
    name = cell(row, column, where, "prompts.columns.data_source")
    if not isinstance(name, str):
        raise UserError(f"{where}: column `{column}`: expected the name of a data set, found {name!r}")
    return name


def _messages(config: PromptsConfig, row: Row, where: str) -> tuple[tuple[Message, ...], str]:
    """The prompt's messages, and its question as it was before the template."""
    system = () if config.system is None else (Message("system", config.system),)
    if config.columns.messages is None:
        column = config.columns.question or "question"
        question = cell(row, column, where, "prompts.columns.question")
        if not isinstance(question, str) or not question:
            raise UserError(f"{where}: column `{column}`: expected a question's text, found {question!r}")
        # not str.format: a question or template full of LaTeX has braces of its own
        text = question if config.template is None else config.template.replace("{question}", question)
        return (*system, Message("user", text)), question
    column = config.columns.messages
    chat = cell(row, column, where, "prompts.columns.messages")
    try:
        messages = tuple(Message(str(m["role"]), m["content"]) for m in chat)
    except (TypeError, KeyError):
        raise UserError(f"{where}: column `{column}`: expected a list of {{role, content}}, found {chat!r}") from None
    if not messages or messages[-1].role != "user" or not all(isinstance(m.content, str) for m in messages):
        raise UserError(f"{where}: column `{column}`: expected messages of text whose last one is the user's")
    return (*system, *messages), messages[-1].content


def cell(row: Row, column: str, where: str, key: str) -> Any:
    """The value of a column; `a.b` also looks inside a struct."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f"{where}: no column `{column}` ({key}); it has: {', '.join(row)}")
        value = value[part]
    return value


def _texts(value: Any, column: str, where: str) -> list[str]:
    """A cell of responses: a text, a list of texts, or null; empty texts are no responses."""
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str | None) for item in items):
        raise UserError(f"{where}: column `{column}`: expected a text or a list of texts, found {value!r}")
    return [item for item in items if item]


def _scalar_text(value: Any, column: str | None, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise UserError(f"{where}: column `{column}`: expected a text or a number as ground truth, found {value!r}")


def _digest(prompt: Prompt) -> bytes:
    canonical = json.dumps(
        {"messages": [asdict(message) for message in prompt.messages], "ground_truth": prompt.ground_truth},
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).digest()


def _numbered(prompt: Prompt, digest: str, occurrence: int) -> Prompt:
    return replace(prompt, prompt_id=digest if occurrence == 1 else f"{digest}-{occurrence}")
