"""What can be proven of a release without the checkpoint and without running it: hashes, record, names, headers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from quantool import __version__
from quantool.attest.provenance import subjects
from quantool.attest.release import (
    CARD,
    LIMITS,
    PROVENANCE,
    RECORD,
    SIGNATURE,
    SUMS,
    Release,
    ReleasedOutput,
)
from quantool.attest.signature import IGNORED, SignatureError, Trust, check_signature, claimed
from quantool.errors import SourceError
from quantool.formats.gguf_header import read_shards
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import check_index, some
from quantool.ledger import Fate, names
from quantool.plugins.keys import PACKED
from quantool.record import Record
from quantool.records import Verdict
from quantool.report.table import headings, markdown, rows_of
from quantool.runtime.progress import amount

LOADED = (
    ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".py", ".tiktoken", ".txt",
)  # fmt: skip
"""Endings of what engines take from a folder without being told."""
STEERING = frozenset({"preset.ini", "template", "system", "params"})
"""Names at the root that change how llama-server or Ollama treat a repository."""


class Proven(StrEnum):
    """What became of a proof."""

    OK = "ok"
    FAILED = "FAILED"
    OPEN = "not checked"


class Proof(Record):
    """One thing that was checked, or was not and why."""

    name: str
    outcome: Proven
    detail: str = ""


def proof(name: str, measured: str, problems: Sequence[str]) -> Proof:
    """Failed with the problems, or proven with what was measured."""
    if problems:
        return Proof(name=name, outcome=Proven.FAILED, detail=some(list(problems)))
    return Proof(name=name, outcome=Proven.OK, detail=measured)


def failed(name: str, reason: str) -> Proof:
    """A proof that could not even be begun."""
    return Proof(name=name, outcome=Proven.FAILED, detail=reason)


def unchecked(name: str, reason: str) -> Proof:
    """A proof that nobody asked for, or that the release does not offer."""
    return Proof(name=name, outcome=Proven.OPEN, detail=reason)


def hashes(sums: Mapping[str, str], found: Mapping[str, str | None], size: int, seconds: float) -> Proof:
    """Files are there and those of SHA256SUMS; ``found`` holds those that were read."""
    problems = [
        f"{name} is missing" if digest is None else f"{name} was changed"
        for name, digest in found.items()
        if digest != sums[name]
    ]
    speed = f", {size / seconds / 1e9:.2f} GB/s" if seconds > 0.05 and size > 1 << 26 else ""
    left_out = f" of {len(sums)}" if len(found) < len(sums) else ""
    return proof("hashes", f"{len(found)}{left_out} files, {amount(size, 'B')}{speed}", problems)


def signature(folder: Path, digests: Mapping[str, str], trust: Trust) -> Proof:
    """The signature is that of who is trusted; without trust, it is at least over these files."""
    try:
        if trust.is_given:
            return proof("signature", f"by {check_signature(folder, digests, trust)}", [])
        if not (folder / SIGNATURE).is_file():
            return unchecked(
                "signature", "it is not signed: hashes prove that nothing was lost, not who made it"
            )
        stated = claimed(folder)
    except SignatureError as error:
        return failed("signature", str(error))
    changed = sorted(name for name in stated.keys() | digests.keys() if stated.get(name) != digests.get(name))
    if changed:
        return failed("signature", f"{SIGNATURE} is over other files: {some(changed)}")
    return unchecked("signature", "signed; whose signature it is, only --key FILE or --identity tells")


def file_names(folder: Path, sums: Mapping[str, str], release: Release) -> Proof:
    """No file that an engine would load lies beside the listed ones, and outputs have the files of their plan."""
    beside = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.relative_to(folder).parts[0] not in IGNORED or path.suffix == ".gguf")
    ]
    others = [name for name in beside if name not in sums and name not in (SUMS, SIGNATURE)]
    strange = [name for name in others if name.endswith(LOADED) or name in STEERING]
    problems = [f"{name} is not part of the release" for name in strange]
    for output in release.outputs:
        made = [file.name for file in output.report.artifact.files]
        problems += [f"{output.id} should have {name}" for name in output.names if name not in made]
        problems += [
            f"{RECORD} has another hash of {file.name}"
            for file in (*output.report.artifact.files, *output.report.artifact.shared)
            if sums.get(file.name) != file.sha256
        ]
    recorded = {
        file.name
        for output in release.outputs
        for file in (*output.report.artifact.files, *output.report.artifact.shared)
    }
    problems += [
        f"{name} was not judged"
        for name in sums
        if name not in recorded and name not in PACKED and not name.startswith("plots/")
    ]
    harmless = [name for name in others if name not in strange]
    note = f"; not part of it: {some(harmless)}" if harmless else ""
    return proof("names", f"{len(sums)} listed{note}", problems)


def record(folder: Path, release: Release) -> Proof:
    """Verdicts follow from their findings and are all PASS; the card shows the figures of the record."""
    problems = []
    for output in release.outputs:
        verdict = output.report.verdict()
        if output.verdict != verdict:
            problems.append(f"{output.id} is said to be {output.verdict}, its findings say {verdict}")
        elif verdict is not Verdict.PASS:
            problems.append(f"{output.id} did not pass: {verdict}")
    problems += _card_problems(folder, release)
    return proof(
        "record", f"{len(release.outputs)} outputs, all PASS, by quantool {release.version}", problems
    )


def _card_problems(folder: Path, release: Release) -> Iterator[str]:
    """The card's table is the one that this quantool makes of the reports; another version's is not compared."""
    own_template = (release.plan["config"].get("card") or {}).get("template")
    if release.version != __version__ or own_template:
        return
    reports = [
        output.report.model_copy(
            update={"artifact": output.report.artifact.model_copy(update={"folder": Path(output.repo)})}
        )
        for output in release.outputs
    ]
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        yield f"{CARD} cannot be read"
        return
    for report, row in zip(reports, rows_of(reports), strict=True):
        cells = [report.artifact.level, *row[:-1]]
        line = markdown(["level", *headings(reports)[:-1]], [cells]).splitlines()[-1]
        if line not in card.splitlines():
            yield f"{CARD} and {RECORD} disagree on the figures of {report.artifact.level}"


def provenance(folder: Path, sums: Mapping[str, str], release: Release) -> Proof:
    """The in-toto statement is on these files, this source and this configuration."""
    if PROVENANCE not in sums:
        return unchecked(PROVENANCE, f"not stated by quantool {release.version}")
    try:
        content = read_json(folder / PROVENANCE, LIMITS)
        stated = subjects(content)
        definition = content["predicate"]["buildDefinition"]
        parameters = definition["externalParameters"]
        dependencies = {str(entry["name"]): entry for entry in definition["resolvedDependencies"]}
        source = release.plan["source"]
        commit = (dependencies.get(source["model_id"]) or {}).get("digest", {}).get("gitCommit")
        problems = ["it states another configuration"] * (parameters["config"] != release.plan["config"])
        problems += ["it states another commit of the source"] * (
            source["prepared"] is None and commit != source["commit"]
        )
        stages = {entry["id"]: entry for entry in parameters["outputs"]}
        problems += [
            f"it states other options or gates of {planned['id']}"
            for planned in release.plan["outputs"]
            if any(stages[planned["id"]][key] != planned[key] for key in ("options", "gates", "level"))
        ]
    except (SourceError, ValueError, LookupError, TypeError, AttributeError) as error:
        return failed(PROVENANCE, f"it is damaged ({error})")
    wanted = {name: digest for name, digest in sums.items() if name != PROVENANCE}
    changed = sorted(name for name in wanted.keys() | stated.keys() if wanted.get(name) != stated.get(name))
    problems += [f"it is on other files: {some(changed)}"] * bool(changed)
    return proof(PROVENANCE, f"{len(stated)} files, {len(dependencies)} dependencies", problems)


def tensors(folder: Path, output: ReleasedOutput) -> Proof:
    """Names, dtypes and shapes in the headers are those of the ledger, no more and no fewer."""
    name = f"tensors {output.report.artifact.level}"
    if output.ledger is None or not output.ledger.traced:
        return unchecked(name, "the record does not say what it holds, tensor by tensor")
    try:
        held = dict(_held(folder, output))
    except SourceError as error:
        return failed(name, error.message.replace(f"{folder}/", ""))
    promised = {
        tensor.name: (tensor.dtype, tensor.shape)
        for line in output.ledger.tensors
        for tensor in line.stored()
    }
    tied = {entry for line in output.ledger.tensors if line.fate is Fate.TIED for entry in names(line.name)}
    problems = [f"{tensor} is missing" for tensor in promised if tensor not in held]
    problems += [
        f"{tensor} is {held[tensor][0]} {[*held[tensor][1]]}, not {dtype} {[*shape]}"
        for tensor, (dtype, shape) in promised.items()
        if tensor in held and not _same(held[tensor], (dtype, shape))
    ]
    problems += [
        f"{tensor} is more than was judged" for tensor in sorted(held.keys() - promised.keys() - tied)
    ]
    return proof(name, f"{len(held)} tensors", problems)


def _held(folder: Path, output: ReleasedOutput) -> Iterable[tuple[str, tuple[str, tuple[int, ...]]]]:
    if output.engine == "llama.cpp":
        for header in read_shards(folder / output.report.artifact.files[0].name):
            yield from ((tensor.name, (tensor.type.upper(), tensor.shape)) for tensor in header.tensors)
    else:
        yield from ((entry.name, (entry.dtype, entry.shape)) for entry in check_index(folder).values())


def _same(held: tuple[str, tuple[int, ...]], promised: tuple[str, tuple[int, ...]]) -> bool:
    """A single number may be stored without dimensions."""
    return held == promised or (promised[1] == (1,) and held == (promised[0], ()))
