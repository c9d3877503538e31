"""`gft push`: a finished data set -> the Hub, with its card.

Contents are uploaded first and referred to in a commit afterwards, the manifest last: `create_commit`, and not
`upload_folder`, which would delete old shards in a first commit, add new ones in later ones, and not keep the manifest
back. Up to MAX_CHANGES files make one commit, so a reader sees the earlier data set or this one; more make several,
between which there is no manifest. What a push that was cut off has uploaded is not uploaded again.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gftdata.card import is_on_the_hub, write_card
from gftdata.derive import read_source
from gftdata.errors import UserError
from gftdata.hub import (
    CARD,
    REFUSED,
    SHOWN,
    Event,
    Listener,
    all_files,
    failures,
    open_api,
    repo_name,
    said_in_one_line,
)
from gftdata.leaks import Private, find_leaks, find_secret, private_here
from gftdata.manifest import DATA, FORMAT, MANIFEST, MAX_MANIFEST_BYTES, Manifest, read_manifest
from gftdata.shards import verify
from gftdata.store import read_file

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
OUR_SHARD = re.compile(rf"{DATA}/train-\d+-of-\d+\.parquet")
MAX_CHANGES = 90  # files of one commit: the Hub wants fewer than 100, and at most 128 commits an hour
AT_ONCE_FILES, AT_ONCE_BYTES = 16, 256 * 2**20  # uploaded between two looks at the progress


@dataclass(frozen=True, slots=True)
class Upload:
    """One file as it will be on the Hub."""

    name: str
    source: Path | bytes
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push uploads: found whole, and free of what must not leave this machine."""

    repo: str
    manifest: Manifest
    card: str
    files: tuple[Upload, ...]  # the manifest last

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push has done."""

    url: str
    commits: int  # 0: everything was there already
    files: int  # uploaded or replaced
    bytes: int  # of these
    deleted: int  # files of an earlier version


def plan_push(
    folder: Path,
    repo: str,
    *,
    license: str | None,
    languages: Sequence[str] = (),
    on_event: Listener = lambda event: None,
) -> Plan:
    """Check everything and write the card; nothing leaves. Licences of models are asked of the Hub, where it answers.

    Raises UserError: no licence, an unfinished or damaged data set, or something private in what would be shared.
    """
    repo = repo_name(repo)
    if license is None or not LICENSE.fullmatch(license):
        found = "none is given" if license is None else f"found {license!r}"
        raise UserError(
            f"a data set is shared under a licence: {found}; name its id, as --license apache-2.0, --license cc-by-4.0 "
            "or --license other (https://huggingface.co/docs/hub/repositories-licenses)"
        )
    manifest = read_manifest(folder)
    count = len(manifest.shards)
    problems = verify(folder, progress=lambda name: on_event(Event("verify", name, count=count)))
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{folder}: only a whole data set is pushed, and {len(problems)} things are wrong with this one: "
            f"{'; '.join(problems[:SHOWN])}{more}"
        )
    source, private = read_source(folder), private_here(os.environ)
    refuse_leaks(folder, manifest, private)
    card = write_card(
        manifest,
        repo,
        license=license,
        languages=languages,
        model_licenses=model_licenses(manifest),
        logprob_dtype=source.logprob_dtype,
    )
    if secret := find_secret(card, private):
        raise UserError(f"{folder}: its card would hold {secret}; look in --license, --language and the manifest")
    files = [
        *(Upload(f"{DATA}/{r.name}", folder / DATA / r.name, r.bytes, r.sha256) for r in manifest.shards),
        _upload(CARD, card.encode()),
        *(_upload(name, read_file(folder / name)) for name in (REFUSED,) if (folder / name).is_file()),
        _upload(MANIFEST, read_file(folder / MANIFEST)),
    ]
    return Plan(repo, manifest, card, tuple(files))


def _upload(name: str, content: bytes) -> Upload:
    return Upload(name, content, len(content), hashlib.sha256(content).hexdigest())


def refuse_leaks(folder: Path, manifest: Manifest, private: Private) -> None:
    """Raise UserError where manifest.json or quarantine.jsonl holds something that must not leave this machine."""
    found = [f"{MANIFEST}: {leak}" for leak in find_leaks(manifest.model_dump(mode="json"), private)]
    path = folder / REFUSED
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is damaged; the data set is whole without this file") from None
        found += [f"{REFUSED}, line {number}: {leak}" for leak in find_leaks(entry, private, "entry")]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{folder}: not pushed, this must not be shared: {'; '.join(found[:SHOWN])}{more}; of {MANIFEST}, mend the "
            f"config and generate again, of {REFUSED}, cut it out or delete the file"
        )


def model_licenses(manifest: Manifest) -> dict[str, str]:
    """Name -> licence, as the pages of the models on the Hub state them; those that it does not tell are missing."""
    api = open_api()
    found: dict[str, str] = {}
    for model in {model.name: model for model in manifest.models if is_on_the_hub(model)}.values():
        try:
            card = api.model_info(model.name, revision=model.revision, timeout=10).card_data
        except failures():
            continue
        if card is None:
            continue
        stated = card.get("license_name") if card.get("license") == "other" else card.get("license")
        if isinstance(stated, str):
            found[model.name] = stated
    return found


def push(plan: Plan, *, private: bool = False, on_event: Listener = lambda event: None) -> Pushed:
    """Put the data set on the Hub, or what is missing of it there; files of an earlier version of it are deleted.

    Raises UserError for what the user can mend; given again, it continues.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    if get_token() is None:
        raise UserError(
            f"{plan.repo}: the Hub needs to know you: set HF_TOKEN to a token that may write, or hf auth login"
        )
    api = open_api()
    with said_in_one_line(plan.repo, "push"):
        head, there = _remote(api, plan, private)
        changed = [file for file in plan.files if not _same(file, there.get(file.name))]
        names = {file.name for file in plan.files}
        deleted = [name for name in there if (OUR_SHARD.fullmatch(name) or name == REFUSED) and name not in names]
        url = f"{api.endpoint}/datasets/{plan.repo}"
        if not changed and not deleted:
            return Pushed(url, 0, 0, 0, 0)
        on_event(Event("start", bytes=sum(file.bytes for file in changed), count=len(changed)))
        additions: list[CommitOperationAdd] = []
        for chunk in _chunks(changed):
            operations = [CommitOperationAdd(file.name, _content(file)) for file in chunk]
            api.preupload_lfs_files(plan.repo, operations, repo_type="dataset", free_memory=False)
            additions += operations
            for file in chunk:
                on_event(Event("file", file.name, file.bytes))
        replaces_manifest = MANIFEST in there and any(file.name == MANIFEST for file in changed)
        commits = _commits(additions, [CommitOperationDelete(name) for name in deleted], replaces_manifest)
        for number, changes in enumerate(commits, start=1):
            part = f" ({number} of {len(commits)})" if len(commits) > 1 else ""
            head = api.create_commit(
                plan.repo,
                changes,
                commit_message=f"Data set of {plan.manifest.summary.groups:,} response groups{part}",
                repo_type="dataset",
                parent_commit=head,
            ).oid
        there = all_files(api, plan.repo, head)
        if wrong := [file.name for file in plan.files if not _same(file, there.get(file.name))]:
            raise UserError(
                f"{plan.repo}: the Hub took it, but has not {wrong[0]} as it is here; give the command again"
            )
    return Pushed(url, len(commits), len(changed), sum(file.bytes for file in changed), len(deleted))


def _content(file: Upload) -> str | bytes:
    return file.source if isinstance(file.source, bytes) else str(file.source)


def _remote(api: "HfApi", plan: Plan, private: bool) -> "tuple[str, dict[str, RepoFile]]":
    """The head commit and the files of the repository, made if there is none. Refuses one of something else."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.dataset_info(plan.repo)
    except RepositoryNotFoundError:
        api.create_repo(plan.repo, repo_type="dataset", private=True if private else None, exist_ok=True)
        info = api.dataset_info(plan.repo)
    if private and not info.private:
        raise UserError(
            f"{plan.repo}: is public on the Hub, and --private only makes a new one private: change it in its settings "
            "there, or name another"
        )
    assert info.sha is not None
    there = all_files(api, plan.repo, info.sha)
    if any(name.startswith(f"{DATA}/") or name == MANIFEST for name in there) and not _is_ours(
        api, plan, info.sha, there
    ):
        raise UserError(f"{plan.repo}: holds something else than a data set of gft push; name another repository")
    return info.sha, there


def _is_ours(api: "HfApi", plan: Plan, commit: str, there: "dict[str, RepoFile]") -> bool:
    """Whether a push made what is there, perhaps half of it: our manifest or, between two commits, our card."""
    if any(name.startswith(f"{DATA}/") and not OUR_SHARD.fullmatch(name) for name in there):
        return False
    mark = {MANIFEST: f'"format": "{FORMAT}"', CARD: "- gft-toolkit\n"}
    name = MANIFEST if MANIFEST in there else CARD
    if name not in there or there[name].size > MAX_MANIFEST_BYTES:
        return False
    return mark[name] in Path(api.hf_hub_download(plan.repo, name, repo_type="dataset", revision=commit)).read_text(
        encoding="utf-8", errors="replace"
    )


def _same(file: Upload, there: "RepoFile | None") -> bool:
    """Whether the Hub has exactly this file."""
    from huggingface_hub.utils.sha import git_hash

    if there is None or there.size != file.bytes:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    content = file.source if isinstance(file.source, bytes) else read_file(file.source)
    return there.blob_id == git_hash(content)


def _chunks(files: Sequence[Upload]) -> Iterator[list[Upload]]:
    chunk: list[Upload] = []
    for file in files:
        if chunk and (len(chunk) >= AT_ONCE_FILES or sum(f.bytes for f in chunk) + file.bytes > AT_ONCE_BYTES):
            yield chunk
            chunk = []
        chunk.append(file)
    if chunk:
        yield chunk


def _commits(
    additions: "list[CommitOperationAdd]", deletions: "list[CommitOperationDelete]", replaces_manifest: bool
) -> "list[list[CommitOperationAdd | CommitOperationDelete]]":
    """One commit where it can be; else the card first, which says whose it is, and the manifest last."""
    from huggingface_hub import CommitOperationDelete

    changes: list[CommitOperationAdd | CommitOperationDelete] = [*additions, *deletions]
    if len(changes) <= MAX_CHANGES:
        return [changes]
    order = {CARD: 0, MANIFEST: 2}
    changes.sort(key=lambda change: order.get(change.path_in_repo, 1))
    if replaces_manifest:
        changes.insert(0, CommitOperationDelete(MANIFEST))
    return [changes[start : start + MAX_CHANGES] for start in range(0, len(changes), MAX_CHANGES)]
