"""Whether a file is what its name and its plan say, from headers alone.

Of a GGUF: that it loads, its shards, its tensors against the architecture, the type that its tensors have against the
level in its name, and the metadata that it carries. Of an artifact that transformers loads: its shards. Hashes are
compared where a SHA256SUMS lies beside the files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantool import toolchain
from quantool.errors import QuantizationError
from quantool.process import call
from quantool.progress import Progress
from quantool.records import Finding, Verdict, sha256_of
from quantool.registry import Case, check
from quantool.validation._vocabulary import UnloadableError, of_gguf, unloadable
from quantool.worker import Report

NAME = "integrity"
SUMS = "SHA256SUMS"
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf$")  # common/download.cpp
DIGIT = re.compile(r"(?:IQ|TQ|Q|MXFP|NVFP)(\d)")
HEADROOM = (
    2.6  # bits a weight that mixtures and fallbacks of src/llama-quant.cpp add to a level's digit at most
)
FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # tools/quantize/quantize.cpp
ROUNDING = 1e-6  # relative; the header holds float32
ELEMENTS = 0.05  # share of weight elements that a conversion may drop (padding rows) or add (rope factors)
SAMPLING = {  # conversion/base.py: generation_config.json to general.sampling.*
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


@check(NAME)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Files, tensors, types and metadata, from headers: whether a file holds what its name says."""
    del progress  # headers only
    if case.engine != "llama.cpp":
        return [_judge_index(case.artifact), *_judge_hashes(case.artifact, _names(case.artifact))]
    shards, problem = _shards(case.artifact)
    findings = [
        _finding("shards", f"{len(shards)} files", problem),
        *_judge_hashes(case.artifact.parent, shards),
    ]
    if problem:
        return findings
    try:
        headers = _headers(case, shards)
    except UnloadableError as error:
        return [*findings, *unloadable(NAME, error)]
    return [
        _judge_loading(case),
        *findings,
        _judge_tensors(case, headers),
        _judge_elements(case, headers),
        *_judge_level(case, headers),
        _judge_sampling(case, headers["keys"]),
        _judge_metadata(case, headers["keys"]),
        _judge_name(headers["keys"]),
    ]


def _judge_loading(case: Case) -> Finding:
    """llama.cpp loads header and vocabulary."""
    try:
        of_gguf(case)
    except UnloadableError as error:
        return unloadable(NAME, error)[0]
    return _finding("loads", "header and vocabulary", "")


def _finding(metric: str, measured: float | str | None, problem: str, reference: Any = None) -> Finding:
    """PASS without a ``problem``, REGRESSION with one."""
    verdict = Verdict.REGRESSION if problem else Verdict.PASS
    return Finding(
        check=NAME, metric=metric, verdict=verdict, measured=measured, reference=reference, detail=problem
    )


def _skipped(metric: str, reason: str) -> Finding:
    return Finding(check=NAME, metric=metric, verdict=Verdict.SKIPPED, detail=reason)


def _shards(artifact: Path) -> tuple[list[str], str]:
    """File names of a GGUF's shards in order, and what is wrong with them."""
    matched = SHARD.match(artifact.name)
    if matched is None:
        return [artifact.name], ""
    total = int(matched["total"])
    names = [f"{matched['stem']}-{number:05d}-of-{total:05d}.gguf" for number in range(1, total + 1)]
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
        return _finding("shards", f"{len(present)} files", problem)
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing, extra = sorted(named - present), sorted(present - named)
    problem = f"missing: {', '.join(missing)}" if missing else ""
    problem = problem or (f"not in the index: {', '.join(extra)}" if extra else "")
    return _finding("shards", f"{len(present)} files", problem, f"{len(named)} files")


def _judge_hashes(folder: Path, names: Sequence[str]) -> list[Finding]:
    """Files are those whose hashes were recorded; nothing to say of files that are only being made."""
    sums = folder / SUMS
    if not sums.is_file():
        return []
    lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
    recorded = {name.strip().removeprefix("*"): digest for digest, name in lines}
    listed = [name for name in names if name in recorded]
    wrong = [
        name for name in listed if not (folder / name).is_file() or sha256_of(folder / name) != recorded[name]
    ]
    problem = f"not as recorded in {SUMS}: {', '.join(wrong)}" if wrong else ""
    return [_finding("hashes", f"{len(listed) - len(wrong)} of {len(listed)}", problem)]


def _headers(case: Case, shards: Sequence[str]) -> dict[str, Any]:
    log = case.workspace.logs / f"headers-{case.name.replace('/', '-')}.log"
    paths = [str(case.artifact.parent / name) for name in shards]
    try:
        return call("quantool.validation.integrity:read_headers", {"paths": paths}, log=log)
    except QuantizationError as error:
        raise UnloadableError(error.message) from error


def read_headers(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: the header of a GGUF in ``paths`` (its shards in order).

    Result: ``keys`` (of the first shard, without the tokenizer's lists), ``shards`` (each ``tensors``, their
    number), ``level`` (by ``general.file_type``), ``levels`` (all there are), and ``tensors`` (each ``name``, ``type``, ``elements``, ``bytes``,
    ``dimensions``). Raises QuantizationError for a file that is not a whole GGUF.
    """
    toolchain.prefer_own_gguf()
    from gguf import GGUFReader

    keys: dict[str, Any] = {}
    shards, tensors = [], []
    for number, path in enumerate(request["paths"]):
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise QuantizationError(f"{Path(path).name} is damaged or cut off: {error}") from error
        if number == 0:
            keys = {
                name: field.contents()
                for name, field in reader.fields.items()
                if not name.startswith(("tokenizer.", "GGUF."))
            }
        tensors += [
            {
                "name": tensor.name,
                "type": tensor.tensor_type.name,
                "elements": int(tensor.n_elements),
                "bytes": int(tensor.n_bytes),
                "dimensions": len(tensor.shape),
            }
            for tensor in reader.tensors
        ]
        shards.append({"tensors": len(reader.tensors)})
        report(number + 1, len(request["paths"]))
    level = _level_of(keys.get("general.file_type"))
    return {"keys": keys, "shards": shards, "tensors": tensors, "level": level, "levels": _levels()}


def _levels() -> list[str]:
    """Names of all levels of ``enum llama_ftype``."""
    from gguf import LlamaFileType

    return [kind.name.partition("_")[2] for kind in LlamaFileType if "_" in kind.name]


def _level_of(file_type: int | None) -> str | None:
    from gguf import LlamaFileType

    known = {kind.value: kind.name.partition("_")[2] for kind in LlamaFileType}
    return known.get(file_type) if file_type is not None else None


def _judge_tensors(case: Case, headers: dict[str, Any]) -> Finding:
    """Embedding, output head and every layer are there, and all layers of a kind have the same tensors."""
    keys = headers["keys"]
    names = {tensor["name"] for tensor in headers["tensors"]}
    promised = keys.get("split.tensors.count", len(headers["tensors"]))
    problems = []
    if promised != len(headers["tensors"]):
        problems.append(f"the first shard promises {promised} tensors")
    if "token_embd.weight" not in names:
        problems.append("token_embd.weight is missing")
    if not case.source.facts.tied_embeddings and "output.weight" not in names:
        problems.append("output.weight is missing, the source's embeddings are not tied")
    layers: dict[int, set[str]] = {}
    for name in names:
        if matched := re.match(r"blk\.(\d+)\.(.+)", name):
            layers.setdefault(int(matched[1]), set()).add(matched[2])
    wanted = case.source.facts.layers
    if missing := [number for number in range(wanted) if number not in layers]:
        problems.append(f"layers without tensors: {missing}")
    problems += _odd_layers(layers)
    return _finding("tensors", len(headers["tensors"]), "; ".join(problems))


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


def _judge_elements(case: Case, headers: dict[str, Any]) -> Finding:
    """As many weights as the source has, but for padding and rope factors."""
    measured = sum(tensor["elements"] for tensor in headers["tensors"])
    reference = case.source.facts.parameters
    if not reference:
        return _skipped("weights", "the source's number of weights is not known")
    off = abs(measured - reference) / reference
    problem = f"{off:.1%} more or less weights than the source" if off > ELEMENTS else ""
    return _finding("weights", measured, problem, reference)


def _judge_level(case: Case, headers: dict[str, Any]) -> list[Finding]:
    """``general.file_type`` and the types of the tensors are those of the level in the names."""
    level = headers["level"]
    named = _named_levels(case, headers["levels"])
    if not named:
        reason = f"neither {case.name} nor {case.artifact.name} names a level"
        return [_skipped("file_type", reason), _skipped("bits_per_weight", reason)]
    wrong = [f"{where} says {name}" for where, name in named if name != level]
    problem = f"general.file_type is {level}, but {' and '.join(wrong)}" if wrong else ""
    return [
        _finding("file_type", str(level), problem, named[0][1]),
        _judge_bits(case, headers["tensors"], named[0][1]),
    ]


def _named_levels(case: Case, known: Sequence[str]) -> list[tuple[str, str]]:
    """Levels that the case's name and the file's name end with: where, and which."""
    stem = SHARD.sub(r"\g<stem>", case.artifact.name).removesuffix(".gguf")
    found = []
    for where, text in (("the plan", case.name.removesuffix(".gguf")), ("the file's name", stem)):
        matches = [
            name for name in (*known, *ALIASES) if re.search(rf"(?:^|[-./]){name}$", text, re.IGNORECASE)
        ]
        found += [(where, ALIASES.get(name, name)) for name in matches]
    return found


def _judge_bits(case: Case, tensors: Sequence[dict[str, Any]], level: str) -> Finding:
    """Bits a weight in the matrices of the layers lie where the level puts them: it was quantized, and no weaker."""
    options = [
        case.config.quantization_config or {},
        *(one.quantization_config for one in case.config.quantizations),
    ]
    if any("tensor_types" in option for option in options):
        return _skipped("bits_per_weight", "tensor_types of the configuration override the level")
    matrices = [one for one in tensors if one["name"].startswith("blk.") and _is_matrix(one)]
    measured = 8 * sum(one["bytes"] for one in matrices) / max(1, sum(one["elements"] for one in matrices))
    lowest, highest = _bounds(level)
    problem = ""
    if not lowest <= measured <= highest:
        counts: dict[str, int] = {}
        for one in matrices:
            counts[one["type"]] = counts.get(one["type"], 0) + 1
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        problem = f"the layers' matrices are {found}: not between {lowest:g} and {highest:g} bits a weight"
    return _finding("bits_per_weight", round(measured, 3), problem, level)


def _is_matrix(tensor: dict[str, Any]) -> bool:
    """Whether llama-quantize would quantize it: routers and convolutions stay as they are (src/llama-quant.cpp)."""
    return tensor["dimensions"] >= 2 and not re.search(r"ffn_gate_inp|conv1d|_norm|ssm_", tensor["name"])


def _bounds(level: str) -> tuple[float, float]:
    """Lowest and highest bits a weight of the layers' matrices at a level."""
    if level in FLOATS:
        return FLOATS[level], FLOATS[level]
    digit = DIGIT.search(level)
    if digit is None:  # a level of a later llama.cpp
        return 0.0, math.inf
    bits = int(digit[1])
    return float(bits), 8.5 if level == "MXFP4_MOE" else bits + HEADROOM  # all but the experts are Q8_0 there


def _judge_sampling(case: Case, keys: dict[str, Any]) -> Finding:
    """``general.sampling.*`` is what generation_config.json recommends."""
    generation = case.source.generation
    wanted = {
        ours: generation[theirs] for theirs, ours in SAMPLING.items() if generation.get(theirs) is not None
    }
    stored = {name: keys.get(f"general.sampling.{name}") for name in SAMPLING.values()}
    wrong = []
    for name, value in stored.items():
        expected = wanted.get(name)
        if expected is None and value is None:
            continue
        numbers = isinstance(expected, (int, float)) and isinstance(value, (int, float))
        if not numbers or not math.isclose(value, expected, rel_tol=ROUNDING):  # type: ignore[arg-type]
            wrong.append(f"{name} is {value}, generation_config.json says {expected}")
    if not wanted and not wrong:
        return _skipped("sampling", "generation_config.json recommends no sampling")
    return _finding("sampling", f"{len(stored) - len(wrong)} of {len(stored)}", "; ".join(wrong))


def _judge_metadata(case: Case, keys: dict[str, Any]) -> Finding:
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
    return _finding("metadata", f"{len(present)} keys", "; ".join(problems))


def _judge_name(keys: dict[str, Any]) -> Finding:
    """llama.cpp changes token attributes by this name alone (src/llama-vocab.cpp)."""
    name, architecture = str(keys.get("general.name", "")), str(keys.get("general.architecture", ""))
    taken = re.search(r"phi-?3", name, re.IGNORECASE) and not architecture.startswith("phi3")
    problem = "llama.cpp takes a file of this name for Phi-3 and changes its tokens" if taken else ""
    return _finding("name", name, problem)
