import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantool import pipeline
from quantool.attest.provenance import subjects
from quantool.config.load import load
from quantool.plugins import find
from quantool.runtime.progress import Progress


def test_the_statement_is_slsa_s(config_file: Callable[..., Path], tmp_path: Path) -> None:
    result = pipeline.run(load(config_file(), ["repo_id=org/model-FAKE"], find).config, Progress(quiet=True))
    folder = tmp_path / "out" / "model-FAKE"
    content = json.loads((folder / "provenance.json").read_text())
    assert (content["_type"], content["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    del sums["provenance.json"]
    assert subjects(content) == sums
    predicate = content["predicate"]
    definition = predicate["buildDefinition"]
    assert definition["internalParameters"] == {"seed": 42}
    assert [output["id"] for output in definition["externalParameters"]["outputs"]] == [
        "fake/Q8_0",
        "fake/Q4_K_M",
    ]
    dependencies = {entry["name"]: entry for entry in definition["resolvedDependencies"]}
    for file in result.plan.source.files:
        assert dependencies[f"model/{file.name}"]["digest"] == {"sha256": file.sha256}
    assert dependencies["torch"] == {
        "name": "torch",
        "annotations": {"version": result.plan.versions["torch"]},
    }
    assert predicate["runDetails"]["byproducts"] == [
        {"name": "quantool.json", "digest": {"sha256": sums["quantool.json"]}}
    ]
    assert str(tmp_path) not in json.dumps(content)


def test_a_commit_of_the_hub_is_a_package_url(config_file: Callable[..., Path]) -> None:
    from quantool.attest.provenance import statement

    result = pipeline.run(load(config_file(), [], find).config, Progress(quiet=True))
    plan = result.plan.model_dump(mode="json")
    plan["source"] |= {"model_id": "org/model", "commit": "ab" * 20}
    content = json.loads(statement(plan, {"quantool.json": "0" * 64}, "quantool.json"))
    first = content["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert first == {
        "name": "org/model", "uri": f"pkg:huggingface/org/model@{'ab' * 20}", "digest": {"gitCommit": "ab" * 20},
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", [{}, {"_type": "x", "predicateType": "y", "subject": []}, {"subject": 1}, [], {"_type": 1}]
)
def test_another_statement_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="no in-toto statement"):
        subjects(content)  # type: ignore[arg-type]
