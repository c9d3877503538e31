"""The manifest of a finished data set: what is in it, and how it is read back. Pure but for the reading of one file.

DIR/data/train-00000-of-00032.parquet   complete by construction
DIR/manifest.json                       there when, and only when, the data set is final
DIR/.work/                              recipe, prompts, journals, staging, commit records
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gftdata.errors import UserError
from gftdata.schema import SCHEMA_VERSION
from gftdata.sealed import read_sealed, sealed
from gftdata.store import Store, read_file

DATA, WORK, MANIFEST = "data", ".work", "manifest.json"
QUARANTINE = "quarantine"  # of prompts: QUARANTINE.jsonl in a finished data set, a folder of .work/ before
MAX_MANIFEST_BYTES = 64 * 2**20  # of 200,000 shards; what comes from elsewhere may be anything
RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
FORMAT = "gft-groups"
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.parquet")  # what a file in data/ may be called


class ShardRecord(BaseModel):
    """What a published shard file holds; made from the file itself."""

    model_config = RECORD

    name: str
    sha256: str
    rows: Count
    response_tokens: Count
    bytes: Count


class ModelRecord(BaseModel):
    """A model that took part, and its exact revision (Hub commit, or hash of a local folder)."""

    model_config = RECORD

    role: str  # reference, self, teacher:<name>
    name: str
    revision: str


class TokenizerRecord(BaseModel):
    """The starting model's tokenizer, by what it does."""

    model_config = RECORD

    hash: str
    template_hash: str
    end_id: int
    stop_ids: tuple[int, ...]


class PromptCounts(BaseModel):
    """What became of the rows of the prompt source and of given texts. None: not known, as of a part of a data set."""

    model_config = RECORD

    rows_read: Count
    prompts: Count
    prompts_too_long: Count | None
    duplicates: Count | None  # rows whose messages and ground truth came before
    near_duplicates: Count | None  # other rows with almost the words of an earlier one; also None: not looked for
    duplicates_removed: Count | None  # of both kinds, left out
    contaminated: Count | None  # left out: they share 8 words in a row with a text of an evaluation set
    given_missing: Count | None  # fewer given texts than the recipe asks for
    given_left_out: Count | None  # given texts over responses.max_tokens, or with nothing but thinking


class SourceSummary(BaseModel):
    """Responses of one source over the data set."""

    model_config = RECORD

    source: str
    responses: Count
    judged: Count
    mean_reward: float | None  # over judged responses
    pass_rate: Share | None  # share of judged responses with reward 1
    finish_reasons: dict[str, Count]  # those that occur -> responses
    mean_tokens: Amount
    median_tokens: Count  # exact: the shortest length that at least half of the responses do not exceed
    p95_tokens: Count  # and 95 %
    max_tokens: Count
    truncated: Count  # cut by the length limit
    identical: Count  # word for word an earlier response of this source in the same group
    groups_all_identical: Count  # groups with at least 2 responses of this source, all of them the same
    mean_ref_logprob: float  # nats per token


class Summary(BaseModel):
    """The data set in a few numbers."""

    model_config = RECORD

    groups: Count
    responses: Count
    response_tokens: Count
    groups_without_signal: Count  # all judged rewards equal
    groups_unjudged: Count  # no response could be judged
    sources: tuple[SourceSummary, ...]


class Derivation(BaseModel):
    """One step from earlier data sets to this one."""

    model_config = RECORD

    by: str  # rejudge, rescore, merge, filter, split
    settings: dict[str, Any]
    sources: tuple[str, ...]  # sha256 of the manifests that were read
    toolkit_version: str


class Manifest(BaseModel):
    """`manifest.json`."""

    model_config = RECORD

    format: str
    schema_version: int
    toolkit_version: str
    recipe: dict[str, Any]
    models: tuple[ModelRecord, ...]
    tokenizer: TokenizerRecord
    engine: str
    packages: dict[str, str]
    prompts: PromptCounts
    prompts_quarantined: Count  # given up by the engine; quarantine.jsonl says why
    teacher_samples_left_out: Count | None  # drawn, but empty or over responses.max_tokens in this vocabulary
    summary: Summary
    shards: tuple[ShardRecord, ...]
    derived: tuple[Derivation, ...] = ()  # oldest first; of a merge: its inputs', then itself


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Mark the data set final."""
    text = json.dumps(sealed(manifest.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"
    store.write(MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished data set. Raises UserError where there is none, or not one of ours."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data set folder")
    if not path.is_file():
        unfinished = (folder / WORK).is_dir()
        raise UserError(
            f"{folder}: "
            + (
                "an unfinished data set; give the command that makes it again, and it is finished"
                if unfinished
                else "no manifest.json"
            )
        )
    return parse_manifest(read_file(path), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest that these bytes are, from wherever they come; `where` is for errors. Raises UserError."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise UserError(f"{where}: not a manifest: {len(content):,} bytes, expected at most {MAX_MANIFEST_BYTES:,}")
    data = read_sealed(content, where, "a manifest")
    if data.get("format") != FORMAT or data.get("schema_version") != SCHEMA_VERSION:
        found = (str(data.get(key))[:40] for key in ("format", "schema_version"))
        raise UserError(f"{where}: expected format {FORMAT} version {SCHEMA_VERSION}, found {' version '.join(found)}")
    try:
        manifest = Manifest.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: not a manifest: {first_mistake(error)}") from None
    seen: set[str] = set()
    for record in manifest.shards:
        if Path(record.name).name != record.name or not SHARD.fullmatch(record.name):
            raise UserError(f"{where}: names a shard outside its data folder: {record.name[:80]!r}")
        if record.name in seen:
            raise UserError(f"{where}: names the shard {record.name} twice")
        if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
            raise UserError(f"{where}: not a sha256, of {record.name}: {record.sha256[:80]!r}")
        seen.add(record.name)
    return manifest


def first_mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    found = "" if isinstance(first["input"], dict | list) else f", found {str(first['input'])[:40]!r}"
    return f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg'][:120]}{found}"
