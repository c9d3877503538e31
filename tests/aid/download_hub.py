"""A Hub on this machine: the endpoints through which models and data sets are sized and downloaded.

`folder` holds models/<owner>/<name>/... and datasets/<owner>/<name>/...; every repository has one commit, on main.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class DownloadHub:
    """Serves until it is stopped; notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(self.path.partition("?")[0])
                hub.asked.append(f"{self.command} {path}{' range' if 'Range' in self.headers else ''}")
                if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
                    self.api(match[1], match[2], match[3] or "")
                elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    root = folder / ("datasets" if match[1] else "models") / match[2]
                    if root.is_dir() and match[3] not in ("main", COMMIT):
                        self.refuse("RevisionNotFound")
                    else:
                        self.file(root, match[4])
                else:
                    self.refuse("RepoNotFound")

            def api(self, kind: str, repo: str, rest: str) -> None:
                root = folder / kind / repo
                files = sorted(path for path in root.rglob("*") if path.is_file())
                names = [str(path.relative_to(root)) for path in files]
                if not root.is_dir():
                    self.refuse("RepoNotFound")
                elif match := re.fullmatch(r"/tree/[^/]+/?(.*)", rest):
                    below = [self.entry(root, name) for name in names]
                    inside = match[1].rstrip("/")
                    found = [e for e in below if not inside or e["path"].startswith(f"{inside}/")]
                    self.answer(json.dumps(found).encode())
                elif re.fullmatch(r"/paths-info/[^/]+", rest):
                    asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
                    wanted = (
                        json.loads(asked)["paths"] if asked.startswith("{") else re.findall(r"paths=([^&]+)", asked)
                    )
                    wanted = [unquote(name) for name in wanted]
                    self.answer(json.dumps([self.entry(root, name) for name in wanted if name in names]).encode())
                elif re.fullmatch(r"(/revision/[^/]+)?", rest):
                    siblings = [{"rfilename": name, "size": (root / name).stat().st_size} for name in names]
                    about = {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                    self.answer(json.dumps(about).encode())
                else:
                    self.refuse("EntryNotFound")

            def entry(self, root: Path, name: str) -> dict[str, Any]:
                content = (root / name).read_bytes()
                return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

            def file(self, root: Path, name: str) -> None:
                if not (root / name).is_file():
                    self.refuse("EntryNotFound" if root.is_dir() else "RepoNotFound")
                    return
                content = (root / name).read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                status = 200
                if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    end = min(int(asked[2] or len(content) - 1), len(content) - 1)
                    headers["Content-Range"] = f"bytes {asked[1]}-{end}/{len(content)}"
                    content, status = content[int(asked[1]) : end + 1], 206
                self.answer(content, status, headers)

            def refuse(self, code: str) -> None:
                self.answer(b"", 404, {"X-Error-Code": code})

            def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
