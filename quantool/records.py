"""The frozen records that one stage hands to the next, each saved as JSON beside the artifact.

``Source`` and ``Plan`` are made before weights are touched, an ``Artifact`` by a method, a ``Report`` by the checks.
Sizes are bytes, times seconds, hashes lower-case hexadecimal SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, JsonValue, SerializerFunctionWrapHandler, model_serializer

from quantool.ledger import Ledger
from quantool.origins import Prepared, SourceFile, identities
from quantool.record import MachinePath, NameOrPath, Privacy, Record
from quantool.tasks import Task


class FileRecord(Record):
    """One file: ``name`` is relative to the folder of the record that holds it, ``/`` as separator."""

    name: str
    bytes: int
    sha256: str


class ModelFacts(Record):
    """What the configuration, the tokenizer files and the safetensors headers say; no weights are read."""

    architecture: str
    """Class name as config.json has it, e.g. ``LlamaForCausalLM``."""
    model_type: str
    parameters: int
    """Elements of all weight tensors."""
    dtype: str
    """The dtype most of the bytes have, as safetensors names it (``BF16``, ``F16``, ``F32``)."""
    vocabulary: int
    context: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    sliding_window: int | None
    tied_embeddings: bool
    largest_tensor: int
    """Bytes of the largest weight tensor."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Union of config.json and generation_config.json, in that order."""
    chat_template: str | None
    """The template that transformers applies (chat_template.jinja before tokenizer_config.json)."""
    named_templates: dict[str, str] = Field(default={})
    """Templates that are asked for by name (``tool_use``, which is also taken when tools are offered; ``rag``)."""
    has_sentencepiece: bool
    """Whether tokenizer.model is there."""
    task: Task = Task()


class ModelCard(Record):
    """The parts of the source's README.md front matter that a quantized repo repeats."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    tags: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()


class Source(Record):
    """A checkpoint at one commit."""

    model_id: NameOrPath
    """As the user wrote it: a Hub id or a local path."""
    name: str
    """Short name for file names and ``general.name``: last part of the Hub id or folder name."""
    commit: str | None
    """Hub commit; None for a local folder."""
    folder: MachinePath
    """Where the files lie (or will lie, for weights that a plan does not download)."""
    files: tuple[SourceFile, ...]
    others: tuple[SourceFile, ...] = ()
    """Files beside these that nothing reads; no result depends on them."""
    facts: ModelFacts
    card: ModelCard
    generation: dict[str, JsonValue] = Field(default={})
    """generation_config.json."""
    sampling: dict[str, float] = Field(default={})
    """What the user recommends otherwise than ``generation``: written into every artifact."""
    trust_remote_code: bool = False
    tokenizer: Path | None = None
    """Folder of the tokenizer files where ``tokenizer_name`` gives others than ``folder`` has (``source.overlay``)."""
    notes: tuple[str, ...] = ()
    """What deserves a warning and stops nothing."""
    max_abs: float | None = None
    """Largest magnitude among the weights; None while nobody has read them."""
    absent: tuple[str, ...] = ()
    """Parts that the weights lack and the user has dropped, so that config.json in ``folder`` promises them no more."""
    prepared: Prepared | None = None
    """How ``folder`` came about, where it is not what the user has."""

    def identity(self) -> dict[str, JsonValue]:
        """By what results that depend on the checkpoint know it again; reads no weights.

        Small files count by their hash. Weights count by their size, at a Hub commit with it (which is immutable), in a
        local folder with their modification time until they were hashed. Where the folder lies does not count.
        """
        unread: JsonValue = None if self.commit else "time"
        if self.prepared is not None:
            unread = self.prepared.identity()
        entries = identities(self.folder, self.files, unread)
        where: dict[str, JsonValue] = {"id": self.model_id, "commit": self.commit} if self.commit else {}
        own_code: dict[str, JsonValue] = {"own_code": True} if self.trust_remote_code else {}
        return {**where, **own_code, "files": entries}

    def without_weights(self) -> Source:
        """The source without its weight files: what a result depends on that only tokenizer and template decide."""
        small = tuple(file for file in self.files if not file.name.endswith(".safetensors"))
        return self.model_copy(update={"files": small})

    def label(self) -> str:
        """``id@commit`` for a Hub id, the path for a local folder."""
        return f"{self.model_id}@{self.commit}" if self.commit else self.model_id


class Gates(Record):
    """Limits of one artifact; None switches a gate off. See ``quantool/gates.py`` for the defaults by level."""

    max_ln_ppl_ratio: float | None = Field(
        default=None, ge=0, description="Upper limit of ln(PPL / PPL of the reference)."
    )
    max_mean_kld: float | None = Field(
        default=None,
        ge=0,
        description="Upper limit of the mean Kullback-Leibler divergence from the reference, in nats.",
    )
    min_same_top_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Lower limit of the share (0 to 1) of positions whose most likely token is the reference's.",
    )
    min_expert_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Lower limit of the calibration tokens that reach each expert; default: none.",
    )
    min_cosine: float | None = Field(default=None, ge=-1, le=1, description="Lower limit of the mean cosine.")
    min_recall_at_10: float | None = Field(
        default=None, ge=0, le=1, description="Lower limit of the share of the ten nearest neighbours kept."
    )
    max_logit_error: float | None = Field(
        default=None, ge=0, description="Upper limit of the squared error of logits over their variance."
    )
    min_same_label: float | None = Field(
        default=None, ge=0, le=1, description="Lower limit of the share of texts with the same label."
    )
    min_rank_correlation: float | None = Field(
        default=None, ge=-1, le=1, description="Lower limit of Kendall's tau of documents put in order."
    )

    @model_serializer(mode="wrap")
    def _as_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        """Leave out what was not set: read back, a None would switch that gate off."""
        fields: dict[str, JsonValue] = dump(self)
        return {name: value for name, value in fields.items() if name in self.model_fields_set}


class PlannedFile(Record):
    """A file that will be published, with its exact size when it can be known."""

    name: str
    bytes: int


class OutputPlan(Record):
    """One method at one level: everything decided before weights are touched."""

    id: str
    """``method/level``, unique in a plan."""
    method: str
    level: str
    options: dict[str, JsonValue]
    engine: str
    """What loads the artifact for judging: ``llama.cpp`` or ``transformers``."""
    repo: str
    """Name of the publishable folder below the output path; outputs of one repo share it."""
    repo_id: str | None
    files: tuple[PlannedFile, ...]
    bits_per_weight: float | None
    peak_ram: int
    operations: float = 0.0
    """Multiplications and additions that making it takes, from which the plan tells the time."""
    gates: Gates
    done: bool = Field(default=False, exclude=True)
    """Whether an earlier run left it finished, said by an outline; a ``MachineState`` says it beside a plan."""
    needs: tuple[str, ...] = ()
    """Names of the shared stages this output is made from, e.g. ``base``, ``imatrix``."""
    ledger: Ledger | None = None
    """What becomes of every tensor and file of the source; the plan completes what the method says of it."""


class StagePlan(Record):
    """One step of the run: bytes it leaves on disk, and peak RAM."""

    name: str
    writes: int
    peak_ram: int
    operations: float = 0.0
    """As in ``OutputPlan``."""
    done: bool = Field(default=False, exclude=True)
    """As in ``OutputPlan``."""


class MachineState(Record):
    """What this machine has, and what an earlier run left on it: lies beside a plan, leaves the machine with nothing."""

    free_disk: int
    """Bytes free where the output goes."""
    peak_disk: int
    """Bytes that the steps still to do write."""
    done: tuple[str, ...] = ()
    """Names of the steps that are finished, outputs among them."""
    engines: dict[str, str] = Field(default_factory=dict)
    """Where torch and llama.cpp compute."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """By stage, the time that it is expected to need here."""
    untimed: dict[str, str] = Field(default_factory=dict)
    """The checks whose time is not among these, with the reason."""
    ram: int = 0
    """Bytes of memory that this machine has; 0: not looked at."""


class Plan(Record):
    """What a run will do: decisions alone, the same on every machine."""

    config: dict[str, JsonValue]
    source: Source
    outputs: tuple[OutputPlan, ...]
    stages: tuple[StagePlan, ...]
    seed: int
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()


class Artifact(Record):
    """What a method made: files of one output, below ``folder``."""

    output: str
    method: str
    level: str
    folder: MachinePath
    files: tuple[FileRecord, ...]
    shared: tuple[FileRecord, ...] = ()
    """Files of the folder that several outputs share, e.g. the importance matrix."""
    bits_per_weight: float
    """Bits of tensor data per weight element."""
    seconds: float
    details: dict[str, JsonValue] = Field(default={})
    made_from: Annotated[str | None, Privacy.DROPPED] = None
    """The unquantized GGUF (first shard), below the output path; None for artifacts without such a step."""
    versions: dict[str, str] = Field(default={})
    """What took part in making it: quantool and the libraries that its method declares."""

    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


class Verdict(StrEnum):
    """What a check concludes about one number or fact."""

    PASS = "PASS"  # noqa: S105
    REGRESSION = "REGRESSION"
    ANOMALOUS = "ANOMALOUS"
    """Better than the reference beyond noise: usually a broken comparison, so it fails like a regression."""
    SKIPPED = "SKIPPED"

    @property
    def fails(self) -> bool:
        """Whether an artifact with such a verdict must not be published."""
        return self in (Verdict.REGRESSION, Verdict.ANOMALOUS)


class Finding(Record):
    """One measured thing and its verdict. ``error`` is one standard error of ``measured``."""

    check: str
    metric: str
    verdict: Verdict
    corpus: str | None = None
    measured: float | str | None = None
    reference: float | str | None = None
    error: float | None = None
    threshold: float | None = None
    detail: str = ""


class Report(Record):
    """The judgement of one artifact, bound to its bytes by their hashes."""

    artifact: Artifact
    reference: NameOrPath
    prepared: str = ""
    """What was done to that checkpoint before it was the reference; empty where nothing was."""
    findings: tuple[Finding, ...]
    seconds: float
    check_seconds: dict[str, float] = Field(default={})
    """By check: seconds it took, with the artifact's even part of what it did for several at once."""

    def verdict(self) -> Verdict:
        """The first of REGRESSION, ANOMALOUS and PASS that a finding has; SKIPPED when none has any of them."""
        verdicts = {finding.verdict for finding in self.findings}
        for verdict in (Verdict.REGRESSION, Verdict.ANOMALOUS, Verdict.PASS):
            if verdict in verdicts:
                return verdict
        return Verdict.SKIPPED

    def find(self, metric: str, corpus: str | None = None) -> Finding | None:
        """The first finding of ``metric`` (on ``corpus``, when given)."""
        for finding in self.findings:
            if finding.metric == metric and corpus in (None, finding.corpus):
                return finding
        return None


class Publication(Record):
    """A folder as it stands on the Hub, compared file by file after the push."""

    repo_id: str
    revision: str = "main"
    """The branch, or ``refs/pr/N`` of a pull request."""
    commit: str
    """The commit of ``revision`` that holds these files."""
    parent: str
    """What the branch was before; the same as ``commit`` when nothing was new."""
    url: str
    private: bool
    tag: str | None = None
    """Tag of ``commit``."""
    collection: str | None = None
    """Collection that the repository is in."""
    allow_regression: bool = False
    """Whether artifacts that did not pass are among the files."""
    files: tuple[FileRecord, ...]
    """Every file of the folder; size and hash on the Hub are these."""
    sent: tuple[str, ...]
    """Names of those that the commit added or changed."""


def fingerprint(*parts: Any) -> str:
    """SHA-256 of the canonical JSON of ``parts`` (records, paths and JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)  # their order differs from process to process
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"no JSON form: {value!r}")


def file_record(folder: Path, name: str) -> FileRecord:
    """The record of a finished file, which is read for it."""
    path = folder / name
    return FileRecord(name=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: Path, chunk: int = 1 << 22) -> str:
    """SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(chunk):
            digest.update(block)
    return digest.hexdigest()
