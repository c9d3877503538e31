"""push.py, pull.py and hub.py: the real client and the real command against a server that speaks the Hub's HTTP API."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aid.fake_hub import READ, WRITE, FakeHub, Repo

from gftdata.errors import UserError
from gftdata.hub import repo_name, said_in_one_line
from gftdata.manifest import read_manifest
from gftdata.shards import verify

REPO = "someone/sums"
NO_WAITING = "import time; time.sleep = lambda seconds: None\n"  # the client waits longer after each failure


@pytest.fixture(scope="module")
def smaller(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version: a part of the data, in 1 shard."""
    from gftdata.derive import derive
    from gftdata.regroup import plan_filter

    out = tmp_path_factory.mktemp("hub") / "smaller"
    derive(plan_filter(data, out, max_pass=0.9, groups_per_shard=30))
    assert len(read_manifest(out).shards) == 1
    return out


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.stop()


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that the user reads."""
        assert self.code == 2 and len(self.err.splitlines()) == 1, self
        assert self.err.startswith("error: ") and WRITE not in self.err and READ not in self.err
        return self.err


Gft = Callable[..., Result]


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Callable[..., Result]:
    """Run Python in a process of its own: the endpoint is read when huggingface_hub is imported."""

    def run(script: str, *arguments: str | Path, **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
                "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": WRITE,
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def gft(run: Callable[..., Result]) -> Gft:
    def gft(*arguments: str | Path, before: str = "", **environment: str) -> Result:
        return run(f"{before}\nfrom gftcli.main import main\nmain()", *arguments, **environment)

    return gft


@pytest.fixture
def shared(hub: FakeHub, data: Path) -> Repo:
    """The data set on the Hub, as `push` puts it there; without a card."""
    repo = hub.repos[REPO] = Repo(private=False)
    names = ["manifest.json", *(f"data/{path.name}" for path in (data / "data").iterdir())]
    repo.commit({name: (data / name).read_bytes() for name in names})
    return repo


def push(gft: Gft, folder: Path, *more: str, before: str = "", **environment: str) -> Result:
    return gft("push", folder, REPO, "--license", "mit", *more, before=before, **environment)


def pushed_names(repo: Repo) -> list[str]:
    return sorted(repo.files.keys() - {".gitattributes"})


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a data set but its card and what is in .work/."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".work/") and name != "README.md"}


def edit_manifest(repo: Repo, change: Callable[[dict[str, Any]], Any]) -> None:
    """A commit with another manifest."""
    manifest = json.loads(repo.files["manifest.json"])
    del manifest["checksum"]
    change(manifest)
    repo.commit({**repo.files, "manifest.json": json.dumps(manifest).encode()})


@pytest.mark.parametrize("name", ["name", "a/b/c", "../x", "a/", "/a", "a b/c", "hf://datasets/a", "https://x/a/b", ""])
def test_what_a_name_on_the_hub_may_be(name: str) -> None:
    assert repo_name("a/b") == repo_name("hf://datasets/a/b") == "a/b"
    with pytest.raises(UserError, match="expected owner/name"):
        repo_name(name)


def test_a_disk_that_fails_is_not_the_network() -> None:
    said = r"a/b: the disk here fails: \[Errno 30\] Read-only file system: 'a'; mend that"
    with pytest.raises(UserError, match=said), said_in_one_line("a/b", "pull"):
        raise OSError(errno.EROFS, "Read-only file system", "a")


# ---- there and back


def test_there_and_back_is_the_identity_and_a_second_push_no_commit(
    hub: FakeHub, gft: Gft, data: Path, tmp_path: Path
) -> None:
    first = push(gft, data)
    assert first.code == 0, first.err
    assert f"{hub.endpoint}/datasets/{REPO}" in first.out and "commits      1\n" in first.out
    repo = hub.repos[REPO]
    shards = [f"data/{record.name}" for record in read_manifest(data).shards]
    assert pushed_names(repo) == ["README.md", *shards, "manifest.json"]
    assert len(repo.commits) == 2 and not repo.private

    commits = len(repo.commits)
    again = push(gft, data)
    assert again.code == 0 and "nothing has changed: no commit" in again.out
    assert len(repo.commits) == commits and hub.count("PUT", "/lfs/") == 3

    for _ in range(2):  # the second time everything is there
        back = gft("pull", REPO, tmp_path / "back", HF_TOKEN=READ)
        assert back.code == 0 and "whole: 24 groups in 3 shards" in back.out, back.err
        assert content_of(tmp_path / "back") == content_of(data)
        assert not (tmp_path / "back" / ".work").exists()
        assert verify(tmp_path / "back") == []
    assert hub.count("GET", "parquet") == 3
    assert "0 shards, 0.0 MB, 3 were there" in back.out
    assert (tmp_path / "back" / "README.md").read_bytes() == repo.files["README.md"]


def test_what_is_pushed_loads_with_load_dataset_and_trains(
    hub: FakeHub, gft: Gft, run: Callable[..., Result], data: Path, demo: Path, tmp_path: Path
) -> None:
    assert push(gft, data).code == 0
    script = (
        "import json, datasets; d = datasets.load_dataset('someone/sums');"
        "print(json.dumps({k: [v.num_rows, v.column_names, v[0]['rewards'], v.features['ref_logprobs'].feature.feature"
        ".dtype] for k, v in d.items()}))"
    )
    loaded = run(script, HF_TOKEN=READ)
    assert loaded.code == 0, loaded.err
    import pyarrow.parquet as pq

    first = pq.read_table(data / "data" / read_manifest(data).shards[0].name)
    rewards = first["rewards"][0].as_py()
    assert json.loads(loaded.out) == {"train": [24, first.column_names, rewards, "float32"]}

    # the command of the card
    card = hub.repos[REPO].files["README.md"].decode()
    config = tmp_path / "train.yaml"
    settings = card.split("`train.yaml`:\n\n```yaml\n")[1].split("```")[0]
    config.write_text(settings.replace("runs/gft", str(tmp_path / "run")).replace("demo/model", str(demo / "model")))
    planned = gft("train", config, "--dry-run", "--set", "device=cpu", HF_TOKEN=READ)
    assert planned.code == 0 and "24" in planned.out, planned.err


def test_a_dry_run_shows_files_and_card_and_asks_for_nothing(hub: FakeHub, gft: Gft, data: Path) -> None:
    shown = push(gft, data, "--dry-run", HF_TOKEN="")
    assert shown.code == 0, shown.err
    assert not [asked for asked in hub.asked if "agent-harnesses" not in asked] and not hub.repos
    for name in ("README.md", "manifest.json", *(f"data/{record.name}" for record in read_manifest(data).shards)):
        assert f"  {name}\n" in shown.out
    assert "license: mit" in shown.out and "## Limits" in shown.out and "uploaded             nothing" in shown.out


# ---- push


def test_a_licence_is_asked_for(hub: FakeHub, gft: Gft, data: Path) -> None:
    for wrong in ((), ("--license", "My Licence")):
        said = gft("push", data, REPO, *wrong).error
        assert "--license apache-2.0, --license cc-by-4.0" in said
    said = gft("push", data, REPO, "--license", "no-such").error
    assert '"license" must be one of' in said
    assert "manifest.json" not in hub.repos[REPO].files


def test_only_a_whole_data_set_is_pushed(hub: FakeHub, gft: Gft, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = copy / "data" / read_manifest(copy).shards[1].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (copy / "data" / "stray.parquet").write_bytes(b"x")
    said = push(gft, copy).error
    assert f"{shard}: sha256" in said and "stray.parquet: not in the manifest" in said and "2 things are wrong" in said
    (copy / "manifest.json").unlink()
    assert "an unfinished data set" in push(gft, copy).error
    assert not hub.repos


def test_another_version_replaces_the_first_in_one_commit(
    hub: FakeHub, gft: Gft, data: Path, smaller: Path, tmp_path: Path
) -> None:
    assert push(gft, data).code == 0
    repo = hub.repos[REPO]
    repo.commit({**repo.files, "quarantine.jsonl": b"", "notes.txt": b"of somebody"})
    before = len(repo.commits)
    second = push(gft, smaller)
    assert second.code == 0 and "4 of an earlier version deleted" in second.out, second
    assert len(repo.commits) == before + 1
    shards = [f"data/{record.name}" for record in read_manifest(smaller).shards]
    assert pushed_names(repo) == ["README.md", *shards, "manifest.json", "notes.txt"]
    first = gft("pull", REPO, tmp_path / "first", "--revision", repo.commits[before - 2][0])
    assert first.code == 0 and content_of(tmp_path / "first") == content_of(data), first.err
    assert "holds another data set, or another version" in gft("pull", REPO, tmp_path / "first").error


def test_of_several_commits_only_the_last_has_a_manifest(
    hub: FakeHub, gft: Gft, data: Path, smaller: Path, tmp_path: Path
) -> None:
    few = "import gftdata.push\ngftdata.push.MAX_CHANGES = 2\n"
    assert push(gft, data, before=few).code == 0
    repo = hub.repos[REPO]
    assert ["manifest.json" in files for _, files in repo.commits] == [False, False, False, True]

    cut = {"left": 1}  # the second version is cut off after its first commit

    def after_one(asked: str) -> str | None:
        if "/commit/" in asked:
            cut["left"] -= 1
            return "403" if cut["left"] < 0 else None
        return None

    hub.fault = after_one
    assert "the Hub refuses HF_TOKEN" in push(gft, smaller, before=few).error
    assert "manifest.json" not in repo.files
    assert "has no manifest.json" in gft("pull", REPO, tmp_path / "back").error
    hub.fault = lambda asked: None
    assert push(gft, smaller, before=few).code == 0
    shards = [f"data/{record.name}" for record in read_manifest(smaller).shards]
    assert pushed_names(repo) == ["README.md", *shards, "manifest.json"]
    assert gft("pull", REPO, tmp_path / "back").code == 0
    assert content_of(tmp_path / "back") == content_of(smaller)


def test_a_push_that_the_network_cut_off_continues(hub: FakeHub, gft: Gft, data: Path) -> None:
    last = read_manifest(data).shards[2].sha256
    hub.fault = lambda asked: "cut" if last in asked else None
    said = push(gft, data, before=NO_WAITING).error
    assert "the Hub has not taken it" in said and "give the same command again, it continues" in said
    repo = hub.repos[REPO]
    assert pushed_names(repo) == [] and len(repo.uploaded) == 2
    hub.fault, hub.asked[:] = lambda asked: None, []
    assert push(gft, data).code == 0
    assert hub.count("PUT", "/lfs/") == 1
    assert "manifest.json" in repo.files and len(repo.commits) == 2


def test_a_change_by_somebody_else_is_not_overwritten(hub: FakeHub, gft: Gft, data: Path) -> None:
    def meanwhile(repo: Repo) -> None:
        if len(repo.commits) == 1:
            repo.commit({**repo.files, "notes.txt": b"of somebody"})

    hub.before_commit = meanwhile
    assert "it has changed on the Hub meanwhile" in push(gft, data).error
    assert pushed_names(hub.repos[REPO]) == ["notes.txt"]
    assert push(gft, data).code == 0
    assert {"notes.txt", "manifest.json"} < set(pushed_names(hub.repos[REPO]))


def test_a_repository_of_something_else_is_left_alone(hub: FakeHub, run: Callable[..., Result], data: Path) -> None:
    others: list[dict[str, bytes]] = [
        {"data/train-00000-of-00001.parquet": b"x"},
        {"data/train-00000-of-00001.parquet": b"x", "README.md": b"# another"},
        {"data/other.parquet": b"x", "manifest.json": b'{"format": "gft-groups"}'},
        {"manifest.json": b'{"format": "another"}'},
    ]
    script = """
import sys
from pathlib import Path
from gftdata.errors import UserError
from gftdata.push import plan_push, push
for name in sys.argv[2:]:
    try:
        push(plan_push(Path(sys.argv[1]), name, license="mit"))
    except UserError as error:
        print(error)
"""
    for number, files in enumerate(others):
        repo = hub.repos[f"someone/r{number}"] = Repo(private=False)
        repo.commit(files)
    done = run(script, data, *hub.repos)
    assert done.out.count("holds something else than a data set of gft push") == len(others), done
    assert [repo.files for repo in hub.repos.values()] == others


def test_who_may_push(hub: FakeHub, gft: Gft, data: Path) -> None:
    assert "set HF_TOKEN to a token that may write" in push(gft, data, HF_TOKEN="").error
    assert "the Hub does not know HF_TOKEN" in push(gft, data, HF_TOKEN="hf_unknown").error
    assert "a token that may write to someone" in push(gft, data, HF_TOKEN=READ).error
    said = gft("push", data, "nobody/sums", "--license", "mit").error
    assert said.startswith("error: nobody/sums: the Hub refuses HF_TOKEN there")
    assert not hub.repos
    hub.fault = lambda asked: "429" if "/commit/" in asked else None
    assert "the Hub asks to wait" in push(gft, data).error


def test_private(hub: FakeHub, gft: Gft, data: Path, tmp_path: Path) -> None:
    assert push(gft, data, "--private").code == 0
    assert hub.repos[REPO].private
    said = gft("pull", REPO, tmp_path / "back", HF_TOKEN="").error
    assert "no such data set, or not for you: check the name, and HF_TOKEN" in said
    assert gft("pull", REPO, tmp_path / "back", HF_TOKEN=READ).code == 0
    hub.repos[REPO].private = False
    assert "is public on the Hub" in push(gft, data, "--private").error


def test_what_must_not_be_shared_is_refused_by_its_key(hub: FakeHub, gft: Gft, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["recipe"]["prompts"]["system"] = "the word is planted-value-1"
    manifest["recipe"]["engine"]["urls"] = ["http://node1:30000"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = push(gft, copy, PLANTED_API_KEY="planted-value-1").error
    assert "manifest.json: recipe.prompts.system: the value of PLANTED_API_KEY" in said
    assert "manifest.json: recipe.engine.urls.0: a URL" in said
    assert "planted-value-1" not in said and "node1" not in said
    shutil.copy(data / "manifest.json", copy)
    (copy / "quarantine.jsonl").write_text(json.dumps({"prompt_id": "a", "reason": f"no {copy}/x"}) + "\n")
    assert "quarantine.jsonl, line 1: entry.reason: " in push(gft, copy).error
    assert not hub.repos


def test_licences_of_models_are_asked_of_the_hub(hub: FakeHub, gft: Gft, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["checksum"]
    names = ["org/stated", "org/named", "org/silent", "org/gone"]
    manifest["models"] = [{"role": f"teacher:{n[4:]}", "name": n, "revision": "a" * 40} for n in names]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    hub.models = {
        "org/stated": {"license": "apache-2.0"},
        "org/named": {"license": "other", "license_name": "a-licence"},
        "org/silent": {},
    }
    card = push(gft, copy, "--dry-run").out
    assert "| apache-2.0 (says the model's page) |" in card and "| a-licence (says the model's page) |" in card
    assert card.count("| not stated; look at the model's page |") == 2
    offline = push(gft, copy, "--dry-run", HF_HUB_OFFLINE="1").out
    assert offline.count("| not stated; look at the model's page |") == 4


# ---- pull


@pytest.mark.parametrize("fault", ["cut", "half"])
def test_a_pull_that_was_cut_off_leaves_no_data_set_and_continues(
    hub: FakeHub, gft: Gft, shared: Repo, data: Path, tmp_path: Path, fault: str
) -> None:
    last = read_manifest(data).shards[2].name
    hub.fault = lambda asked: fault if asked.startswith("GET") and asked.endswith(last) else None
    said = gft("pull", REPO, tmp_path / "back", before=NO_WAITING).error
    assert "the Hub has not given it" in said and "give the same command again, it continues" in said
    assert not (tmp_path / "back" / "manifest.json").exists()
    assert len(list((tmp_path / "back" / "data").iterdir())) == 2
    assert "an unfinished data set; give the command that makes it again" in gft("validate", tmp_path / "back").error
    assert "holds an unfinished pull of someone/sums" in gft("pull", "someone/else", tmp_path / "back").error

    hub.fault, hub.asked[:] = lambda asked: None, []
    done = gft("pull", REPO, tmp_path / "back")
    assert done.code == 0 and "1 shards, 0.0 MB, 2 were there" in done.out, done
    fetched = [asked for asked in hub.asked if asked.startswith("GET") and "parquet" in asked]
    assert len(fetched) == 1 and (fault == "cut" or not fetched[0].endswith(" from 0"))
    assert content_of(tmp_path / "back") == content_of(data)


def test_a_newer_version_takes_the_place_of_an_unfinished_pull(
    hub: FakeHub, gft: Gft, shared: Repo, smaller: Path, tmp_path: Path
) -> None:
    hub.fault = lambda asked: (
        "cut" if asked.startswith("GET") and asked.endswith("train-00002-of-00003.parquet") else None
    )
    assert gft("pull", REPO, tmp_path / "back", before=NO_WAITING).code == 2
    hub.fault = lambda asked: None
    shared.commit(content_of(smaller))
    assert gft("pull", REPO, tmp_path / "back").code == 0
    assert content_of(tmp_path / "back") == content_of(smaller)


def test_a_changed_byte_is_found_and_named(hub: FakeHub, gft: Gft, shared: Repo, data: Path, tmp_path: Path) -> None:
    name = f"data/{read_manifest(data).shards[1].name}"
    changed = bytearray(shared.files[name])
    changed[len(changed) // 2] ^= 1

    hub.served = lambda asked, content: bytes(changed) if asked == name else content  # the listing says nothing of it
    said = gft("pull", REPO, tmp_path / "back").error
    assert said.startswith(f"error: {REPO}/{name}: damaged or changed: downloaded 2 times, sha256 ")
    assert not (tmp_path / "back" / "manifest.json").exists()
    hub.served = lambda asked, content: content
    assert gft("pull", REPO, tmp_path / "back").code == 0

    shared.commit({**shared.files, name: bytes(changed)})
    hub.asked.clear()
    assert f"{REPO}/{name}: damaged or changed: sha256 " in gft("pull", REPO, tmp_path / "other").error
    assert not hub.count("GET", name)

    here = tmp_path / "back" / name  # on this machine's disk
    here.write_bytes(changed)
    shared.commit(shared.commits[0][1])
    assert "1 shards" in gft("pull", REPO, tmp_path / "back").out
    assert content_of(tmp_path / "back") == content_of(data)


def test_what_is_whole_by_its_checksums_and_still_no_data_set(
    gft: Gft, shared: Repo, data: Path, tmp_path: Path
) -> None:
    import hashlib

    record = read_manifest(data).shards[0]
    other = b"no Parquet at all"
    shared.commit({**shared.files, f"data/{record.name}": other})
    digest = hashlib.sha256(other).hexdigest()
    edit_manifest(shared, lambda manifest: manifest["shards"][0].update(sha256=digest, bytes=len(other)))
    assert "not a whole data set" in gft("pull", REPO, tmp_path / "back").error
    assert not (tmp_path / "back" / "manifest.json").exists()


LIES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m["shards"][0].update(name="../../evil.parquet"), "names a shard outside its data folder"),
    (lambda m: m["shards"][0].update(name="/tmp/evil.parquet"), "names a shard outside its data folder"),
    (lambda m: m["shards"].append(m["shards"][0]), "twice"),
    (lambda m: m["shards"][0].update(rows=-1), "shards.0.rows: Input should be greater than or equal to 0"),
    (lambda m: m["shards"][0].update(bytes=10**15), "the manifest says 1,000,000,000,000,000"),
    (lambda m: m["shards"][0].update(bytes=10**30), "shards.0.bytes"),
    (lambda m: m["shards"][0].update(bytes="18095"), "shards.0.bytes: Input should be a valid integer"),
    (lambda m: m["shards"][0].update(name="train-00009-of-00009.parquet"), "the Hub has no such file"),
    (lambda m: m["shards"][0].update(sha256="0" * 64), "damaged or changed: sha256"),
    (lambda m: m["summary"].update(groups="\x1b[2Jmany"), "summary.groups"),
    (lambda m: m["summary"]["sources"][0].update(pass_rate=float("nan")), "NaN is no number of JSON"),
    (lambda m: m.update(schema_version=99), "expected format gft-groups version 1"),
    (lambda m: m.update(more="x"), "more: Extra inputs are not permitted"),
]
NO_MANIFESTS = [
    (b"[" * 200_000, "not a manifest"),
    (b'{"format": "gft-groups"', "not a manifest"),
    (b" " * (64 * 2**20 + 1), "67,108,865 bytes, expected at most 67,108,864"),
]
PULL_ALL = """
import sys
from pathlib import Path
from gftdata.errors import UserError
from gftdata.pull import pull
for revision in sys.argv[2:]:
    try:
        pull("someone/sums", Path(sys.argv[1]), revision=revision)
        print("pulled")
    except UserError as error:
        print(error)
"""


def test_a_manifest_that_lies_is_refused_before_anything_is_downloaded(
    hub: FakeHub, run: Callable[..., Result], shared: Repo, tmp_path: Path
) -> None:
    honest = shared.files
    for change, _ in LIES:
        shared.commit(honest)
        edit_manifest(shared, change)
    for content, _ in NO_MANIFESTS:
        shared.commit({**honest, "manifest.json": content})
    expected = [saying for _, saying in LIES] + [saying for _, saying in NO_MANIFESTS]
    revisions = [oid for oid, files in shared.commits if files["manifest.json"] != honest["manifest.json"]]
    done = run(PULL_ALL, tmp_path / "back", *revisions)
    assert done.code == 0, done.err
    said = done.out.splitlines()
    assert len(said) == len(expected)
    for line, saying in zip(said, expected, strict=True):
        assert saying in line and line.startswith("someone/sums/") and line.isprintable()
    assert not hub.count("GET", "parquet") and not (tmp_path / "back").exists()


def test_a_full_disk_is_said_before_the_download(hub: FakeHub, gft: Gft, shared: Repo, tmp_path: Path) -> None:
    full = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)\n"
    assert "and 1.0 MB are free there" in gft("pull", REPO, tmp_path / "back", before=full).error
    assert not hub.count("GET", "parquet")


def test_what_the_hub_does_not_have(hub: FakeHub, gft: Gft, shared: Repo, tmp_path: Path) -> None:
    assert "no such data set, or not for you" in gft("pull", "someone/none", tmp_path / "back").error
    assert "the Hub has no revision v2 of it" in gft("pull", REPO, tmp_path / "back", "--revision", "v2").error
    assert "the Hub does not know HF_TOKEN" in gft("pull", REPO, tmp_path / "back", HF_TOKEN="hf_unknown").error
    assert "the Hub has not given it" in gft("pull", REPO, tmp_path / "back", HF_HUB_OFFLINE="1").error
    assert not (tmp_path / "back").exists()


def test_of_two_pulls_into_one_folder_one_is_refused(gft: Gft, shared: Repo, tmp_path: Path) -> None:
    staged = tmp_path / "back" / ".work" / "pull"
    staged.mkdir(parents=True)
    with (staged / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another gft pull is writing to it" in gft("pull", REPO, tmp_path / "back").error
    assert gft("pull", REPO, tmp_path / "back").code == 0


def test_a_folder_that_holds_something_else_is_left_alone(
    gft: Gft, shared: Repo, smaller: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "not empty" in gft("pull", REPO, other).error
    copy = Path(shutil.copytree(smaller, tmp_path / "copy"))
    before = content_of(copy)
    assert "holds another data set" in gft("pull", REPO, copy).error
    (copy / "manifest.json").unlink()
    assert "not empty" in gft("pull", REPO, copy).error
    assert content_of(copy) == {name: content for name, content in before.items() if name != "manifest.json"}
    (tmp_path / "file").write_text("a file")
    assert "cannot be a folder" in gft("pull", REPO, tmp_path / "file").error
