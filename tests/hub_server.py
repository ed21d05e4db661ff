"""A Hugging Face Hub for tests: what huggingface_hub asks of it through HF_ENDPOINT, for models, in memory."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from tests.local_server import LocalServer


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by hash, the files by path
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listed = [f"{len(self.commits)}", *(f"{path} {blob_id(files[path])}" for path in sorted(files))]
        commit = hashlib.sha1("\n".join(listed).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def resolve(self, revision: str) -> str:
        """A branch, tag or commit -> the commit."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        if found not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


class Refused(Exception):
    """An error as the Hub answers it."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **body):
        self.status, self.code, self.message = status, code, message
        self.body = {"error": message, **body}


def blob_id(content: bytes) -> str:
    """Git's."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(LocalServer):
    """
    Everybody may read public repositories; whoever brings `token` may read and write all.

    Every file is committed inline ("regular"): there is no LFS or Xet storage here.
    """

    def __init__(self, token: str = "hf_test"):
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.asked: list[tuple[str, str]] = []  # method and path
        self.lock = threading.RLock()

    def handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path
                with hub.lock:
                    hub.asked.append((self.command, path))
                    try:
                        status, headers, content = hub.answer(self.command, path, body, self.headers)
                    except Refused as refused:
                        status, content = refused.status, json.dumps(refused.body).encode()
                        headers = {"X-Error-Code": refused.code} if refused.code else {}
                        headers |= {"X-Error-Message": refused.message}
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = answer

        return Handler

    def answer(self, method: str, path: str, body: bytes, headers) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        signed_in = headers.get("Authorization") == f"Bearer {self.token}"
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a branch's own slash is quoted
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repo = self.find("/".join(parts[2:4]), signed_in)
            repo_id, action = "/".join(parts[2:4]), (parts[4] if len(parts) > 4 else "revision")
            revision, inside = (parts[5] if len(parts) > 5 else "main"), "/".join(parts[6:])
            if method == "GET":
                return send_json(getattr(self, f"get_{action}")(repo, repo_id, revision, inside))
            self.require(signed_in)
            return send_json(getattr(self, f"post_{action}")(repo, repo_id, revision, body))
        if method == "POST" and parts == ["api", "repos", "create"]:
            self.require(signed_in)
            return send_json(self.create(json.loads(body)))
        if method == "POST" and parts == ["api", "validate-yaml"]:
            return send_json(validate_card(json.loads(body)["content"]))
        if method == "GET" and parts == ["api", "whoami-v2"]:
            self.require(signed_in)
            return send_json({"name": "tester", "orgs": [], "type": "user"})
        if len(parts) >= 5 and parts[2] == "resolve":
            return self.resolve(self.find("/".join(parts[:2]), signed_in), parts[3], "/".join(parts[4:]), headers)
        raise Refused(404, None, f"no such address: {method} {path}")

    def require(self, signed_in: bool):
        if not signed_in:
            raise Refused(401, None, "Invalid username or password.")

    def find(self, repo_id: str, signed_in: bool) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not signed_in):
            raise Refused(401 if not signed_in else 404, "RepoNotFound", "Repository not found")
        return repo

    # ---------------------------------------------------------------- reading

    def resolve(self, repo: Repo, revision: str, path: str, headers) -> tuple[int, dict[str, str], bytes]:
        commit = repo.resolve(revision)
        if path not in repo.commits[commit]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = repo.commits[commit][path]
        about = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if headers.get("Range"):  # an interrupted download goes on
            start = int(headers["Range"].removeprefix("bytes=").partition("-")[0])
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, about, content[start:]
        return 200, about, content

    def get_revision(self, repo: Repo, repo_id: str, revision: str, _) -> dict:
        commit = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        return {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repo.private, "siblings": siblings}

    def get_tree(self, repo: Repo, repo_id: str, revision: str, folder: str) -> list[dict]:
        files = repo.commits[repo.resolve(revision)]
        files = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not files:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        return [
            {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            for path, content in sorted(files.items())
        ]

    def get_refs(self, repo: Repo, *_) -> dict:
        listed = {"branches": (repo.branches, "heads"), "tags": (repo.tags, "tags")}
        return {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in found.items()]
            for kind, (found, ref) in listed.items()
        } | {"converts": []}

    # ---------------------------------------------------------------- writing

    def create(self, asked: dict) -> dict:
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if repo_id in self.repos:
            raise Refused(409, None, "You already created this model repo", url=f"{self.url}/{repo_id}")
        self.repos[repo_id] = repo = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b""})
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": hashlib.sha1(repo_id.encode()).hexdigest()}

    def post_branch(self, repo: Repo, repo_id: str, branch: str, body: bytes) -> dict:
        if branch in repo.branches:
            raise Refused(409, None, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(json.loads(body).get("startingPoint", "main"))
        return {}

    def post_tag(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> dict:
        repo.tags[json.loads(body)["tag"]] = repo.resolve(revision)
        return {}

    def post_preupload(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> dict:
        there = repo.commits[repo.resolve(revision)]
        return {
            "files": [
                {"path": asked["path"], "uploadMode": "regular", "shouldIgnore": False}
                | ({"oid": blob_id(there[asked["path"]])} if asked["path"] in there else {})
                for asked in json.loads(body)["files"]
            ]
        }

    def post_commit(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> dict:
        if revision not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header, *operations = map(json.loads, body.decode().splitlines())
        files = dict(repo.commits[repo.branches[revision]])
        parent = header["value"].get("parentCommit")
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refused(400, None, "a commit begins with a header and has a summary")
        if parent not in (None, repo.branches[revision]):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, None, f"this Hub can't do {operation['key']}")
        commit = repo.commit(revision, files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo_id}/commit/{commit}"}


def validate_card(content: str) -> dict:
    """The part of the Hub's check that any YAML must pass."""
    found = REGEX_YAML_BLOCK.search(content)
    try:
        metadata = yaml.safe_load(found[2]) if found else {}
    except yaml.YAMLError as error:
        raise Refused(400, None, "no YAML", errors=[{"message": str(error)}]) from error
    wrong = [name for name in ("tags", "datasets") if not isinstance(metadata.get(name, []), list)]
    if wrong:
        raise Refused(400, None, "invalid metadata", errors=[{"message": f"{name} must be a list"} for name in wrong])
    return {"errors": [], "warnings": []}


def send_json(value) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
