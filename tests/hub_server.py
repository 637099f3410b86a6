"""A fake Hugging Face Hub on localhost: the endpoints that huggingface_hub uses, and a log of requests."""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A repository: the files of each branch or tag. If gated or private, its token is required."""

    branches: dict[str, dict[str, bytes]]
    gated: str | None = None
    private: str | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes after which its next responses are cut

    def commit(self, revision):
        """Return (commit hash, files), or None."""
        for name, files in self.branches.items():
            contents = b"".join(path.encode() + data for path, data in sorted(files.items()))
            digest = hashlib.sha1(contents).hexdigest()
            if revision in (name, digest):
                return digest, files
        return None


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.log: list[tuple[str, str, str | None, str | None]] = []  # method, path, Range, Authorization

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self):
        """The files requested with GET, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, *_ in self.log if "/resolve/" in path
                and method == "GET"]  # fmt: skip

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect."""


@contextmanager
def running():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        if path.startswith("/api/") and not path.startswith("/api/models/"):
            return self.refuse(404, None, "no such endpoint")
        self.server.log.append((self.command, path, self.headers.get("Range"), token))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.server.repositories.get("/".join(parts[:2]))
        if token == "Bearer revoked":
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token != f"Bearer {repository.private}"):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif path.startswith("/api/models/"):
            kind, revision = (*parts[2:], "revision", "main")[:2]
            self.describe(repository, kind, revision)
        elif repository.gated and token != f"Bearer {repository.gated}":
            self.refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        else:
            self.send_file(repository, parts[3], "/".join(parts[4:]))
        return None

    def describe(self, repository, kind, revision):
        found = repository.commit(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if kind == "tree":
            return self.answer(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
            )
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return self.answer(
            {"id": "a/b", "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        )

    def send_file(self, repository, revision, name):
        found = repository.commit(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if name not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            cuts = repository.cut.get(name)
            if cuts:
                data, self.close_connection = data[: start + cuts.pop(0)], True
            self.wfile.write(data[start:])
        return None

    def answer(self, content, status=200, headers=()):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        headers = [("X-Error-Message", message)] + ([("X-Error-Code", code)] if code else [])
        self.answer({"error": message}, status, headers)
