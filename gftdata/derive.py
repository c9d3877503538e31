"""Finished data sets -> a new one. What is read is never touched.

A `plan_...` reads, checks and counts, and writes nothing; the Job it returns is given to `derive`, which writes
shard by shard and continues where it was stopped. Rows are taken as Arrow tables, one row group at a time; only the two
jobs that are here, rejudge and rescore, decode them and put other columns in. Those that choose groups: `regroup.py`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from gftdata import shards
from gftdata.config import (
    COMPUTE_OPTIONS,
    COMPUTE_SETTINGS,
    STRICT,
    EngineConfig,
    HfConfig,
    RewardConfig,
    ShardsConfig,
    recipe_differences,
)
from gftdata.errors import UserError
from gftdata.events import Event, Listener
from gftdata.generate import give_up, open_engine
from gftdata.index import Index, read_index
from gftdata.judging import open_judges
from gftdata.manifest import (
    DATA,
    MANIFEST,
    QUARANTINE,
    WORK,
    Derivation,
    Manifest,
    ModelRecord,
    read_manifest,
    write_manifest,
)
from gftdata.models import context_length, model_revision, shareable, shown_name
from gftdata.prepare import check_engine, quarantined, sole_writer, tokenizer_record
from gftdata.rewards import resolve
from gftdata.schema import check_rows, groups_to_table, schema, table_to_groups
from gftdata.store import FolderStore, read_file
from gftdata.summary import summarise
from gftdata.tokens import Tokenizer, load_tokenizer
from gftdata.types import Group, ScoreRequest, Unscored

PLAN, ENGINE = "derive.json", "engine"  # in .work/: what is being derived; the engine that rescores
DECODED_ROWS = 8  # turned into Python objects at a time

Change = Callable[[pa.Table], pa.Table]  # of one shard's rows
OpenChange = Callable[[Path, Listener], AbstractContextManager[Change]]


class RejudgeConfig(BaseModel):
    """The settings of `gft rejudge`."""

    model_config = STRICT

    reward: RewardConfig


class RescoreConfig(BaseModel):
    """The settings of `gft rescore`."""

    model_config = STRICT

    model: str  # the new reference model; its tokenizer and chat template are those of the data set
    engine: EngineConfig = HfConfig()


@dataclass(frozen=True, slots=True)
class Source:
    """A finished data set that is read."""

    folder: Path
    manifest: Manifest
    sha256: str  # of its manifest.json
    logprob_dtype: Literal["float32", "float16"]
    quarantine: Mapping[str, str]  # prompt id -> line of quarantine.jsonl

    @property
    def paths(self) -> list[Path]:
        return shards.shard_paths(self.folder, self.manifest)

    @property
    def sizes(self) -> ShardsConfig:
        """How its recipe, or else the default, cuts a data set."""
        found = self.manifest.recipe.get("shards", {})
        return ShardsConfig(**{name: found[name] for name in ("groups_per_shard", "row_group_size") if name in found})


@dataclass(frozen=True, slots=True)
class Job:
    """A data set to be derived: found sound and counted, nothing written yet."""

    out: Path
    sources: tuple[Source, ...]
    derivation: Derivation
    manifest: Manifest  # the first source's, with what the derivation says otherwise
    index: Index  # of all sources' groups
    shards: tuple[npt.NDArray[np.int64], ...]  # of each shard: the numbers of its groups in the index
    left_out: Mapping[str, int]  # reason -> groups
    open_change: OpenChange

    @property
    def num_groups(self) -> int:
        return sum(len(groups) for groups in self.shards)

    @property
    def num_responses(self) -> int:
        sizes_G = np.diff(self.index.offsets)
        return sum(int(sizes_G[groups].sum()) for groups in self.shards)

    @property
    def shards_published(self) -> int:
        names = (shards.shard_name(i, len(self.shards)) for i in range(len(self.shards)))
        return sum((self.out / DATA / name).is_file() for name in names)


def derive(job: Job, on_event: Listener = lambda event: None) -> Manifest:
    """Write the data set, or what is missing of it; returns its manifest. Raises UserError as the plans do."""
    out, num_shards = job.out, len(job.shards)
    store = FolderStore(out)
    with sole_writer(out):
        check_output(out, job.sources, job.derivation)  # another process may have been here since the plan
        if (out / MANIFEST).is_file():
            return read_manifest(out)
        shards.write_atomic(out / WORK / PLAN, job.derivation.model_dump_json(indent=2))
        unfinished = [shard for shard in range(num_shards) if shards.shard_record(store, shard, num_shards) is None]
        remaining = sum(len(job.shards[shard]) for shard in unfinished)
        on_event(Event("groups", count=job.num_groups, done=job.num_groups - remaining))
        if unfinished:
            first, read = job.sources[0], lru_cache(maxsize=1)(read_table)
            with job.open_change(out, on_event) as change:
                for shard in unfinished:
                    table = change(_rows(job.index, job.shards[shard], first.logprob_dtype, read))
                    shards.publish_shard(
                        store, shard, num_shards, table, first.sizes.row_group_size, first.logprob_dtype
                    )
                    shards.shard_record(store, shard, num_shards)
                    on_event(Event("shard", count=len(job.shards[shard])))
        return finalize(job)


def _rows(
    index: Index, groups: npt.NDArray[np.int64], logprob_dtype: str, read: Callable[[Path, int], pa.Table]
) -> pa.Table:
    """The rows of some groups, in their order; a row group is read once where its groups stand together."""
    files, row_groups = index.path_of_group[groups], index.row_group_of_group[groups]
    cuts = np.flatnonzero((np.diff(files) != 0) | (np.diff(row_groups) != 0)) + 1
    pieces = [schema(logprob_dtype).empty_table()]
    for run in np.split(groups, cuts) if len(groups) else ():
        table = read(index.paths[index.path_of_group[run[0]]], int(index.row_group_of_group[run[0]]))
        pieces.append(table.take(pa.array(index.row_of_group[run])))
    return pa.concat_tables(pieces)


def finalize(job: Job) -> Manifest:
    """Gather the commit records and mark the data set final."""
    out, store = job.out, FolderStore(job.out)
    records = shards.all_records(store, len(job.shards))
    for record in records:
        shards.check_record(store, record, out / DATA / record.name)
    refused = {key: line for source in job.sources for key, line in source.quarantine.items()}
    refused |= {key: read_file(out / WORK / QUARANTINE / f"{key}.json").decode() for key in sorted(quarantined(store))}
    if refused:
        shards.write_atomic(out / f"{QUARANTINE}.jsonl", "".join(f"{line}\n" for line in refused.values()))
    unnamed = sum(source.manifest.prompts_quarantined - len(source.quarantine) for source in job.sources)
    num_refused = len(refused) + max(0, unnamed)  # a copy of a data set may come without its quarantine.jsonl
    prompts = {"prompts": sum(record.rows for record in records) + num_refused}
    if job.manifest.prompts.duplicates is None:  # a part: its rows are those of what it was taken from
        prompts["rows_read"] = prompts["prompts"]
    changes = {
        "toolkit_version": shards.toolkit_version(),
        "packages": shards.package_versions(),
        "prompts": job.manifest.prompts.model_copy(update=prompts),
        "prompts_quarantined": num_refused,
        "summary": summarise([out / DATA / record.name for record in records]),
        "shards": records,
        "derived": (*job.manifest.derived, job.derivation),
    }
    if (out / WORK / ENGINE).is_file():
        changes["engine"] = read_file(out / WORK / ENGINE).decode()
    manifest = job.manifest.model_copy(update=changes)
    write_manifest(store, manifest)
    shutil.rmtree(out / WORK / "staged", ignore_errors=True)
    return manifest


def plan_rejudge(data: Path, out: Path, config: RejudgeConfig) -> Job:
    """Other rewards and reward_status for every response."""
    resolve(config.reward.name)
    source = read_source(data)
    settings = {"reward": config.reward.model_dump(mode="json", exclude={"workers"})}
    changes = {"recipe": source.manifest.recipe | settings}
    return _shard_by_shard("rejudge", source, out, settings, changes, partial(rejudging, config, source))


@contextmanager
def rejudging(config: RejudgeConfig, source: Source, out: Path, on_event: Listener) -> Iterator[Change]:
    """Open the judges; yields what puts their verdicts into a shard's rows."""
    with open_judges(config.reward) as submit:

        def rejudged(table: pa.Table) -> pa.Table:
            groups = list(decode(table, str(source.folder)))
            futures = iter([submit(group.prompt, r.completion.text) for group in groups for r in group.responses])
            for i, group in enumerate(groups):
                responses = tuple(replace(r, verdict=next(futures).result()) for r in group.responses)
                groups[i] = replace(group, responses=responses)
                for r in responses:
                    on_event(Event("judged", r.completion.source, reward=r.verdict.reward))
            return _with_columns(table, ("rewards", "reward_status"), groups, source.logprob_dtype)

        yield rejudged


def plan_rescore(data: Path, out: Path, config: RescoreConfig) -> Job:
    """Reference log-probs of every response under another model."""
    check_engine(config.engine)
    source, tokenizer = read_source(data), load_tokenizer(config.model)
    found, expected = tokenizer_record(tokenizer), source.manifest.tokenizer
    for what, name in (("hash", "tokenizer"), ("template_hash", "chat template")):
        if getattr(found, what) != getattr(expected, what):
            raise UserError(
                f"{config.model}: its {name} is not that of {data}, so the tokens there are not its own; "
                f"`gft generate` with this model and prompts.reuse={data} makes them anew"
            )
    index, context = read_index(source.paths), context_length(config.model)
    longest = int((index.num_tokens + np.repeat(index.num_prompt_tokens, np.diff(index.offsets))).max(initial=0))
    if context is not None and longest > context:
        raise UserError(
            f"{config.model} holds {context} tokens, but a prompt of {data} with its response has {longest}; name a "
            "model that holds them"
        )
    record = ModelRecord(role="reference", name=shown_name(config.model), revision=model_revision(config.model))
    excluded: dict[str, Any] = dict.fromkeys(COMPUTE_SETTINGS, True) | {"options": COMPUTE_OPTIONS}
    engine = config.engine.model_dump(mode="json", exclude=excluded)
    settings = {"model": record.name, "revision": record.revision, "engine": shareable(engine)}
    changes = {"models": (record, *(model for model in source.manifest.models if model.role != "reference"))}
    change = partial(rescoring, config, tokenizer, source)
    return _shard_by_shard("rescore", source, out, settings, changes, change)


@contextmanager
def rescoring(
    config: RescoreConfig, tokenizer: Tokenizer, source: Source, out: Path, on_event: Listener
) -> Iterator[Change]:
    """Start the engine; yields what puts its log-probs into a shard's rows. What it cannot score is quarantined."""
    with closing(open_engine(config.model, config.engine, tokenizer)) as engine:
        shards.write_atomic(out / WORK / ENGINE, engine.version)

        def rescored(table: pa.Table) -> pa.Table:
            refused = quarantined(FolderStore(out))
            groups = {
                i: group
                for i, group in enumerate(decode(table, str(source.folder)))
                if group.prompt.prompt_id not in refused
            }
            answers = iter(
                engine.score(
                    [
                        ScoreRequest(group.prompt_ids, r.completion.response_ids)
                        for group in groups.values()
                        for r in group.responses
                    ]
                )
            )
            scored: dict[int, Group] = {}
            given_up: dict[str, str] = {}
            for i, group in groups.items():
                scores = [next(answers) for _ in group.responses]
                if failed := next((score for score in scores if isinstance(score, Unscored)), None):
                    given_up[group.prompt.prompt_id] = failed.reason
                    continue
                pairs = zip(group.responses, scores, strict=True)
                responses = (replace(r, ref_logprobs=s) for r, s in pairs if not isinstance(s, Unscored))
                scored[i] = replace(group, responses=tuple(responses))
            give_up(FolderStore(out), given_up, len(scored), on_event)
            kept = table.take(pa.array(list(scored), pa.int64()))
            columns = ("ref_logprobs", "ref_logprob_means")
            return _with_columns(kept, columns, list(scored.values()), source.logprob_dtype)

        yield rescored


def decode(table: pa.Table, where: str) -> Iterator[Group]:
    """The groups of a table, few of them as Python objects at a time. Raises UserError for rows that cannot be."""
    for start in range(0, table.num_rows, DECODED_ROWS):
        few = table.slice(start, DECODED_ROWS)
        if problems := check_rows(few, f"{where}: from prompt {few['prompt_id'][0]} on"):
            raise UserError(f"{problems[0]}; `gft validate` lists all that is wrong")
        yield from table_to_groups(few)


def _with_columns(table: pa.Table, columns: Sequence[str], groups: Sequence[Group], logprob_dtype: str) -> pa.Table:
    made = groups_to_table(groups, logprob_dtype)
    for name in columns:
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), made[name])
    return table


def _shard_by_shard(
    by: str, source: Source, out: Path, settings: dict[str, Any], changes: Mapping[str, Any], open_change: OpenChange
) -> Job:
    """A job that makes one shard of each shard."""
    index = read_index(source.paths)
    ends = np.cumsum([record.rows for record in source.manifest.shards])
    parts = np.split(np.arange(index.num_groups), ends[:-1])
    return make_job(by, [source], out, settings, index, parts, changes, open_change=open_change)


def make_job(
    by: str,
    sources: Sequence[Source],
    out: Path,
    settings: dict[str, Any],
    index: Index,
    parts: Sequence[npt.NDArray[np.int64]],
    changes: Mapping[str, Any],
    *,
    left_out: Mapping[str, int] | None = None,
    open_change: OpenChange = lambda out, on_event: nullcontext(lambda table: table),
) -> Job:
    """The job whose shards hold the groups `parts` of the index; `changes` are of the manifest. Checks the output."""
    expected = sum(record.rows for source in sources for record in source.manifest.shards)
    if index.num_groups != expected:
        names = ", ".join(str(source.folder) for source in sources)
        raise UserError(f"{names}: {index.num_groups} groups, the manifest says {expected}; see `gft validate`")
    hashes, version = tuple(source.sha256 for source in sources), shards.toolkit_version()
    derivation = Derivation(by=by, settings=settings, sources=hashes, toolkit_version=version)
    check_output(out, sources, derivation)
    manifest = sources[0].manifest.model_copy(update=changes)
    return Job(out, tuple(sources), derivation, manifest, index, tuple(parts), left_out or {}, open_change)


def check_output(out: Path, sources: Sequence[Source], now: Derivation) -> None:
    """Refuse an output that cannot be written, is or lies in what is read, or was begun as something else."""
    place, advice = out.resolve(), "name another folder (--out)"
    for source in sources:
        if (folder := source.folder.resolve()) == place or folder in place.parents:
            raise UserError(f"{out}: is in the data set {source.folder}, which is only read; {advice}")
    shards.check_writable(out)
    plan = out / WORK / PLAN
    if not plan.is_file():
        if out.is_dir() and ({path.name for path in out.iterdir()} - {WORK} or (out / WORK / "plan.json").exists()):
            raise UserError(f"{out}: not empty, and not begun by gft {now.by}; {advice}")
        return
    try:
        before = Derivation.model_validate_json(read_file(plan))
    except ValidationError:
        raise UserError(f"{plan}: is damaged; {advice}") from None
    if before.by != now.by:
        raise UserError(f"{out}: was begun by gft {before.by}, not by gft {now.by}; {advice}")
    if before.sources != now.sources:
        old, new = (", ".join(sha256[:12] for sha256 in step.sources) for step in (before, now))
        raise UserError(f"{out}: was begun from other data (sha256 of its manifest: {old}, now {new}); {advice}")
    if differing := recipe_differences(before.settings, json.loads(json.dumps(now.settings))):
        raise UserError(f"{out}: was begun with other settings: {differing}; use the earlier value, or {advice}")


def read_source(folder: Path) -> Source:
    """A finished, whole data set that has groups. Raises UserError for any other."""
    manifest = read_manifest(folder)
    if not any(record.rows for record in manifest.shards):
        raise UserError(f"{folder}: holds no groups; name another data set")
    for shard, record in zip(shards.shard_paths(folder, manifest), manifest.shards, strict=True):
        shards.check_shard(shard, record)
    first, path = shards.shard_paths(folder, manifest)[0], folder / f"{QUARANTINE}.jsonl"
    with shards.open_parquet(first, str(first)) as file:
        narrow = file.schema_arrow.field("ref_logprobs").type == schema("float16").field("ref_logprobs").type
    lines = read_file(path).decode().splitlines() if manifest.prompts_quarantined and path.is_file() else []
    try:
        given_up = {json.loads(line)["prompt_id"]: line for line in lines}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is damaged; without it only the number of such prompts is carried over") from None
    return Source(folder, manifest, shards.sha256_file(folder / MANIFEST), "float16" if narrow else "float32", given_up)


def read_table(path: Path, row_group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """A row group of a shard."""
    with shards.open_parquet(path, str(path)) as file:
        shards.check_unpacked_size(file, row_group, str(path))
        return file.read_row_group(row_group, columns)
