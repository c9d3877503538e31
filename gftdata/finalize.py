"""The end of a generation: is every prompt there? Then the manifest marks the data set final.

Whichever task finishes last does it, or `gft finalize`; two at the same time write the same.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from gftdata.errors import UserError
from gftdata.extend import drawn_counts
from gftdata.journal import JOURNAL
from gftdata.manifest import (
    DATA,
    FORMAT,
    MANIFEST,
    QUARANTINE,
    WORK,
    Manifest,
    ShardRecord,
    parse_manifest,
    write_manifest,
)
from gftdata.models import shareable, shown_name
from gftdata.prepare import PLAN, PROMPTS, Plan, quarantined, read_plan, shard_prompts
from gftdata.schema import SCHEMA_VERSION
from gftdata.shards import all_records, check_record, package_versions, prompt_ids, toolkit_version
from gftdata.store import STAGED, Store
from gftdata.summary import summarise
from gftdata.types import SELF

ENGINES = f"{WORK}/engines"  # a file for each version of the engine that scored


def finalize(store: Store, plan: Plan | None = None, engines: Collection[str] = ()) -> Manifest:
    """Check that every prompt is there or accounted for, gather the commit records, and mark the data set final.

    `engines` are versions that scored and are known without a look at the folder, which may be an old one.

    Two may be at it at the same time: they write the same. Raises UserError where something is missing.
    """
    if (manifest := read_final(store)) is not None:
        return manifest
    plan = plan or read_plan(store)
    if plan is None:
        raise UserError(f"{store.location}: not an output of gft generate, or not begun yet")
    records = all_records(store, plan.num_shards)
    refused: set[str] = set()
    try:
        summary = summarise(_checked(store, plan, records, refused))
    except FileNotFoundError:
        if (manifest := read_final(store)) is not None:  # another task was faster, and has put away the prompts
            return manifest
        raise UserError(
            f"{store.location}: has not the prompts that {PLAN} speaks of: it was finished before, and its {MANIFEST} "
            f"is gone, or one of the two is another output's; put back {MANIFEST}, or name another folder (out)"
        ) from None
    if refused:
        entries = [store.read(f"{WORK}/{QUARANTINE}/{prompt_id}.json").decode() for prompt_id in sorted(refused)]
        store.write(f"{QUARANTINE}.jsonl", "".join(f"{entry}\n" for entry in entries).encode())
    drawn_by_teachers = {source: count for source, count in drawn_counts(plan.recipe).items() if source != SELF}
    expected = sum(drawn_by_teachers.values()) * summary.groups
    found = sum(source.responses for source in summary.sources if source.source in drawn_by_teachers)
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        toolkit_version=toolkit_version(),
        recipe=shareable(plan.recipe),
        models=tuple(record.model_copy(update={"name": shown_name(record.name)}) for record in plan.models),
        tokenizer=plan.tokenizer,
        engine="; ".join(
            sorted({*engines, *(store.read(f"{ENGINES}/{name}").decode() for name in store.names(ENGINES))})
        ),
        packages=package_versions(),
        prompts=plan.prompts,
        prompts_quarantined=len(refused),
        teacher_samples_left_out=expected - found,
        derived=plan.derived,
        summary=summary,
        shards=records,
    )
    write_manifest(store, manifest)
    for folder in (JOURNAL, PROMPTS, STAGED):
        store.remove(folder)
    return manifest


def _checked(store: Store, plan: Plan, records: Sequence[ShardRecord], refused: set[str]) -> Iterator[Path]:
    """The files of the shards, each compared with its prompts; into `refused` go the prompts that were given up.

    A prompt that one copy of a task gave up may be in the shard that another has published: it is there, then.
    """
    given_up = quarantined(store)
    for shard, record in enumerate(records):
        planned = {item.prompt.prompt_id for item in shard_prompts(store, plan, shard)}
        with store.local(f"{DATA}/{record.name}") as path:
            check_record(store, record, path)
            there = set(prompt_ids(path, f"{store.location}/{DATA}/{record.name}"))
            if there - planned or planned - there - given_up:
                raise UserError(
                    f"{store.location}/{DATA}/{record.name}: lacks {len(planned - there - given_up)} of its prompts "
                    f"and has {len(there - planned)} that are not its own; delete it and its record in {WORK}/records, "
                    "then give the command that made it again"
                )
            refused |= planned - there
            yield path


def read_final(store: Store) -> Manifest | None:
    """The manifest of an output that is finished."""
    try:
        return parse_manifest(store.read(MANIFEST), f"{store.location}/{MANIFEST}")
    except FileNotFoundError:
        return None
