"""Whether an artifact is what its name and its plan say, from headers and samples of its numbers alone.

Of a GGUF: that it loads, its shards, its tensors against the architecture, their types against level and plan, its
importance matrix, its metadata, and what its name leads to on the Hub. Of a folder of safetensors: its shards, each layer
against config.json, scales, and the files beside the weights. Hashes are compared where a SHA256SUMS lies beside the
files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.fused_experts import split_experts
from quantool.formats.gguf_header import SHARD, shard_names
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import TensorHeader, check_index
from quantool.ledger import Fate, names
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Plan, sha256_of
from quantool.runtime.progress import Progress
from quantool.source.tensor_headers import headers as source_headers
from quantool.validation._engines.unpacked import quantization
from quantool.validation._engines.vocabulary import UnloadableError, of_gguf
from quantool.validation._files import gguf_file
from quantool.validation._files.companions import judge_companions
from quantool.validation._files.companions import judge_plan as judge_folder_plan
from quantool.validation._files.folder import Folder, judge_ignore, judge_layers
from quantool.validation._files.folder import judge_level as judge_folder_level
from quantool.validation._files.gguf_file import LAYER, Header
from quantool.validation._files.gguf_levels import ALIASES, judge_level, judge_plan, options_of
from quantool.validation._files.gguf_origin import judge_matrix, judge_source
from quantool.validation._files.hub_names import LABELS, judge_names, tag_of
from quantool.validation._files.modules import promise
from quantool.validation._files.scales import judge_cache, judge_scales
from quantool.validation._findings.builder import FindingBuilder, without_folders
from quantool.validation._findings.rules import COMPRESSED_TENSORS, LLAMA_CPP

NAME = "integrity"
BUILD = FindingBuilder(NAME)
SUMS = "SHA256SUMS"
ELEMENTS = 0.05  # share of weight elements that a conversion may drop (padding rows) or add (rope factors)


@check(
    NAME,
    depends=Depends(
        fields=("quantization_config", "quantizations", "dataset_path", "dataset_id"),
        libraries=("compressed-tensors", "llama-cpp-python"),
        engine=True,
        folder=True,
    ),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Files, tensors, types and metadata, from headers: whether a file holds what its name says."""
    del progress  # seconds
    return _judge_gguf(case) if case.engine == "llama.cpp" else _judge_folder(case)


def _judge_gguf(case: Case) -> list[Finding]:
    shards, problem = _shards(case.artifact)
    findings = [
        BUILD.fact("shards", f"{len(shards)} files", problem),
        *_judge_hashes(case.artifact.parent, shards),
    ]
    if problem:
        return findings
    try:
        header = gguf_file.read(case, shards)
    except UnloadableError as error:
        return [*findings, BUILD.fail("loads", str(error))]
    planned = _planned_names(case)
    return [
        _judge_loading(case),
        *findings,
        _judge_tensors(case, header, len(shards)),
        _judge_elements(case, header),
        *map(LLAMA_CPP.judged, judge_level(case, header, BUILD)),
        _judge_blocks(header),
        *judge_plan(case, header, shards, BUILD),
        *judge_matrix(case, header, BUILD),
        judge_source(case, header.keys, BUILD),
        _judge_metadata(case, header.keys),
        _judge_name(header.keys),
        *map(LLAMA_CPP.judged, judge_names(case, _level(case, header.levels), planned, BUILD)),
    ]


def _judge_folder(case: Case) -> list[Finding]:
    """Everything about a folder that transformers loads."""
    findings = [_judge_index(case.artifact), *_judge_hashes(case.artifact, _names(case.artifact))]
    try:
        stored = check_index(case.artifact)
        found = quantization(case.artifact)
        promised = promise(found) if found else None
    except SourceError as error:
        return [*findings, BUILD.fail("headers", without_folders(error.message, case.artifact))]
    except ValueError as error:
        return [*findings, BUILD.fail("headers", f"quantization_config of config.json: {error}")]
    findings += [
        *judge_scales(case.artifact, stored, BUILD),
        *judge_folder_plan(case, stored, BUILD),
        judge_companions(case, BUILD),
        judge_source(case, {}, BUILD),
    ]
    if found and promised is None:
        reason = f"layers by quant_method {found.get('quant_method')!r} are not known to this check"
        return [*findings, BUILD.skip("layers", reason)]
    folder = Folder(stored, split_experts(_expected_headers(case), stored), promised)
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.bytes
    cache, version = (promised.cache, promised.version) if promised else (None, None)
    by_rules = [
        judge_folder_level(case, promised, sizes.most_common(1)[0][0], BUILD),
        *judge_layers(case, folder, BUILD),
        *judge_ignore(folder, BUILD),
        *judge_cache(stored, cache, options_of(case).get("kv_cache"), case.source.facts.layers, BUILD),
    ]
    return [*findings, *(COMPRESSED_TENSORS.judged(finding, version) for finding in by_rules)]


def _expected_headers(case: Case) -> dict[str, TensorHeader]:
    """The source's tensors but those that the plan leaves out."""
    ledger = case.output.ledger if case.output is not None else None
    lines = ledger.tensors if ledger is not None else ()
    dropped = {name for line in lines if line.fate is Fate.DROPPED for name in names(line.name)}
    return {name: tensor for name, tensor in source_headers(case.source).items() if name not in dropped}


def _planned_names(case: Case) -> list[str]:
    """Model files of the repository to be, when this run made the artifact; they may not all be on the disk."""
    path = case.workspace.root / "plan.json"
    if case.output is None or not path.is_file():
        return []
    plan = Plan.model_validate_json(path.read_text(encoding="utf-8"))
    return [file.name for output in plan.outputs if output.repo == case.output.repo for file in output.files]


def _level(case: Case, known: Sequence[str]) -> str | None:
    """The level that users put behind the repository's name."""
    if case.output is not None:
        return case.output.level
    tag = tag_of(case.artifact.name)
    return tag if tag in (*known, *ALIASES, *LABELS) else None


def _judge_loading(case: Case) -> Finding:
    """llama.cpp loads header and vocabulary, of this very file."""
    try:
        of_gguf(case, anew=True)
    except UnloadableError as error:
        return BUILD.fail("loads", str(error))
    return BUILD.fact("loads", "header and vocabulary", "")


def _shards(artifact: Path) -> tuple[list[str], str]:
    """File names of a GGUF's shards in order, and what is wrong with them."""
    matched = SHARD.match(artifact.name)
    if matched is None:
        return [artifact.name], ""
    names = shard_names(f"{matched['stem']}.gguf", int(matched["total"]))
    missing = [name for name in names if not (artifact.parent / name).is_file()]
    if missing:
        return names, f"missing: {', '.join(missing)}"
    first = names.index(artifact.name)
    return names, "" if first == 0 else f"{artifact.name} is not the first shard"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)


def _judge_index(folder: Path) -> Finding:
    """Every shard that a safetensors index names is there, and none that it does not."""
    index = folder / "model.safetensors.index.json"
    present = {path.name for path in folder.glob("*.safetensors")}
    if not index.is_file():
        problem = (
            "" if len(present) == 1 else "several files and no index" if present else "no safetensors file"
        )
        return BUILD.fact("shards", f"{len(present)} files", problem)
    try:
        listed = read_json(index).get("weight_map")
    except SourceError as error:
        return BUILD.fail("shards", without_folders(error.message, folder))
    if not isinstance(listed, dict):
        return BUILD.fail("shards", f"{index.name} has no weight_map")
    named = {str(name) for name in listed.values()}
    missing, extra = sorted(named - present), sorted(present - named)
    problem = f"missing: {', '.join(missing)}" if missing else ""
    problem = problem or (f"not in the index: {', '.join(extra)}" if extra else "")
    return BUILD.fact("shards", f"{len(present)} files", problem, f"{len(named)} files")


def _judge_hashes(folder: Path, names: Sequence[str]) -> list[Finding]:
    """Files are those whose hashes were recorded; nothing to say of files that are only being made."""
    sums = folder / SUMS
    if not sums.is_file():
        return []
    text = sums.read_text(encoding="utf-8", errors="replace")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2]
    recorded = {name.strip().removeprefix("*"): digest for digest, name in lines}
    listed = [name for name in names if name in recorded]
    wrong = [
        name for name in listed if not (folder / name).is_file() or sha256_of(folder / name) != recorded[name]
    ]
    problem = f"not as recorded in {SUMS}: {', '.join(wrong)}" if wrong else ""
    return [BUILD.fact("hashes", f"{len(listed) - len(wrong)} of {len(listed)}", problem)]


def _judge_tensors(case: Case, header: Header, files: int) -> Finding:
    """Embedding, output head and every layer are there, and all layers of a kind have the same tensors."""
    names = {tensor.name for tensor in header.tensors}
    promised = header.keys.get("split.tensors.count", len(header.tensors))
    tied = case.source.facts.tied_embeddings
    problems = []
    if header.keys.get("split.count", files) not in (0, files):  # 0: llama.cpp, of one whole file
        problems.append(f"split.count is {header.keys['split.count']}, the name says {files}")
    if promised != len(header.tensors):
        problems.append(f"the first shard promises {promised} tensors")
    if "token_embd.weight" not in names:
        problems.append("token_embd.weight is missing")
    if not tied and "output.weight" not in names:
        problems.append("output.weight is missing, the source's embeddings are not tied")
    if tied and header.twins is False:
        problems.append("output.weight is not token_embd.weight, the source's embeddings are tied")
    layers: dict[int, set[str]] = {}
    for name in names:
        if matched := LAYER.match(name):
            layers.setdefault(int(matched[1]), set()).add(matched[2])
    wanted = case.source.facts.layers
    if missing := [number for number in range(wanted) if number not in layers]:
        problems.append(f"layers without tensors: {missing}")
    problems += _odd_layers(layers)
    return BUILD.fact("tensors", len(header.tensors), "; ".join(problems))


def _odd_layers(layers: dict[int, set[str]]) -> list[str]:
    """Layers that lack tensors which others with the same kind of attention and feed-forward have."""

    def part(name: str) -> str:
        return name.partition("_")[0] + ("_exps" if "_exps" in name else "")

    odd = []
    kinds: dict[frozenset[str], set[str]] = {}
    for tensors in layers.values():
        kinds.setdefault(frozenset(map(part, tensors)), set()).update(tensors)
    for number, tensors in sorted(layers.items()):
        lacking = kinds[frozenset(map(part, tensors))] - tensors
        if lacking:
            odd.append(f"layer {number} lacks {', '.join(sorted(lacking))}")
    return odd[:4]


def _judge_elements(case: Case, header: Header) -> Finding:
    """As many weights as the source has, but for what the plan leaves out, padding and rope factors."""
    measured = sum(tensor.elements for tensor in header.tensors)
    ledger = case.output.ledger if case.output is not None else None
    dropped = ledger.elements(Fate.DROPPED) if ledger is not None else 0
    reference = case.source.facts.parameters - dropped
    if not reference:
        return BUILD.skip("weights", "the source's number of weights is not known")
    off = abs(measured - reference) / reference
    problem = f"{off:.1%} more or less weights than the source" if off > ELEMENTS else ""
    return BUILD.fact("weights", measured, problem, reference)


def _judge_blocks(header: Header) -> Finding:
    """No scale and no float is NaN or infinite, and no weight beyond what the source has."""
    share = header.read / max(1, header.blocks)
    measured = f"{header.read} of {header.blocks} blocks and floats read ({share:.0%})"
    return BUILD.fact("scales", measured, "; ".join(header.broken[:4]))


def _judge_metadata(case: Case, keys: Any) -> Finding:
    """Name, license, languages and origin are there and the source's."""
    card = case.source.card
    problems = [] if keys.get("general.name") else ["general.name is missing"]
    if card.license and keys.get("general.license") != card.license:
        problems.append(f"general.license is {keys.get('general.license')}, the source's is {card.license}")
    languages = keys.get("general.languages") or []
    if card.languages and set(languages) != set(card.languages):
        problems.append(f"general.languages is {languages}, the source's are {list(card.languages)}")
    if case.source.commit is not None:
        places = ("general.source.repo_url", "general.base_model.0.repo_url", "general.repo_url")
        if not any(str(keys.get(place, "")).endswith(case.source.model_id) for place in places):
            problems.append(f"no key names the source repository {case.source.model_id}")
    present = [name for name in keys if name.startswith("general.")]
    return BUILD.fact("metadata", f"{len(present)} keys", "; ".join(problems))


def _judge_name(keys: Any) -> Finding:
    """llama.cpp changes token attributes by this name alone (src/llama-vocab.cpp)."""
    name, architecture = str(keys.get("general.name", "")), str(keys.get("general.architecture", ""))
    taken = re.search(r"phi-?3", name, re.IGNORECASE) and not architecture.startswith("phi3")
    problem = "llama.cpp takes a file of this name for Phi-3 and changes its tokens" if taken else ""
    return BUILD.fact("name", name, problem)
