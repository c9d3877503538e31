"""What a run of `gft generate` decides once: may it write here, which prompts, in which shards, drawn by whom.

All of it is written to `.work/` when the output is created, so that a run started again only reads it back. Of tasks
that begin at the same moment each reads the prompts; the plan of one becomes the output's, and the others take that.
"""

import fcntl
import json
import math
import shutil
import uuid
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from gftdata import groups as grouping
from gftdata.config import (
    GenerateConfig,
    OpenaiConfig,
    SamplingConfig,
    ServerConfig,
    SglangConfig,
    TeacherEngineConfig,
    recipe_differences,
)
from gftdata.errors import UserError
from gftdata.extend import Place, carried_keys, check_extension, open_places, read_extended
from gftdata.manifest import (
    DATA,
    MANIFEST,
    QUARANTINE,
    RECORD,
    WORK,
    Derivation,
    ModelRecord,
    PromptCounts,
    TokenizerRecord,
    read_manifest,
)
from gftdata.models import context_length, model_revision
from gftdata.prompts import asked_text, is_repeated, prompt_from_json, prompt_to_json, read_prompts
from gftdata.quality import Contamination, NearDuplicates, read_eval_texts
from gftdata.reuse import find_data, template_of
from gftdata.rewards import NEEDS_GROUND_TRUTH, resolve
from gftdata.sealed import read_sealed, sealed
from gftdata.shards import check_writable, published, sha256_file, toolkit_version
from gftdata.store import FolderStore, Store, hold, open_store
from gftdata.tokens import Tokenizer, encode_prompt, load_tokenizer
from gftdata.types import SELF, Message, Prompt, Sampling, TokenIds

ENDPOINT = "endpoint"  # the revision of a model that only an endpoint knows
LOCK = "lock"
PLAN = f"{WORK}/plan.json"
PROMPTS = f"{WORK}/prompts"
BEGIN_ANEW = "restore this file, or name another folder (out)"
SGLANG_MARGIN = 7  # tokens of its context that SGLang does not give to prompt and response


@dataclass(frozen=True, slots=True)
class Phase:
    """One source whose responses are drawn rather than given."""

    source: str
    model: str
    count: int
    sampling: Sampling
    engine: TeacherEngineConfig
    template: str | None = None
    system: str | None = None

    @property
    def takes_text(self) -> bool:
        """Whether its model is behind an endpoint that takes and gives text, with a tokenizer of its own."""
        return isinstance(self.engine, OpenaiConfig)

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """The prompt as this source is asked it: with its own template and system message, if it has them."""
        before, last = prompt.messages[:-1], prompt.messages[-1]
        if self.system is not None:
            before = (Message("system", self.system), *(m for m in before if m.role != "system"))
        if self.template is not None:
            last = Message(last.role, self.template.replace("{question}", prompt.question))
        return (*before, last)


class Plan(BaseModel):
    """What a data set will hold; fixed when its output is created, kept in `.work/plan.json`."""

    model_config = RECORD

    recipe: dict[str, Any]
    models: tuple[ModelRecord, ...]
    tokenizer: TokenizerRecord
    source_sha256: str | None  # of the prompt file, where there is one
    prompts: PromptCounts
    num_shards: int
    samples: int  # to be drawn
    prompts_in: str  # folder of `.work/prompts/` that holds them, a file for each shard
    derived: tuple[Derivation, ...]  # the data sets that are reused and extended


@dataclass(frozen=True, slots=True)
class ShardPrompt:
    """A prompt with its ids in the starting model's vocabulary, made once when the output is created."""

    prompt: Prompt
    prompt_ids: TokenIds
    earlier: Place | None  # where the data set that is extended has its group


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would do, found without doing it."""

    prompts: PromptCounts
    num_shards: int
    shards_published: int
    prompt_tokens: int  # of all prompts together
    given_tokens: int  # of expert demonstrations and given teacher responses
    sampled_responses: int  # to be drawn
    carried_samples: int  # that the extended data set has already, or has left out
    carried_groups: int  # of its groups: those that are in this data set
    groups_left_behind: int  # and those that are not
    max_sampled_tokens: int  # if every sample ran to responses.max_tokens


def preview(config: GenerateConfig) -> Preview:
    """Read and check everything that `generate` would, load no model, write nothing. Raises UserError."""
    tokenizer = preflight(config)
    survey = Survey(config, tokenizer)
    wanted = {phase.source: phase.count for phase in phases(config)}
    num_prompts = carried = 0
    with closing(survey.prompts()) as prompts:
        while batch := list(islice(prompts, config.shards.groups_per_shard)):
            num_prompts += len(batch)
            carried += sum(k < wanted.get(source, 0) for source, _, k in carried_keys(config, batch))
    extended = read_extended(config.extend) if config.extend is not None else None
    num_shards = math.ceil(num_prompts / config.shards.groups_per_shard)
    sampled = num_prompts * sum(wanted.values()) - carried
    return Preview(
        prompts=survey.counts(),
        num_shards=num_shards,
        shards_published=len(published(open_store(config.out), num_shards)),
        prompt_tokens=survey.prompt_tokens,
        given_tokens=survey.given_tokens,
        sampled_responses=sampled,
        carried_samples=carried,
        carried_groups=survey.extended,
        groups_left_behind=extended.manifest.summary.groups - survey.extended if extended else 0,
        max_sampled_tokens=sampled * config.responses.max_tokens,
    )


def preflight(config: GenerateConfig) -> Tokenizer:
    """Find mistakes in reward, engines, model and output before anything is read or written."""
    resolve(config.reward.name)
    for phase in phases(config):
        check_engine(phase.engine)
    tokenizer = load_tokenizer(config.model)
    store = open_store(config.out)
    if config.extend is not None and not store.exists(MANIFEST):
        check_extension(config, tokenizer_record(tokenizer), model_records(config))
    check_output(config, store, tokenizer)
    return tokenizer


def phases(config: GenerateConfig) -> list[Phase]:
    """The sources that are drawn: teachers first, the starting model last, since its engine goes on to score."""
    responses = config.responses

    def limit(sampling: SamplingConfig) -> Sampling:
        return sampling.with_limit(responses.max_tokens)

    teachers = [
        Phase(t.source, t.model, t.count, limit(t.sampling), t.engine or config.engine, t.template, t.system)
        for t in responses.teachers
        if t.model
    ]
    return [*teachers, Phase(SELF, config.model, responses.own.count, limit(responses.own.sampling), config.engine)]


def check_output(config: GenerateConfig, store: Store, tokenizer: Tokenizer) -> None:
    """Refuse an output that cannot be written, that holds something else, or a data set of another recipe."""
    out = store.location
    if isinstance(store, FolderStore):
        check_writable(store.folder)
    there = store.top()
    if not there:
        return
    plan = read_plan(store)
    if plan is None:
        if there != {WORK}:
            raise UserError(f"{out}: not empty and not a data set of gft generate; name another folder (out)")
        return
    if differing := recipe_differences(plan.recipe, config.recipe()):
        raise UserError(
            f"{out}: was begun with another config: {differing}; use the earlier value to continue it, or name another "
            "folder (out)"
        )
    for record in plan.models:
        if record.revision != ENDPOINT and (found := model_revision(record.name)) != record.revision:
            raise UserError(
                f"{out}: was begun with {record.name} at revision {record.revision[:12]}, which is now {found[:12]}; "
                "restore that model, or name another folder (out)"
            )
    if tokenizer_record(tokenizer) != plan.tokenizer:
        raise UserError(
            f"{out}: was begun with another tokenizer, chat template or end token of {config.model}; restore them, or "
            "name another folder (out)"
        )
    goes_on = config.extend if not store.exists(MANIFEST) else None
    if goes_on is not None and read_extended(goes_on).sha256 != plan.derived[-1].sources[0]:
        raise UserError(
            f"{out}: was begun to extend another content of {goes_on}; restore that, or name another folder (out)"
        )
    source = source_sha256(config)
    if source is not None and source != plan.source_sha256:
        raise UserError(
            f"{out}: was begun with another content of {config.prompts.path}; restore that file, or name another "
            "folder (out)"
        )


def read_plan(store: Store) -> Plan | None:
    """The plan of an output that was created before."""
    try:
        data = read_sealed(store.read(PLAN), f"{store.location}/{PLAN}", "the plan of an output")
        return Plan.model_validate_json(json.dumps(data))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(f"{store.location}: was begun by another version of gft; name another folder (out)") from None


def quarantined(store: Store) -> set[str]:
    """Prompts that the engine gave up; each has a file that says why."""
    names = store.names(f"{WORK}/{QUARANTINE}")
    return {name.removesuffix(".json") for name in names}


def source_sha256(config: GenerateConfig) -> str | None:
    """Of the prompt file, where prompts come from a file that is there."""
    path = config.prompts.path
    return sha256_file(Path(path)) if path is not None and Path(path).is_file() else None


def tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        hash=tokenizer.hash,
        template_hash=tokenizer.template_hash,
        end_id=tokenizer.end_id,
        stop_ids=tokenizer.stop_ids,
    )


@contextmanager
def writing(store: Store, *, alone: bool) -> Iterator[None]:
    """Hold an output: for this process, or as one of several tasks. Raises UserError where that cannot be.

    It keeps people from starting the same thing twice; that the data set is right does not rest on it. In an object
    store nothing can be held.
    """
    if isinstance(store, FolderStore):
        with sole_writer(store.folder) if alone else _one_of_several(store.folder):
            yield
    else:
        yield


@contextmanager
def _one_of_several(out: Path) -> Iterator[None]:
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / LOCK).open("w") as lock:
        hold(lock, fcntl.LOCK_SH, f"{out}: a gft command that is not a task (--task i/n) is writing to it; wait for it")
        yield


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold an output for this process. Raises UserError where another one has it.

    Whatever ends the block before the first sample or shard is there takes back what it has written.
    """
    created = [folder for folder in (out / WORK, out, *out.parents) if not folder.exists()]  # innermost first
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / LOCK).open("w") as lock:
        hold(lock, fcntl.LOCK_EX, f"{out}: another gft command is writing to it; wait, or name another folder")
        try:
            yield
        except BaseException:
            if created and not _is_begun(out):
                with suppress(OSError):  # .work/ after data/: it marks a folder that does not go as one to go on with
                    if (out / DATA).exists():
                        (out / DATA).rmdir()
                    shutil.rmtree(out / WORK)
                    for folder in created[1:]:  # one above may hold another run's output by now: only empty ones go
                        folder.rmdir()
            raise


def _is_begun(out: Path) -> bool:
    """Whether there is a sample or a shard; also where nobody can tell: on a disk that fails nothing is taken back."""
    journal = out / WORK / "journal"
    try:
        # listed, for a glob passes over what it may not look into
        return any(path.exists() and any(path.iterdir()) for path in (journal, out / DATA))
    except OSError:
        return True


def create_output(config: GenerateConfig, store: Store, tokenizer: Tokenizer) -> Plan:
    """Fix the prompts and their shards. The plan is written last: an output without one is created anew.

    Raises UserError, besides what reading prompts raises, where another task with other settings was first.
    """
    folder = uuid.uuid4().hex[:8]
    survey = Survey(config, tokenizer)
    drawn = {phase.source: phase.count for phase in phases(config)}
    num_shards = samples = 0
    with closing(survey.prompts()) as prompts:
        while batch := list(islice(prompts, config.shards.groups_per_shard)):
            name = f"{folder}/{num_shards:05d}.jsonl"
            lines = "".join(f"{_to_line(item, name)}\n" for item in batch)
            store.write(f"{PROMPTS}/{name}", lines.encode())
            carried = sum(k < drawn.get(source, 0) for source, _, k in carried_keys(config, batch))
            samples += len(batch) * sum(drawn.values()) - carried
            num_shards += 1
    plan = Plan(
        recipe=config.recipe(),
        models=model_records(config),
        tokenizer=tokenizer_record(tokenizer),
        source_sha256=source_sha256(config),
        prompts=survey.counts(),
        num_shards=num_shards,
        samples=samples,
        prompts_in=folder,
        derived=_derivations(config, survey),
    )
    content = json.dumps(sealed(plan.model_dump(mode="json")), indent=2).encode()
    if not store.create(PLAN, content):
        store.remove(f"{PROMPTS}/{folder}")
        check_output(config, store, tokenizer)
        first = read_plan(store)
        assert first is not None
        return first
    if not isinstance(store, FolderStore) and store.create(PLAN, content):
        raise UserError(
            f"{store.location}: this object store writes over what is there though told not to (If-None-Match of a "
            "PUT), so that two tasks could spoil a shard; generate into a folder and copy it there"
        )
    return plan


def _derivations(config: GenerateConfig, survey: "Survey") -> tuple[Derivation, ...]:
    """Where prompts and responses come from that are another data set's."""
    steps: list[Derivation] = []
    if config.prompts.reuse is not None:
        folder = find_data(config.prompts.reuse)
        template = template_of(read_manifest(folder))
        steps.append(_derivation("reuse", {"template": template}, sha256_file(folder / MANIFEST)))
    if config.extend is not None:
        extended = read_extended(config.extend)
        left_behind = extended.manifest.summary.groups - survey.extended
        settings = {"groups_carried": survey.extended, "groups_left_behind": left_behind}
        steps = [*extended.manifest.derived, *steps, _derivation("extend", settings, extended.sha256)]
    return tuple(steps)


def _derivation(by: str, settings: dict[str, Any], source: str) -> Derivation:
    return Derivation(by=by, settings=settings, sources=(source,), toolkit_version=toolkit_version())


def model_records(config: GenerateConfig) -> tuple[ModelRecord, ...]:
    """Every model that takes part, with its revision; what an endpoint runs nobody can know."""
    reference = ModelRecord(role="reference", name=config.model, revision=model_revision(config.model))
    return reference, *(
        ModelRecord(
            role=phase.source,
            name=phase.model,
            revision=ENDPOINT if phase.takes_text else model_revision(phase.model),
        )
        for phase in phases(config)
    )


def _to_line(item: ShardPrompt, name: str) -> str:
    line = f"{item.prompt_ids.tolist()}\t{json.dumps(item.earlier)}\t{prompt_to_json(item.prompt)}"
    return f"{_checksum(line.encode(), name):08x}\t{line}"


def _checksum(line: bytes, name: str) -> int:
    """Of a line in the file of this name: in another's place it is as wrong as a damaged one."""
    return zlib.crc32(line, zlib.crc32(name.encode()))


def _from_line(line: str) -> ShardPrompt:
    ids, place, prompt = line.split("\t", 3)[1:]
    earlier = None if (found := json.loads(place)) is None else Place(*found)
    return ShardPrompt(prompt_from_json(prompt), np.asarray(json.loads(ids), dtype=np.int32), earlier)


class Survey:
    """One pass over the prompt source: yields the prompts that fit and counts what does not."""

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._phases = [phase for phase in phases(config) if not phase.takes_text]
        self._readers = {config.model: tokenizer}  # every model that the prompts are put to
        for phase in self._phases:
            if phase.model not in self._readers:
                self._readers[phase.model] = load_tokenizer(phase.model)
        self._sglang = any(isinstance(phase.engine, SglangConfig | ServerConfig) for phase in self._phases)
        self._longest = dict.fromkeys(self._readers, 0)
        self._read = self._too_long = self._given_missing = self._given_left_out = 0
        self._repeated = self._near = self._removed = self._contaminated = 0
        self.prompt_tokens = self.given_tokens = 0
        self.extended = 0  # prompts that the extended data set has

    def prompts(self) -> Generator[ShardPrompt]:
        """Raises UserError as `read_prompts` does, where nothing fits, and where a group would not fit the model."""
        config = self._config
        wanted = sum(config.responses.given_counts.values())
        with open_places(config.extend) as places, closing(self._fitting()) as fitting:
            for prompt, ids in fitting:
                completions = grouping.given_completions(config.responses, prompt, self._tokenizer)
                self._given_missing += wanted - len(prompt.given)
                self._given_left_out += len(prompt.given) - len(completions)
                self.given_tokens += sum(len(completion.response_ids) for completion in completions)
                self.prompt_tokens += len(ids)
                self._longest[config.model] = max(self._longest[config.model], len(ids))
                for phase in self._phases:
                    if phase.source != SELF:
                        length = len(self._encode(phase.model, prompt, phase.messages(prompt)))
                        self._longest[phase.model] = max(self._longest[phase.model], length)
                place = places.find(prompt.prompt_id)
                self.extended += place is not None
                yield ShardPrompt(prompt, ids, place)
        self._check_left()
        self._check_context()

    def _fitting(self) -> Generator[tuple[Prompt, TokenIds]]:
        """The prompts with their ids, without those that an evaluation has, that are too long, or come again."""
        config, limit = self._config, self._config.prompts.max_prompt_tokens
        needs_truth = config.reward.name in NEEDS_GROUND_TRUTH
        contamination = Contamination(chain.from_iterable(read_eval_texts(part) for part in config.decontaminate))
        with ExitStack() as stack:
            look = config.duplicates.near != "ignore"
            near = stack.enter_context(NearDuplicates(config.duplicates.similarity)) if look else None
            for prompt in read_prompts(config.prompts, grouping.given_origins(config), needs_ground_truth=needs_truth):
                self._read += 1
                text = asked_text(prompt)
                if contamination.found_in(text):
                    self._contaminated += 1
                    continue
                ids = self._encode(config.model, prompt, prompt.messages)
                if len(ids) > limit:
                    if config.prompts.on_too_long == "error":
                        raise UserError(
                            f"prompt {self._read} has {len(ids)} tokens, over prompts.max_prompt_tokens={limit}; raise "
                            "it, or set prompts.on_too_long=skip to leave such prompts out"
                        )
                    self._too_long += 1
                    continue
                repeated = is_repeated(prompt)
                similar = near is not None and not repeated and near.is_near(text)
                self._repeated += repeated
                self._near += similar
                if (repeated and config.duplicates.exact == "remove") or (
                    similar and config.duplicates.near == "remove"
                ):
                    self._removed += 1
                    continue
                yield prompt, ids

    def _check_context(self) -> None:
        for model, longest in self._longest.items():
            context = context_length(model)
            needed = longest + self._config.responses.max_tokens + (SGLANG_MARGIN if self._sglang else 0)
            if context is not None and needed > context:
                raise UserError(
                    f"{model} holds {context} tokens, but the longest prompt has {longest} and "
                    f"responses.max_tokens is {self._config.responses.max_tokens}"
                    + (f", and SGLang keeps {SGLANG_MARGIN} for itself" if self._sglang else "")
                    + "; lower that, or prompts.max_prompt_tokens"
                )

    def _check_left(self) -> None:
        reasons = {
            f"{self._too_long} are longer than prompts.max_prompt_tokens={self._config.prompts.max_prompt_tokens}": (
                self._too_long
            ),
            f"{self._contaminated} share 8 words in a row with an evaluation set": self._contaminated,
            f"{self._removed} are duplicates": self._removed,
        }
        if self.counts().prompts == 0:
            said = ", ".join(reason for reason, count in reasons.items() if count)
            raise UserError(f"no prompt is left of {self._read}: {said}")
        if self._config.extend is not None and not self.extended:
            raise UserError(
                f"{self._config.extend}: has none of these prompts, so there is nothing to extend: are template, "
                "system message and ground truth the same?"
            )

    def _encode(self, model: str, prompt: Prompt, messages: Sequence[Message]) -> TokenIds:
        try:
            return encode_prompt(self._readers[model], messages)
        except UserError as error:
            raise UserError(f"prompt {self._read}: {model}: {error}") from None

    def counts(self) -> PromptCounts:
        """What became of the rows; complete when `prompts` has been exhausted."""
        return PromptCounts(
            rows_read=self._read,
            prompts=self._read - self._too_long - self._contaminated - self._removed,
            prompts_too_long=self._too_long,
            duplicates=self._repeated,
            near_duplicates=None if self._config.duplicates.near == "ignore" else self._near,
            duplicates_removed=self._removed,
            contaminated=self._contaminated,
            given_missing=self._given_missing,
            given_left_out=self._given_left_out,
        )


def shard_prompts(store: Store, plan: Plan, shard: int) -> list[ShardPrompt]:
    """The prompts of a shard, as they were when the output was created."""
    name = f"{plan.prompts_in}/{shard:05d}.jsonl"
    where = f"{store.location}/{PROMPTS}/{name}"
    lines = store.read(f"{PROMPTS}/{name}").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        checksum, _, rest = line.partition(b"\t")
        if not line.endswith(b"\n") or checksum != b"%08x" % _checksum(rest[:-1], name):
            raise UserError(f"{where}: line {number} is damaged; {BEGIN_ANEW}")
    if len(lines) != rows_of_shard(plan, shard):
        expected = rows_of_shard(plan, shard)
        raise UserError(f"{where}: {len(lines)} prompts, expected {expected}; {BEGIN_ANEW}")
    return [_from_line(line.decode()) for line in lines]


def rows_of_shard(plan: Plan, shard: int) -> int:
    """Prompts of a shard."""
    size = int(plan.recipe["shards"]["groups_per_shard"])
    return min(size, plan.prompts.prompts - shard * size)


def check_engine(config: TeacherEngineConfig) -> None:
    """Find a mistake in the engine's settings before anything is written."""
    if isinstance(config, SglangConfig):
        from gftdata.engines.sglang import check_python

        check_python(config)
    elif isinstance(config, ServerConfig):
        from gftdata.engines.server import check_urls

        check_urls(config)
    elif isinstance(config, OpenaiConfig):
        from gftdata.engines.endpoint import check_key

        check_key(config)
    else:
        from gftdata.engines.hf import pick_device

        pick_device(config.device)
