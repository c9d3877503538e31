"""What settings name and a compute node without internet cannot get: found, sized, brought into the caches.

Everything lands where the commands look for it later, with HF_HUB_OFFLINE=1: models, prompts and data sets of the Hub
in HF_HOME, data sets on S3 in GFT_CACHE. What `gft generate` needs is said here, of the others in gfttrain/fetch.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from gftdata.config import (
    EngineConfig,
    EvalSetConfig,
    GenerateConfig,
    HfConfig,
    OpenaiConfig,
    PromptsConfig,
    TeacherEngineConfig,
)
from gftdata.errors import UserError, first_line
from gftdata.hub import failures
from gftdata.locations import checked_shards, is_remote, open_data
from gftdata.prompts import hub_rows

TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")  # what is beside the weights: configuration, tokenizer
WEIGHTS = "*.safetensors"  # pickles are not loaded
SUBFOLDERS = ("*/*",)  # the same weights in other formats


@dataclass(frozen=True, slots=True)
class Wanted:
    """One thing that settings name."""

    kind: Literal["model", "tokenizer", "prompts", "groups"]  # tokenizer: of a model that a server has
    name: str  # a Hub id; of groups a location
    subset: str | None = None  # of prompts
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Sized:
    """What it takes to have it."""

    wanted: Wanted
    bytes: int
    missing_bytes: int  # not in the cache yet


def wanted_to_generate(config: GenerateConfig) -> Iterator[Wanted]:
    """What `gft generate` reads from elsewhere."""
    yield from wanted_model(config.model, config.engine)
    for teacher in config.responses.teachers:
        if teacher.model is not None:
            yield from wanted_model(teacher.model, teacher.engine or config.engine)
    yield from wanted_prompts(config.prompts)
    for eval_set in config.decontaminate:
        yield from wanted_prompts(eval_set)
    if config.extend is not None:
        yield from wanted_groups(config.extend)


def wanted_model(model: str, engine: EngineConfig | TeacherEngineConfig | None = None) -> Iterator[Wanted]:
    """A model, unless it is a folder; of one that a server has, its tokenizer, of one behind an endpoint nothing."""
    if not isinstance(engine, OpenaiConfig) and _is_hub_id(model):
        weights_here = engine is None or isinstance(engine, HfConfig) or engine.name == "sglang"
        yield Wanted("model" if weights_here else "tokenizer", model)


def wanted_prompts(config: PromptsConfig | EvalSetConfig) -> Iterator[Wanted]:
    """A data set of the Hub that prompts or evaluation questions are read from."""
    if config.dataset is not None and not Path(config.dataset).exists():
        yield Wanted("prompts", config.dataset, config.subset, config.split)
    if isinstance(config, PromptsConfig) and config.reuse is not None:
        yield from wanted_groups(config.reuse)


def wanted_groups(data: str) -> Iterator[Wanted]:
    """A data set of response groups at a location, or of a Hub id."""
    if is_remote(data):
        yield Wanted("groups", data.rstrip("/"))
    elif _is_hub_id(data):
        yield Wanted("groups", f"hf://datasets/{data}")


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def size(wanted: Wanted) -> Sized:
    """Ask how large it is; nothing large is downloaded. Raises UserError where it cannot be had."""
    if wanted.kind == "groups":
        return _size_groups(wanted)
    if wanted.kind == "prompts":
        return _size_prompts(wanted)
    files = _model_files(wanted)
    return Sized(wanted, sum(n for _, n, _ in files), sum(n for _, n, cached in files if not cached))


def fetch(wanted: Wanted) -> None:
    """Bring it into the cache, where it is not there yet. Stopped, the same call continues. Raises UserError."""
    if wanted.kind == "groups":
        data = open_data(wanted.name)
        locate = checked_shards(data.shards)
        for number in range(len(data.shards)):
            locate(number)
    elif wanted.kind == "prompts":
        # prepared as the command will ask for it: offline, that is what is looked for
        hub_rows(wanted.name, wanted.subset, wanted.split or "train", "dataset")
    else:
        from huggingface_hub import snapshot_download

        names = [name for name, _, _ in _model_files(wanted)]
        try:
            snapshot_download(wanted.name, allow_patterns=names)
        except failures() as error:
            _fail(wanted, error)


def _model_files(wanted: Wanted) -> list[tuple[str, int, bool]]:
    """Name, bytes and whether it is in the cache, of each file of a model that is loaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    patterns = [*TEXTS, WEIGHTS] if wanted.kind == "model" else list(TEXTS)
    try:
        with disable_progress_bars():  # of a look at what is there
            found = snapshot_download(
                wanted.name, allow_patterns=patterns, ignore_patterns=list(SUBFOLDERS), dry_run=True
            )
    except failures() as error:
        _fail(wanted, error)
    assert isinstance(found, list)
    files = [(file.filename, file.file_size or 0, file.is_cached) for file in found]
    if wanted.kind == "model" and not any(Path(name).match(WEIGHTS) for name, _, _ in files):
        raise UserError(
            f"{wanted.name}: the Hub has no weights of it that are loaded here ({WEIGHTS}; pickles are not)"
        )
    return files


def _size_prompts(wanted: Wanted) -> Sized:
    import datasets
    from huggingface_hub import HfFileSystem, try_to_load_from_cache
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    files, total, missing = HfFileSystem(), 0, 0
    try:
        builder = datasets.load_dataset_builder(wanted.name, wanted.subset)
        for urls in (builder.config.data_files or {}).values():
            for url in urls:
                place, num_bytes = files.resolve_path(url), files.info(url)["size"]
                assert isinstance(place, HfFileSystemResolvedRepositoryPath)
                cached = try_to_load_from_cache(
                    place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision
                )
                total += num_bytes
                missing += 0 if isinstance(cached, str) else num_bytes
    except (*failures(), datasets.exceptions.DatasetsError) as error:
        _fail(wanted, error)
    return Sized(wanted, total, missing)


def _size_groups(wanted: Wanted) -> Sized:
    data = open_data(wanted.name)
    missing = 0
    for shard in data.shards:
        with shard.peek() as opened:
            missing += 0 if isinstance(opened, Path) else shard.record.bytes
    return Sized(wanted, sum(shard.record.bytes for shard in data.shards), missing)


def _fail(wanted: Wanted, error: Exception) -> NoReturn:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import DryRunError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, DryRunError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if HF_HUB_OFFLINE:
        said = "not in the cache, and HF_HUB_OFFLINE is set: unset it where there is a network, for this command"
    elif isinstance(error, GatedRepoError):
        said = "gated: accept its terms on the Hub, and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError) or "doesn't exist on the Hub" in str(error):
        said = (
            "no such folder here, and the Hub has none of that name, or not for you: check the name, and HF_TOKEN "
            "where it is private; what another command makes is left out when its config is named too"
        )
    else:
        said = f"the Hub has not given it: {first_line(error)}; check the network, then give the same command again"
    raise UserError(f"{wanted.name} ({wanted.kind}): {said}") from None
