"""Whether the multi-token-prediction head is in the artifact, and drafts as well as the source's does.

A draft is good where it is what the model itself says next; that share is what speculative decoding lives on. It is measured
on held-out windows, the artifact's head on the artifact beside the source's head on the source. No perplexity shows a head
that was lost: nothing but a slow server does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantool.errors import SourceError
from quantool.formats.gguf_header import present_shards, read_header
from quantool.formats.safetensors import TensorHeader, check_index, some
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Verdict
from quantool.runtime.progress import Progress
from quantool.source.mtp import head_tensors
from quantool.source.tensor_headers import headers as source_headers
from quantool.tasks import TaskKind
from quantool.texts import inputs
from quantool.texts.corpus import corpora
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS
from quantool.validation._cache.questions import Questions, ask_artifact, ask_reference
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.reference import TORCH_DTYPES
from quantool.validation._engines.windows import WINDOWS, windows
from quantool.validation._findings.builder import SHOWN, FindingBuilder, without_folders
from quantool.validation._findings.limits import NOISE
from quantool.validation._score.drafts import draft

NAME = "mtp"
METRIC = "accepted_drafts"
BUILD = FindingBuilder(NAME)
MOST = 16
"""Windows of a text: 4,000 drafts at a context of 512, whose error is below half a point."""
MAX_LOSS = 0.02
"""Share of drafts that may be lost."""
LEAST = 0.05
"""A head whose drafts are good less often at the source has nothing to lose."""
SLICE = 1 << 24
FLOATS = ("BF16", "F16", "F32")


@check(
    NAME,
    depends=WINDOWS
    | ANSWERS
    | REFERENCE_ANSWERS
    | Depends(fields=("validation.corpora",), inputs=(inputs.held_out,)),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """The multi-token-prediction head, where the checkpoint has one: all there, and its drafts as good as the source's."""
    source = source_headers(case.source)
    names = head_tensors(source, case.source.facts.layers)
    if not names:
        return [BUILD.skip(METRIC, "the checkpoint has no multi-token-prediction head")]
    try:
        carried = (
            _in_gguf(case)
            if case.engine == "llama.cpp"
            else _in_folder(case, {name: source[name] for name in names})
        )
    except SourceError as error:
        return [BUILD.fail("head", without_folders(error.message, case.artifact))]
    if carried.verdict is Verdict.PASS:
        return [carried, *_drafts(case, progress)]
    return [carried]


def _in_folder(case: Case, source: Mapping[str, TensorHeader]) -> Finding:
    """Every tensor of the head is in the folder, and those that were not quantized are the source's, byte for byte."""
    found = check_index(case.artifact)
    missing, changed, quantized = [], [], 0
    for name, tensor in source.items():
        module, _, part = name.rpartition(".")
        own = found.get(name)
        if own is not None and own.dtype in FLOATS:
            same_kind = own.dtype == tensor.dtype
            if own.shape != tensor.shape or (same_kind and _differ(case, own, tensor)):
                changed.append(name)
        elif own is not None or f"{module}.{part}_packed" in found or f"{module}.qweight" in found:
            quantized += 1
        else:
            missing.append(name)
    problems = [f"missing: {some(missing, SHOWN)}"] * bool(missing)
    problems += [f"not the source's: {some(changed, SHOWN)}"] * bool(changed)
    shown = f"{len(source) - len(missing)} of {len(source)} tensors" + (
        f", {quantized} quantized" if quantized else ""
    )
    return BUILD.fact("head", shown, "; ".join(problems))


def _differ(case: Case, own: TensorHeader, tensor: TensorHeader) -> bool:
    """Whether the bytes of a tensor are not those of the source."""
    if own.bytes != tensor.bytes:
        return True
    with (
        (case.artifact / own.file).open("rb") as ours,
        (case.source.folder / tensor.file).open("rb") as theirs,
    ):
        ours.seek(own.start)
        theirs.seek(tensor.start)
        left = own.bytes
        while left:
            size = min(left, SLICE)
            if ours.read(size) != theirs.read(size):
                return True
            left -= size
    return False


def _in_gguf(case: Case) -> Finding:
    """The file has the tensors of the head, unless llama.cpp's converter made its base without them."""
    count, promised = _nextn(case.artifact)
    if count:
        return BUILD.fact("head", f"{count} tensors")
    before = _nextn(case.base)[0] if case.base is not None else 0
    if promised or before:
        told = f"its base has {before} tensors of it" if before else f"its metadata promise {promised} layers"
        return BUILD.fact("head", "0 tensors", f"the multi-token-prediction head was lost: {told}")
    return BUILD.skip(
        "head",
        "llama.cpp's converter leaves the multi-token-prediction head of this architecture out: no engine can draft with "
        "this file",
    )


def _nextn(path: Path) -> tuple[int, int]:
    """Tensors of the head in a GGUF, all shards, and the layers that its metadata promise."""
    shards = [read_header(shard) for shard in present_shards(path)]
    architecture = shards[0].value("general.architecture")
    promised = shards[0].value(f"{architecture}.nextn_predict_layers")
    layers = promised if isinstance(promised, int) else 0
    count = sum(".nextn." in tensor.name for shard in shards for tensor in shard.tensors)
    return count, layers


def _drafts(case: Case, progress: Progress) -> list[Finding]:
    """What share of the drafts is good, beside the source's, on each text."""
    texts = windows(case, corpora(case.config), progress)
    questions = Questions(
        NAME,
        draft,
        {
            "windows": [str(text.path) for text in texts],
            "most": MOST,
            "layers": case.source.facts.layers,
            "dtype": TORCH_DTYPES.get(case.source.facts.dtype, "bfloat16"),
            "scratch": str(case.workspace.work / "drafts"),
        },
        case.key(WINDOWS, [text.sha256 for text in texts], MOST),
        "tok",
    )
    theirs = ask_reference(case, questions, progress)
    if theirs["unable"]:
        return [BUILD.skip(METRIC, f"the source's own head cannot be run: {theirs['unable']}")]
    try:
        ours = ask_artifact(case, questions, progress)
    except Unsound as reason:
        return [BUILD.fail(METRIC, str(reason))]
    if ours["unable"]:
        return [BUILD.skip(METRIC, f"the artifact's head cannot be run: {ours['unable']}")]
    return [
        compare(text.corpus.name, before, after)
        for text, before, after in zip(texts, theirs["marks"], ours["marks"], strict=True)
    ]


def compare(corpus: str, reference: str, artifact: str) -> Finding:
    """The finding on the drafts of one text: ``1`` or ``0`` for each, in the same order."""
    pairs = [(int(before), int(after)) for before, after in zip(reference, artifact, strict=True)]
    before, after = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    if before < LEAST:
        reason = (
            f"the source's own drafts are good at {before:.1%} of {len(pairs)} positions: nothing to lose"
        )
        return BUILD.skip(METRIC, reason, corpus=corpus, measured=after)
    loss = before - after
    spread = sum((old - new - loss) ** 2 for old, new in pairs) / max(1, len(pairs) - 1)
    error = math.sqrt(spread / len(pairs))
    lost = loss - NOISE * error >= MAX_LOSS
    detail = (
        f"{after:.1%} of the drafts are what the artifact itself says, at the source {before:.1%}: {loss:+.1%} ± {error:.1%} "
        f"lost on {len(pairs)} positions of {corpus} (limit {MAX_LOSS:.0%})"
    )
    return Finding(
        check=NAME,
        metric=METRIC,
        verdict=Verdict.REGRESSION if lost else Verdict.PASS,
        corpus=corpus,
        measured=after,
        reference=before,
        error=error,
        threshold=before - MAX_LOSS,
        detail=detail,
    )
