"""The write side of the Hub in ``hub.py``: accounts, repositories, large files by classic LFS or Xet, commits.

Answers follow huggingface_hub 1.33 (``hf_api.py``, ``_commit_api.py``, ``lfs.py``). Nothing that was uploaded can be
seen before a commit names it.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.loopback_hub import (
    ID,
    LFS_ENDS,
    REVISION,
    Answer,
    Asked,
    Hub,
    Repository,
    Route,
    entry,
    refusal,
    reply,
    sha256,
)

SIGNATURE = "signature-of-an-upload-address"
"""Upload addresses carry their own right to write: as secret as a token."""


class WritableHub(Hub):
    """A Hub to push to. ``objects`` are the large files it stores, by the SHA-256 that their sender claimed."""

    def __init__(self) -> None:
        super().__init__()
        self.routes = [*WRITES, *self.routes]
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size: int | None = None
        """Bytes from which a file is uploaded in parts of that size."""
        self.quota: int | None = None
        """Bytes that the account may store; larger files are refused one by one."""
        self.cas: Path | None = None
        """Folder that stands for the store of Xet."""
        self.xet: dict[str, str] = {}
        """Xet hash by SHA-256: what the Hub reads in the shards that hf_xet registers."""
        self.who: dict[str, Any] = account()
        self.collections: dict[str, list[str]] = {}
        """Repositories by slug."""
        self.trusted: dict[str, str] = {}
        """Identities of CI jobs, with the repository that trusts them."""

    def put(self, name: str) -> int:
        """How often a content was received whole."""
        return len(self.sent("PUT", f"/objects/{name}"))


def account(role: str = "write", **scopes: list[str]) -> dict[str, Any]:
    """What whoami answers: user ``someone``, writer in ``org``, reader in ``club``."""
    token: dict[str, Any] = {"displayName": "test", "role": role}
    if role == "fineGrained":
        scoped = [
            {"entity": {"type": kind, "name": name}, "permissions": ["repo.content.read", "repo.write"]}
            for kind, names in scopes.items()
            for name in names
        ]
        token["fineGrained"] = {"global": [], "scoped": scoped}
    orgs = [{"name": "org", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    auth = {"type": "access_token", "accessToken": token}
    return {"type": "user", "id": "1", "name": "someone", "orgs": orgs, "auth": auth}


def _allowed(hub: Hub, asked: Asked) -> Answer | None:
    if asked.token == hub.token:
        return None
    return Answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})


def whoami(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    return _allowed(hub, asked) or reply(hub.who)


def create(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    if refused := _allowed(hub, asked):
        return refused
    wanted = json.loads(asked.body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if name in hub.repositories:
        return reply({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
    start = {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"}
    hub.repositories[name] = Repository(start, private=wanted.get("visibility") == "private")
    return reply({"url": f"{hub.url}/{name}", "name": name, "id": "1"})


def validate_card(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    content = json.loads(asked.body)["content"]
    if not content.startswith("---\n"):
        return reply({"errors": [{"message": "no front matter"}], "warnings": []}, 400)
    warnings = [] if "\nlicense:" in content else [{"message": "license is missing"}]
    return reply({"errors": [], "warnings": warnings})


def preupload(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    if refused := _allowed(hub, asked):
        return refused
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    wanted = json.loads(asked.body)
    there = found.at(match["revision"])
    ignored = wanted.get("gitIgnore") or there.get(".gitignore", b"").decode()
    files = []
    for file in wanted["files"]:
        name, content = file["path"], there.get(file["path"])
        mode = "lfs" if name.endswith(LFS_ENDS) else "regular"
        listed = entry(name, content) if content is not None else {}
        oid = listed.get("lfs", listed).get("oid")
        files.append({"path": name, "uploadMode": mode, "shouldIgnore": name in ignored.split(), "oid": oid})
    return reply({"files": files})


def batch(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    if refused := _allowed(hub, asked):
        return refused
    objects = []
    for wanted in json.loads(asked.body)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if hub.quota is not None and size > hub.quota:
            answer["error"] = {"code": 507, "message": "Storage limit of the account reached"}
        elif sha256(hub.objects.get(oid, b"")) != oid:
            upload = {"href": f"{hub.url}/objects/{oid}?X-Amz-Signature={SIGNATURE}"}
            if hub.part_size and size > hub.part_size:
                upload = _in_parts(hub, oid, size, hub.part_size)
            answer["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/verify"}}
        objects.append(answer)
    return reply({"transfer": "basic", "objects": objects})


def _in_parts(hub: WritableHub, oid: str, size: int, part: int) -> dict[str, Any]:
    numbers = range(1, -(-size // part) + 1)
    parts = {str(n): f"{hub.url}/objects/{oid}/{n}?X-Amz-Signature={SIGNATURE}" for n in numbers}
    return {"href": f"{hub.url}/complete/{oid}", "header": {"chunk_size": str(part), **parts}}


def store(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    assert asked.token is None, "the address is the right to write; the token must not go to the store"
    if match["part"]:
        hub.parts.setdefault(match["oid"], {})[int(match["part"])] = asked.body
    else:
        hub.objects[match["oid"]] = asked.body
    return Answer(200, b"", {"ETag": f'"{sha256(asked.body)}"'})


def complete(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    parts = hub.parts.pop(match["oid"])
    named = {part["partNumber"]: part["etag"].strip('"') for part in json.loads(asked.body)["parts"]}
    assert named == {number: sha256(part) for number, part in parts.items()}
    hub.objects[match["oid"]] = b"".join(parts[number] for number in sorted(parts))
    return reply({})


def verify(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    """As the real one, it compares the size alone."""
    assert isinstance(hub, WritableHub)
    wanted = json.loads(asked.body)
    return reply({}, 200 if len(hub.objects.get(wanted["oid"], b"")) == wanted["size"] else 422)


def xet_token(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    if refused := _allowed(hub, asked):
        return refused
    token: dict[str, Any] = {"casUrl": f"local://{hub.cas}", "accessToken": "cas-token", "exp": 4_000_000_000}
    answer = reply(token)
    answer.headers |= {"X-Xet-Cas-Url": token["casUrl"], "X-Xet-Access-Token": "cas-token"}
    answer.headers["X-Xet-Token-Expiration"] = str(token["exp"])
    return answer


def commit(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    if refused := _allowed(hub, asked):
        return refused
    with hub.lock:
        found = hub.find(match)
        if isinstance(found, Answer):
            return found
        lines = [json.loads(line) for line in asked.body.splitlines()]
        branch, header = match["revision"], lines[0]["value"]
        as_request = "create_pr=1" in asked.query
        if branch not in (*found.branches, *found.heads):
            return refusal(404, "RevisionNotFound")
        if not as_request and header.get("parentCommit") not in (None, found.commit_of(branch)):
            return reply({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = _changed(hub, dict(found.at(header.get("parentCommit") or branch)), lines[1:])
        if isinstance(files, Answer):
            return files
        answer: dict[str, Any] = {"success": True}
        if as_request:
            number = len(found.requests) + 1
            found.requests.append(_request(match["id"], number, header))
            branch = f"refs/pr/{number}"
            found.heads[branch] = header.get("parentCommit") or found.commit
            answer["pullRequestUrl"] = f"{hub.url}/{match['id']}/discussions/{number}"
        new = found.advance(files, branch)
    return reply(answer | {"commitUrl": f"{hub.url}/{match['id']}/commit/{new}", "commitOid": new})


def _changed(
    hub: WritableHub, files: dict[str, bytes], lines: list[dict[str, Any]]
) -> dict[str, bytes] | Answer:
    """The files with the changes of a commit."""
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if hub.cas is not None and value["oid"] in hub.xet:
                hub.objects[value["oid"]] = _rebuilt(hub.cas, hub.xet[value["oid"]], value["size"])
            if value["oid"] not in hub.objects:
                return reply(
                    {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}, 400
                )
            files[value["path"]] = hub.objects[value["oid"]]
        else:
            assert line["key"] == "deletedFile"
            del files[value["path"]]
    return files


def _request(repo_id: str, number: int, header: dict[str, Any]) -> dict[str, Any]:
    """A pull request as listings have it; ``text`` is its description."""
    return {
        "num": number, "title": header["summary"], "text": header["description"], "status": "open",
        "author": {"name": "someone"}, "createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True,
        "repo": {"name": repo_id, "type": "model"},
    }  # fmt: skip


def discussions(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    """Two a page."""
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    wanted = parse_qs(asked.query)
    start = 2 * int(wanted["p"][0])
    listed = [request for request in found.requests if request["status"] == wanted["status"][0]]
    return reply({"count": len(listed), "start": start, "discussions": listed[start : start + 2]})


def set_status(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    if refused := _allowed(hub, asked):
        return refused
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    found.requests[int(match["number"]) - 1]["status"] = json.loads(asked.body)["status"]
    event: dict[str, Any] = {"id": "1", "type": "status-change", "createdAt": "2026-01-01T00:00:00.000Z"}
    event |= {"author": {"name": "someone"}, "data": {"status": "closed"}}
    return reply({"newStatus": event})


def refs(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    heads = {name: at for name, at in found.heads.items() if not name.startswith("refs/")}
    heads |= dict.fromkeys(found.branches, found.commit)
    listed = {
        kind: [
            {"name": name, "ref": f"refs/{at}/{name}", "targetCommit": commit}
            for name, commit in names.items()
        ]
        for kind, at, names in (("branches", "heads", heads), ("tags", "tags", found.tags))
    }
    return reply({"converts": [], **listed})


def make_branch(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    if refused := _allowed(hub, asked):
        return refused
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    if match["branch"] in (*found.branches, *found.heads):
        return reply({"error": "Reference already exists"}, 409)
    found.heads[match["branch"]] = found.commit_of(json.loads(asked.body)["startingPoint"])
    found.history[found.commit] = found.files
    return reply({})


def make_tag(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    if refused := _allowed(hub, asked):
        return refused
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    tag = json.loads(asked.body)["tag"]
    if tag in found.tags:
        return reply({"error": "Tag already exists"}, 409)
    found.tags[tag] = found.commit_of(match["revision"])
    return reply({})


def collection(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    assert isinstance(hub, WritableHub)
    items = hub.collections.get(match["slug"])
    if items is None:
        return refusal(404, "EntryNotFound")
    if asked.method == "POST":
        if refused := _allowed(hub, asked):
            return refused
        item = json.loads(asked.body)["item"]
        assert item["type"] == "model"
        if item["id"] in items:
            return reply({"error": "This item is already in the collection"}, 409)
        items.append(item["id"])
    told: dict[str, Any] = {
        "slug": match["slug"],
        "title": "Mine",
        "owner": {"name": "org"},
        "items": [],
        "position": 0,
    }
    return reply(
        told | {"lastUpdated": "2026-01-01T00:00:00.000Z", "private": False, "theme": "green", "upvotes": 0}
    )


def exchange(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    """RFC 8693, as the Hub does it for trusted publishers."""
    assert isinstance(hub, WritableHub)
    wanted = json.loads(asked.body)
    if hub.trusted.get(wanted["subject_token"]) != wanted["resource"]:
        return reply({"error": "invalid_grant", "error_description": "No trusted publisher matches"}, 403)
    return reply({"access_token": hub.token, "token_type": "bearer", "expires_in": 3600})


def _rebuilt(cas: Path, xet_hash: str, size: int) -> bytes:
    """A file put together from the chunks in the store."""
    import hf_xet  # type: ignore[import-untyped]

    wanted = cas / "rebuilt"
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{cas}") as group:
        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(wanted))
    return wanted.read_bytes()


def paths_info(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    files = found.at(match["revision"])
    names = parse_qs(asked.body.decode())["paths"]
    return reply([entry(name, files[name]) for name in names if name in files])


API = rf"/api/models/{ID}"
WRITES: list[tuple[tuple[str, ...], str, Route]] = [
    (("GET",), r"/api/whoami-v2", whoami),
    (("POST",), r"/api/repos/create", create),
    (("POST",), r"/api/validate-yaml", validate_card),
    (("POST",), rf"{API}/preupload/{REVISION}", preupload),
    (("POST",), rf"{API}/commit/{REVISION}", commit),
    (("POST",), rf"{API}/paths-info/{REVISION}", paths_info),
    (("GET",), rf"{API}/xet-write-token/{REVISION}", xet_token),
    (("POST",), rf"/{ID}\.git/info/lfs/objects/batch", batch),
    (("PUT",), r"/objects/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", store),
    (("POST",), r"/complete/(?P<oid>[0-9a-f]{64})", complete),
    (("POST",), r"/verify", verify),
    (("GET",), rf"{API}/discussions", discussions),
    (("POST",), rf"{API}/discussions/(?P<number>\d+)/status", set_status),
    (("GET",), rf"{API}/refs", refs),
    (("POST",), rf"{API}/branch/(?P<branch>[^/]+)", make_branch),
    (("POST",), rf"{API}/tag/{REVISION}", make_tag),
    (("GET", "POST"), r"/api/collections/(?P<slug>[^/]+/[^/]+?)(?:/items)?", collection),
    (("POST",), r"/oauth/token", exchange),
]
