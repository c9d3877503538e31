"""The Hub's HTTP API as huggingface_hub speaks it, over repositories in memory: a real client pushes to it and pulls.

Contents of at least LFS_BYTES, and all Parquet, are uploaded by the LFS protocol and referred to in commits; the rest
comes in the commits themselves. Counts what is asked for, checks tokens, and breaks when it is told to.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ = "hf_test_token_that_writes", "hf_test_token_that_reads"
LFS_BYTES = 10 * 2**20
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other")
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all of its files."""

    private: bool
    commits: list[tuple[str, Files]] = field(default_factory=list)
    uploaded: set[str] = field(default_factory=set)  # sha256 of contents, in a commit or not

    @property
    def files(self) -> Files:
        return self.commits[-1][1]

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: Files) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}{self.private}".encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, Files] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class FakeHub:
    """The server; `repos` is what is on it, by name, and `models` what the pages of models say, by name."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}  # uploaded by LFS
        self.asked: list[str] = []  # METHOD path
        self.fault: Callable[[str], str | None] = lambda asked: None  # "cut", "403", "429", ... for this request
        self.before_commit: Callable[[Repo], None] = lambda repo: None
        self.served: Callable[[str, bytes], bytes] = lambda name, content: content  # what a download of it brings
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, method: str, part: str) -> int:
        return sum(asked.startswith(method) and part in asked for asked in self.asked)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        hub.asked.append(asked)
        fault = hub.fault(asked)
        if fault == "cut":
            self.rfile.read(min(10, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        if fault is not None and fault != "half":
            self.refuse(int(fault), "", "out of order")
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (WRITE, READ) and not path.startswith("/lfs/"):
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        writes = "/preupload/" in path or "/commit/" in path or path.endswith(("/repos/create", "/objects/batch"))
        if writes and token != WRITE:
            self.refuse(403 if token else 401, "", "You don't have the rights to write here")
            return
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(?:/revision/.+)?", self.model),
            ("GET", r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", self.info),
            ("GET", r"/api/datasets/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", self.tree),
            ("POST", r"/api/datasets/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", self.paths_info),
            ("POST", r"/api/datasets/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", self.preupload),
            ("POST", r"/api/datasets/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", self.commit),
            ("POST", r"/datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<sha256>\w+)", self.lfs_put),
            ("GET", r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", self.resolve),
        ]
        for method, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                found = match.groupdict()
                if "repo" in found and answer not in (self.create, self.lfs_put):
                    repo = hub.repos.get(found["repo"])
                    if repo is None or (repo.private and not token):
                        self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
                        return
                    if found.get("revision") and repo.at(found["revision"]) is None:
                        self.refuse(404, "RevisionNotFound", "Invalid rev id")
                        return
                answer(body=body, **found)
                return
        self.refuse(404, "", "no such route")

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # ---- repositories

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        if asked["organization"] != "someone":
            self.refuse(403, "", "You don't have the rights to create a dataset under this namespace")
            return
        url = {"url": f"{self.hub.endpoint}/datasets/{name}", "name": name}
        if name in self.hub.repos:
            self.answer_json({**url, "error": "You already created this dataset repo"}, 409)
            return
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[name].commit({".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})
        self.answer_json(url)

    def validate_yaml(self, body: bytes) -> None:
        found = re.search(r"^license: (\S+)$", json.loads(body)["content"], re.M)
        if found and found[1] in LICENSES:
            self.answer_json({"errors": [], "warnings": []})
        else:
            self.answer_json({"errors": [{"message": f'"license" must be one of {LICENSES}'}], "warnings": []}, 400)

    def info(self, repo: str, revision: str | None, body: bytes) -> None:
        here = self.hub.repos[repo]
        commit = here.at(revision or "main")
        assert commit is not None
        siblings = [{"rfilename": name} for name in commit[1]]
        self.answer_json({"id": repo, "sha": commit[0], "private": here.private, "siblings": siblings, "tags": []})

    def model(self, name: str, body: bytes) -> None:
        if name not in self.hub.models:
            self.refuse(404, "RepoNotFound", "Repository not found")
        else:
            self.answer_json({"id": name, "sha": "0" * 40, "cardData": self.hub.models[name]})

    def tree(self, repo: str, revision: str, under: str | None, body: bytes) -> None:
        commit = self.hub.repos[repo].at(revision)
        assert commit is not None
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{under}/" if under else ""
        found = {name: content for name, content in commit[1].items() if name.startswith(prefix)}
        entries = [
            entry_of(name, content) for name, content in found.items() if recursive or "/" not in name[len(prefix) :]
        ]
        folders = {name[: name.index("/", len(prefix))] for name in found if "/" in name[len(prefix) :]}
        self.answer_json(
            [*entries, *({"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders))]
        )

    def paths_info(self, repo: str, revision: str, body: bytes) -> None:
        commit = self.hub.repos[repo].at(revision)
        assert commit is not None
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        found = [entry_of(name, commit[1][name]) for name in paths if name in commit[1]]
        folders = [p for p in paths if any(name.startswith(f"{p}/") for name in commit[1])]
        self.answer_json([*found, *({"type": "directory", "path": p, "oid": "0" * 40} for p in folders)])

    # ---- pushing

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        files = self.hub.repos[repo].files
        self.answer_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": entry_of(file["path"], files[file["path"]])["oid"] if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def lfs_batch(self, repo: str, body: bytes) -> None:
        here, objects = self.hub.repos[repo], []
        for asked in json.loads(body)["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in here.uploaded:
                found["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{repo}/{asked['oid']}"}}
            objects.append(found)
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo: str, sha256: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            self.refuse(400, "", "content and oid differ")
            return
        self.hub.contents[sha256] = body
        self.hub.repos[repo].uploaded.add(sha256)
        self.answer(b"")

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        here = self.hub.repos[repo]
        self.hub.before_commit(here)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if len(operations) >= 100:
            self.refuse(400, "", "too many files in a commit")
            return
        if header["value"].get("parentCommit") not in (None, here.head):
            self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        files = dict(here.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                assert value["oid"] in here.uploaded
                files[value["path"]] = self.hub.contents[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = here.commit(files)
        self.answer_json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/datasets/{repo}/commit/{oid}"}
        )

    # ---- downloading

    def resolve(self, repo: str, revision: str, name: str, body: bytes) -> None:
        commit = self.hub.repos[repo].at(revision)
        assert commit is not None
        if name not in commit[1]:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        entry, content = entry_of(name, commit[1][name]), self.hub.served(name, commit[1][name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers, status = {"X-Repo-Commit": commit[0], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            end = int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {asked[1]}-{end}/{len(content)}"
            content, status = content[int(asked[1]) : end + 1], 206
            self.hub.asked[-1] += f" from {asked[1]}"
        self.answer(content, status, headers, half=self.hub.fault(f"{self.command} {name}") == "half")

    # ---- answers

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.answer(json.dumps({"error": message}).encode(), status, {**headers, "X-Error-Message": message})

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def answer(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, *, half: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)

    def log_message(self, *_: Any) -> None:
        pass


def is_lfs(name: str, size: int) -> bool:
    return name.endswith(".parquet") or size >= LFS_BYTES


def entry_of(name: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    entry = {"type": "file", "path": name, "size": len(content)}
    if is_lfs(name, len(content)):
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return {**entry, "oid": hashlib.sha1(sha256.encode()).hexdigest(), "lfs": lfs}
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
