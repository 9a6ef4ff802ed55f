"""Whether a GGUF really is quantized as its level and its plan say: types of tensors by class, bits and bytes.

What each level gives to which tensors is decided by ``src/llama-quant.cpp`` of llama.cpp; the bounds here enclose that of
llama-cpp-python 0.3.36 (``_findings.rules``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantool.formats.gguf_header import SHARD
from quantool.formats.safetensors import some
from quantool.formats.tensor_types import ENDING, pattern, read_recipe
from quantool.gates import FITTED
from quantool.plugins.contract import Case
from quantool.records import Finding
from quantool.runtime import toolchain
from quantool.validation._files.gguf_file import LAYER, Header, InspectedTensor
from quantool.validation._findings.builder import FindingBuilder

DIGIT = re.compile(r"(?:IQ|TQ|Q|MXFP|NVFP)(\d)")
HEADROOM = 2.6
"""Bits a weight that mixtures and fallbacks add to a level's digit at most."""
HIGHEST = 8.5
"""Bits a weight of Q8_0, which single tensors get at low levels too: the output head, K and V beside few experts."""
FLOATS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # tools/quantize/quantize.cpp
PLAN = 1e-6
"""Relative; bits a weight of a plan are a float."""

EMBEDDING, HEAD, ROUTER, NORM, EXPERT, OTHER = "embedding", "output", "router", "norm", "experts", "other"
CLASSES = {
    EMBEDDING: r"^(?:per_layer_)?token_embd\.",
    HEAD: r"^output\.weight$",
    NORM: r"_norm(?:_\w+)?\.(?:weight|bias)$",
    ROUTER: r"\.ffn_gate_inp(?:_\w+)?\.",
    EXPERT: r"_exps\.",
    "attention q": r"\.attn_q(?:_[ab])?\.",
    "attention k": r"\.attn_k(?:_b|v_a_mqa|v_b)?\.|\.attn_kv_",
    "attention v": r"\.attn_v(?:_b)?\.",
    "attention qkv": r"\.attn_qkv\.",
    "attention output": r"\.attn_output\.",
    "ffn up": r"\.ffn_up(?:_shexp)?\.",
    "ffn gate": r"\.ffn_gate(?:_shexp)?\.",
    "ffn down": r"\.ffn_down(?:_shexp)?\.",
}
KEPT = re.compile(
    r"conv1d|shortconv|ssm_|time_mix|altup|laurel|per_layer_model_proj|indexer|position_embd|token_types"
)
"""Names of small tensors that llama.cpp leaves as they are, besides norms and routers."""
EXACT = ("embedding", "output", "attention k", "attention v", "attention output")
"""Classes that mixtures raise to 8 bits; the others stay near the level's digit."""


def class_of(name: str) -> str:
    """The class of a tensor, for example ``attention k`` or ``router``."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name)), OTHER)


def is_matrix(tensor: InspectedTensor) -> bool:
    """Whether llama-quantize would quantize it (``tensor_allows_quantization``)."""
    return (
        len(tensor.shape) >= 2
        and tensor.name.endswith("weight")
        and class_of(tensor.name) not in (ROUTER, NORM)
        and not KEPT.search(tensor.name)
    )


def judge_level(case: Case, header: Header, build: FindingBuilder) -> list[Finding]:
    """``general.file_type`` and the types of the tensors are those of the level in the names."""
    named = named_levels(case, header.levels)
    classes = judge_classes(case, header, named[0][1] if named else None, build)
    if not named:
        reason = f"neither {case.name} nor {case.artifact.name} names a level"
        return [build.skip("file_type", reason), build.skip("bits_per_weight", reason), *classes]
    wrong = [f"{where} says {name}" for where, name in named if name != header.level]
    problem = f"general.file_type is {header.level}, but {' and '.join(wrong)}" if wrong else ""
    return [
        build.fact("file_type", str(header.level), problem, named[0][1]),
        _judge_bits(case, header, named[0][1], build),
        *classes,
    ]


def named_levels(case: Case, known: Sequence[str]) -> list[tuple[str, str]]:
    """Levels that the plan or the case's name and the file's name end with: where, and which."""
    texts = [
        case.name.removesuffix(".gguf"),
        SHARD.sub(r"\g<stem>", case.artifact.name).removesuffix(".gguf"),
    ]
    if recipe_of(case):  # without it nothing says what a file of chosen types should be
        texts = [FITTED.sub("", text) for text in texts]
    found = []
    for where, text in zip(("the plan", "the file's name"), texts, strict=True):
        matches = [
            name for name in (*known, *ALIASES) if re.search(rf"(?:^|[-./]){name}$", text, re.IGNORECASE)
        ]
        found += [(where, ALIASES.get(name, name)) for name in matches]
    return found


def options_of(case: Case) -> Mapping[str, Any]:
    """The method's options: the plan's, else all that the configuration says."""
    if types := recipe_of(case):  # it says more than any option: the type of each tensor
        options = case.output.options if case.output is not None else {}
        return {**options, "tensor_types": types, "token_embedding_type": None, "output_tensor_type": None}
    if case.output is not None:
        return case.output.options
    found: dict[str, Any] = dict(case.config.quantization_config or {})
    for entry in case.config.quantizations:
        found |= entry.quantization_config
    return found


def recipe_of(case: Case) -> dict[str, str]:
    """Expression to type of a file whose types were chosen, by its record or the recipe beside it; empty for others."""
    recorded = case.details.get("recipe")
    if isinstance(recorded, dict):
        return {pattern(name): str(kind) for name, kind in recorded.items()}
    stem = SHARD.sub(r"\g<stem>", case.artifact.name).removesuffix(".gguf")
    beside = case.artifact.with_name(f"{stem}{ENDING}")
    return read_recipe(beside) if FITTED.search(stem) and beside.is_file() else {}


def demanded(name: str, options: Mapping[str, Any]) -> str | None:
    """The ggml type (upper case) that the options name for a tensor, in llama.cpp's order; None without."""
    if name == "token_embd.weight" and options.get("token_embedding_type"):
        return str(options["token_embedding_type"]).upper()
    if name == "output.weight" and options.get("output_tensor_type"):
        return str(options["output_tensor_type"]).upper()
    types: Mapping[str, str] = options.get("tensor_types") or {}
    return next((kind.upper() for pattern, kind in types.items() if re.search(pattern.lower(), name)), None)


def _judge_bits(case: Case, header: Header, level: str, build: FindingBuilder) -> Finding:
    """Bits a weight in the matrices of the layers lie where the level puts them: it was quantized, and no weaker."""
    options = options_of(case)
    matrices = [
        tensor
        for tensor in header.tensors
        if LAYER.match(tensor.name)
        and is_matrix(tensor)
        and demanded(tensor.name, options) is None
        and not _of_head(tensor, case)
    ]
    if not matrices:
        return build.skip("bits_per_weight", "tensor_types name a type for every matrix of the layers")
    measured = 8 * sum(tensor.bytes for tensor in matrices) / sum(tensor.elements for tensor in matrices)
    lowest, highest = bounds(level)
    problem = ""
    if not lowest <= measured <= highest:
        problem = f"the layers' matrices are {_counted(matrices)}: not between {lowest:g} and {highest:g} bits a weight"
    return build.fact("bits_per_weight", round(measured, 3), problem, level)


def _of_head(tensor: InspectedTensor, case: Case) -> bool:
    """Whether a tensor is of a multi-token-prediction head, whose types the drafts judge (``validation/mtp.py``)."""
    matched = LAYER.match(tensor.name)
    return matched is not None and int(matched[1]) >= case.source.facts.layers


def bounds(level: str) -> tuple[float, float]:
    """Lowest and highest bits a weight of the layers' matrices at a level."""
    if level in FLOATS:
        return FLOATS[level], FLOATS[level]
    digit = DIGIT.search(level)
    if digit is None:  # a level of a later llama.cpp
        return 0.0, math.inf
    bits = int(digit[1])
    return float(
        bits
    ), HIGHEST if level == "MXFP4_MOE" else bits + HEADROOM  # all but the experts are Q8_0 there


def judge_classes(case: Case, header: Header, level: str | None, build: FindingBuilder) -> list[Finding]:
    """Every class of tensors has the bits that level and options give it; norms and routers are floats."""
    options = options_of(case)
    classes: dict[str, list[InspectedTensor]] = {}
    for tensor in header.tensors:
        judged = demanded(tensor.name, options) is not None or not _of_head(tensor, case)
        if (is_matrix(tensor) and judged) or class_of(tensor.name) in (ROUTER, NORM):
            classes.setdefault(class_of(tensor.name), []).append(tensor)
    problems = [
        problem
        for kind, tensors in classes.items()
        for problem in _problems(kind, tensors, level, options, header)
    ]
    shown = ", ".join(f"{kind} {_bits(tensors)}" for kind, tensors in classes.items())
    return [build.fact("tensor_types", f"bits a weight: {shown}", "; ".join(problems))]


def _bits(tensors: Sequence[InspectedTensor]) -> str:
    total = 8 * sum(tensor.bytes for tensor in tensors) / max(1, sum(tensor.elements for tensor in tensors))
    return f"{total:.3g}"


def _problems(
    kind: str,
    tensors: Sequence[InspectedTensor],
    level: str | None,
    options: Mapping[str, Any],
    header: Header,
) -> list[str]:
    if kind in (ROUTER, NORM):
        quantized = [f"{tensor.name} ({tensor.type})" for tensor in tensors if tensor.type not in FLOATS]
        halved = [
            f"{tensor.name} ({tensor.type})" for tensor in tensors if kind == NORM and tensor.type != "F32"
        ]
        found = quantized or halved
        wanted = "F32" if kind == NORM else "kept in F32, F16 or BF16"
        return [f"{kind} weights must be {wanted}: {some(found)}"] if found else []
    found = []
    free = []
    for tensor in tensors:
        wish = demanded(tensor.name, options)
        if wish is None:
            free.append(tensor)
        elif tensor.type != wish and not _fell_back(tensor, wish):
            found.append(f"{tensor.name} is {tensor.type}, the options say {wish}")
    if level is None or not free or (kind == HEAD and options.get("leave_output_tensor")):
        return found[:4]
    lowest, highest = _class_bounds(kind, level, header)
    wrong = [tensor for tensor in free if not lowest <= tensor.bits <= highest and not _odd(tensor)]
    if wrong:
        found.append(
            f"{kind}: {_counted(wrong)}, {level} gives it {lowest:g} to {highest:g} bits: "
            f"{some([tensor.name for tensor in wrong])}"
        )
    return found[:4]


def _class_bounds(kind: str, level: str, header: Header) -> tuple[float, float]:
    lowest, highest = bounds(level)
    if level in FLOATS or not math.isfinite(highest):
        return lowest, highest
    if level == "IQ3_XXS":  # Q and K get IQ2_S there
        lowest = 2.0
    del header
    return lowest, max(highest, HIGHEST) if kind in EXACT else highest


def _fell_back(tensor: InspectedTensor, wish: str) -> bool:
    """Whether the width of ``tensor`` is none that blocks of the type ``wish`` divide."""
    kind = toolchain.ggml_types().get(wish.lower())
    return kind is not None and tensor.shape[-1] % kind.block != 0


def _odd(tensor: InspectedTensor) -> bool:
    """A width that no block divides stays F16 at every level."""
    return tensor.shape[-1] % 32 != 0 and tensor.type in FLOATS


def _counted(tensors: Sequence[InspectedTensor]) -> str:
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def judge_plan(case: Case, header: Header, names: Sequence[str], build: FindingBuilder) -> list[Finding]:
    """Names, bytes and bits a weight are those that the plan announced; nothing to say without a plan."""
    if case.output is None:
        return []
    planned = {file.name: file.bytes for file in case.output.files}
    found = {name: (case.artifact.parent / name).stat().st_size for name in names}
    problems = [
        f"{name} is planned and not there" if name not in found else f"{name} is there and not planned"
        for name in sorted(planned.keys() ^ found.keys())
    ]
    chosen = case.output.bits_per_weight is None  # its types came later: the plan has a budget
    problems += [
        f"{name} has {found[name]} bytes, {planned[name]} were planned"
        for name in sorted(planned.keys() & found.keys())
        if (planned[name] < found[name] if chosen else planned[name] != found[name])
    ]
    bits = (
        8
        * sum(tensor.bytes for tensor in header.tensors)
        / max(1, sum(tensor.elements for tensor in header.tensors))
    )
    wanted = case.output.bits_per_weight
    if wanted is not None and not math.isclose(bits, wanted, rel_tol=PLAN):
        problems.append(f"{bits:.6g} bits a weight, {wanted:.6g} were planned")
    return [
        build.fact(
            "planned_size",
            f"{sum(found.values())} bytes, {bits:.4g} bits a weight",
            "; ".join(problems),
            float(sum(planned.values())),
        )
    ]
