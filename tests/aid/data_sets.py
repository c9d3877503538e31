"""Finished data sets of groups that a test makes up: real shards, a real manifest, no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gftdata.manifest import DATA, FORMAT, Manifest, ModelRecord, PromptCounts, TokenizerRecord, write_manifest
from gftdata.schema import SCHEMA_VERSION, groups_to_table
from gftdata.shards import all_records, package_versions, publish_shard
from gftdata.store import FolderStore
from gftdata.summary import summarise
from gftdata.types import Completion, Group, Message, Prompt, Response, Verdict

END, TURN = 2, 7  # ends a response and a turn; begins the generation prompt of the made-up template
GENERATION_PROMPT = (END, TURN, 9)


@dataclass(frozen=True)
class Made:
    """A response, sound unless it is told otherwise."""

    source: str = "self"
    reward: float | None = 1.0
    text: str = "an answer"
    finish: str = "stop"
    ids: tuple[int, ...] = (11, 12, END)
    logprob: float = -0.5
    status: str = "timeout"  # where it has no reward


def group(number: int, responses: Sequence[Made], question: str | None = None, **changes: Any) -> Group:
    asked = f"question {number}" if question is None else question
    prompt_ids = changes.pop("prompt_ids", (20 + number % 50, *GENERATION_PROMPT))
    settings = {
        "prompt_id": f"{number:064x}",
        "source_id": f"row-{number}",
        "messages": (Message("user", asked),),
        "ground_truth": "1",
        "data_source": "made up",
        "given": (),
        "extra": "{}",
        "question": asked,
    }
    prompt = Prompt(**settings | changes)
    return Group(prompt, np.asarray(prompt_ids, np.int32), tuple(map(_response, responses)))


def _response(made: Made) -> Response:
    completion = Completion(
        source=made.source,
        text=made.text,
        response_ids=np.asarray(made.ids, np.int32),
        finish_reason=made.finish,  # type: ignore[arg-type]
        model="data" if made.source == "expert" else "m@1",
        seed=None,
        behavior_logprobs=None,
    )
    verdict = Verdict(made.reward, "ok" if made.reward is not None else made.status)  # type: ignore[arg-type]
    return Response(completion, verdict, np.full(len(made.ids), made.logprob, np.float32))


def save(folder: Path, shards: Sequence[Sequence[Group]], *, row_group_size: int = 3, **changes: Any) -> Path:
    """Write groups, a shard each list; `changes` are of the manifest."""
    store, count = FolderStore(folder), len(shards)
    for number, groups in enumerate(shards):
        publish_shard(store, number, count, groups_to_table(groups), row_group_size, "float32")
    records = all_records(store, count)
    rows = sum(record.rows for record in records)
    nothing = dict.fromkeys(PromptCounts.model_fields)
    settings = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "toolkit_version": "0",
        "recipe": {},
        "models": (ModelRecord(role="reference", name="nobody/has-this", revision="1"),),
        "tokenizer": TokenizerRecord(hash="h", template_hash="t", end_id=END, stop_ids=(END,)),
        "engine": "none",
        "packages": package_versions(),
        "prompts": PromptCounts(**nothing | {"rows_read": rows, "prompts": rows}),
        "prompts_quarantined": 0,
        "teacher_samples_left_out": None,
        "summary": summarise(folder / DATA / record.name for record in records),
        "shards": records,
    }
    write_manifest(store, Manifest(**settings | changes))
    return folder
