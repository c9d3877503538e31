"""An earlier data set of response groups as a source of prompts, with the responses that it holds.

What is taken is text: it is tokenised, judged and scored again for the model at hand, so that another base model, or
the next round of the same one, can be trained on groups that exist.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gftdata.errors import UserError, first_line
from gftdata.manifest import DATA, MANIFEST, Manifest, ShardRecord, read_manifest
from gftdata.shards import check_shard, check_unpacked_size, open_parquet
from gftdata.types import GivenText, Message, Prompt

COLUMNS = (
    "source_id",
    "prompt",
    "ground_truth",
    "data_source",
    "responses",
    "sources",
    "finish_reasons",
    "models",
    "extra",
)


def find_data(name: str) -> Path:
    """The folder of a data set: `name` itself, or the snapshot of the Hub data set of that name.

    Raises UserError where there is neither; with HF_HUB_OFFLINE=1 the snapshot must have been downloaded before.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such data set folder")
    return _snapshot(name)


@cache
def _snapshot(name: str) -> Path:
    """One look at the Hub in a run: what it has under that name may be another thing the next minute."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[MANIFEST, f"{DATA}/*.parquet"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: no such folder, and the Hub has not given it: {first_line(error)}") from None


def reused_prompts(name: str, given: Mapping[str, tuple[str, int]]) -> Iterator[Prompt]:
    """Stream the prompts of a data set with the texts that `given` asks for: source -> (source there, count).

    Raises UserError for a missing or unfinished data set, and for a source that it does not hold.
    """
    folder = find_data(name)
    manifest = read_manifest(folder)
    there, template = [source.source for source in manifest.summary.sources], template_of(manifest)
    for source, (origin, _) in given.items():
        if origin not in there:
            raise UserError(f"{name}: holds no responses of `{origin}` (for {source}); it has: {', '.join(there)}")
    for record in manifest.shards:
        for row in _rows(folder / DATA / record.name, record):
            yield _to_prompt(row, given, template)


def template_of(manifest: Manifest) -> str | None:
    """The template that the data set's questions are in, also where it reused another's."""
    template: str | None = manifest.recipe.get("prompts", {}).get("template")
    reused: list[str | None] = [step.settings["template"] for step in manifest.derived if step.by == "reuse"]
    return template if template is not None or not reused else reused[-1]


def _rows(path: Path, record: ShardRecord) -> Iterator[dict[str, Any]]:
    check_shard(path, record)
    with open_parquet(path, str(path)) as file:
        for group in range(file.num_row_groups):
            check_unpacked_size(file, group, str(path))
            table = file.read_row_group(group, columns=list(COLUMNS))
            for number, row in enumerate(table.to_pylist()):
                if not _is_sound(row):
                    raise UserError(
                        f"{path}: row {number} of row group {group} contradicts itself; `gft validate` lists all that "
                        "is wrong"
                    )
                yield row


def _is_sound(row: Mapping[str, Any]) -> bool:
    lists = [row[name] for name in ("responses", "sources", "finish_reasons", "models")]
    messages = row["prompt"]
    return (
        all(column is not None and None not in column and len(column) == len(lists[0]) for column in lists)
        and bool(messages)
        and all(m is not None and None not in m.values() for m in messages)
    )


def _to_prompt(row: Mapping[str, Any], given: Mapping[str, tuple[str, int]], template: str | None) -> Prompt:
    texts: list[GivenText] = []
    for source, (origin, count) in given.items():
        of_origin = [k for k, name in enumerate(row["sources"]) if name == origin and row["responses"][k]]
        texts += [
            GivenText(source, row["responses"][k], row["finish_reasons"][k], row["models"][k])
            for k in of_origin[:count]
        ]
    messages = tuple(Message(**message) for message in row["prompt"])
    return Prompt(
        prompt_id="",
        source_id=row["source_id"],
        messages=messages,
        ground_truth=row["ground_truth"],
        data_source=row["data_source"],
        given=tuple(texts),
        extra=row["extra"],
        question=_question(messages[-1].content, template),
    )


def _question(content: str, template: str | None) -> str:
    """What was put into the template, where the text is of that form."""
    before, _, after = (template or "{question}").partition("{question}")
    fits = content.startswith(before) and content.endswith(after) and len(content) >= len(before) + len(after)
    return content[len(before) : len(content) - len(after)] if fits else content
