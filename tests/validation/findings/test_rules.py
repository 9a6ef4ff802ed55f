from collections.abc import Callable
from importlib.metadata import PackageNotFoundError

import pytest

from quantool.records import Finding, Verdict
from quantool.validation._findings import rules
from quantool.validation._findings.rules import Rules

RULES = Rules("a project", "0.24", "a-project")
Installed = Callable[[str | None], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    def install(number: str | None) -> None:
        def version(name: str) -> str:
            assert name == "a-project"
            if number is None:
                raise PackageNotFoundError(name)
            return number

        monkeypatch.setattr(rules, "version", version)

    return install


def finding(verdict: Verdict) -> Finding:
    return Finding(check="c", metric="m", verdict=verdict, measured=3, detail="too wide")


@pytest.mark.parametrize(
    ("number", "stated", "newer"),
    [
        (None, None, ""),
        ("0.24", None, ""),
        ("0.24.9.post1+cu130", None, ""),
        ("0.9.2", None, ""),
        ("0.25.0rc1", None, "0.25.0rc1"),
        ("1.0", None, "1.0"),
        (None, "0.30.1", "0.30.1"),
        ("0.25", "0.30.1", "0.30.1"),
        ("0.24", {"not": "a version"}, ""),
        ("0.24", "unknown", ""),
    ],
)
def test_what_is_newer(installed: Installed, number: str | None, stated: object, newer: str) -> None:
    installed(number)
    assert RULES.newer(stated) == newer


def test_a_newer_version_is_no_proof_that_something_is_wrong(installed: Installed) -> None:
    installed("0.25")
    found = RULES.judged(finding(Verdict.REGRESSION))
    assert found.verdict is Verdict.SKIPPED
    assert found.detail == (
        "judged by the rules of a project 0.24, and 0.25 may have others; by these: too wide"
    )
    assert RULES.judged(finding(Verdict.PASS)) == finding(Verdict.PASS)
    installed("0.24.3")
    assert RULES.judged(finding(Verdict.REGRESSION)).verdict is Verdict.REGRESSION


def test_the_known_versions_are_those_installed_here() -> None:
    """With the libraries of the constraints nothing is skipped for its age."""
    assert not rules.LLAMA_CPP.newer()
    assert not rules.COMPRESSED_TENSORS.newer()
