"""How a release came about, as an in-toto statement with SLSA's provenance (https://slsa.dev/spec/v1.0/provenance).

It holds no time and no place, so that the same run elsewhere states the same. What signs the folder signs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
HOME = "https://github.com/langtech-bsc/quantool"
BUILD = f"{HOME}/blob/main/README.md#provenance"


def statement(plan: Mapping[str, Any], digests: Mapping[str, str], record: str) -> str:
    """The statement as JSON text on the files ``digests`` (SHA-256 by name), of which ``record`` is quantool.json.

    ``plan`` is the published one: source, configuration, versions, seed.
    """
    outputs = [
        {key: output[key] for key in ("id", "method", "level", "options", "gates")}
        for output in plan["outputs"]
    ]
    versions = plan["versions"]
    content = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {"config": plan["config"], "outputs": outputs},
                "internalParameters": {"seed": plan["seed"]},
                "resolvedDependencies": [*_source(plan["source"]), *_tools(versions)],
            },
            "runDetails": {
                "builder": {"id": HOME, "version": {"quantool": versions["quantool"]}},
                "byproducts": [{"name": record, "digest": {"sha256": digests[record]}}],
            },
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _source(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checkpoint at its commit, and each of its files that was read, by hash; what it was prepared from likewise."""
    prepared = source.get("prepared") or {}
    origins = [origin for origin in (prepared.get("origin"), prepared.get("adapter")) if origin]
    found: list[dict[str, Any]] = []
    for origin in origins or [source]:
        named: dict[str, Any] = {"name": origin["model_id"]}
        if origin["commit"]:
            named["uri"] = f"pkg:huggingface/{origin['model_id']}@{origin['commit']}"
            named["digest"] = {"gitCommit": origin["commit"]}
        found.append(named)
        found += [
            {"name": f"{origin['model_id']}/{file['name']}", "digest": {"sha256": file["sha256"]}}
            for file in origin["files"]
            if file["sha256"]
        ]
    return found


def _tools(versions: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "annotations": {"version": version}} for name, version in sorted(versions.items())]


def subjects(content: Mapping[str, Any]) -> dict[str, str]:
    """The files of a statement, SHA-256 by name. Raises ValueError for one of another kind."""
    try:
        if (content["_type"], content["predicateType"]) != (STATEMENT, PREDICATE):
            raise ValueError("no in-toto statement with SLSA's provenance")
        return {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in content["subject"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("no in-toto statement") from error
