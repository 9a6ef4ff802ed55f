"""Whether vLLM would load and run a quantized folder: its quantization_config against its tensors, without a GPU.

vLLM joins modules (q, k and v; gate and up; all experts of a layer) and gives each joined one a single scheme. What a
checkpoint quantizes in parts only, names otherwise, or leaves without scales is refused there, or read as noise. Rules
of vLLM 0.24 (``_findings.rules``), below ``vllm/model_executor/layers/quantization``: ``compressed_tensors/utils.py``
(``should_ignore_layer``, ``find_matched_target``), ``compressed_tensors/compressed_tensors.py`` (the attention cache),
``utils/quant_utils.py`` (``is_layer_skipped``, for AutoAWQ); see ``vllm_kernels`` for what multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantool.errors import SourceError
from quantool.formats.safetensors import TensorHeader, check_index, some
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Verdict
from quantool.runtime.progress import Progress
from quantool.source.mtp import part_of
from quantool.validation._engines import unpacked
from quantool.validation._files.modules import (
    FLOATS,
    HEAD,
    ROUTER,
    Group,
    LayerScheme,
    Module,
    Promise,
    expected_parts,
    groups,
    matches,
    modules,
    promise,
)
from quantool.validation._files.vllm_kernels import Heads, kernel, unsplittable
from quantool.validation._findings.builder import FindingBuilder, without_folders
from quantool.validation._findings.rules import COMPRESSED_TENSORS, VLLM

NAME = "serving"
BUILD = FindingBuilder(NAME)
SPLITS = (1, 2, 4, 8)
CLASSES = (
    "QKVParallelLinear",
    "MergedColumnParallelLinear",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ReplicatedLinear",
)
"""vLLM's linear layers, which a target such as ``Linear`` is looked for in."""
EXPERTS = "RoutedExperts"
UNREAD = "weight_shape"
"""A part that may come along."""


@dataclass(frozen=True)
class Served:
    """A group of modules as vLLM would take it: its scheme, None for full precision; or why it could not."""

    group: Group
    scheme: LayerScheme | None
    problem: str = ""


@check(NAME, depends=Depends(libraries=("vllm", "compressed-tensors")))
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Fused modules, names, scales and kernels of a quantized folder, by the rules of vLLM; no GPU is needed."""
    del progress  # headers only
    folder = case.artifact
    try:
        found = unpacked.quantization(folder) if folder.is_dir() else {}
        promised = promise(found) if found else None
        headers = check_index(folder) if found else {}
    except (SourceError, ValueError) as error:
        return [BUILD.fail("quantization_config", without_folders(str(error), folder))]
    if not found:
        what = "a folder without quantization_config" if folder.is_dir() else "a GGUF"
        reason = f"it is {what}; these are vLLM's rules for folders with one"
        return [BUILD.skip("quantization_config", reason)]
    if promised is None or not all(scheme.is_covered for scheme in promised.schemes):
        reason = f"quant_method {found.get('quant_method')!r} with a scheme that this check does not know"
        return [BUILD.skip("quantization_config", reason)]
    layers = modules(headers)
    served = [serve(promised, group, layers) for group in groups(layers)]
    findings = [
        _finding("quantization_config", promised.method, list(promised.problems)),
        _judge_fusion(served),
        _judge_names(promised, served, layers),
        _judge_parts(served),
        _judge_kernels(served),
    ]
    if promised.cache is not None:
        layers_run = {
            name: tensor
            for name, tensor in headers.items()
            if part_of(name, case.source.facts.layers) is None
        }
        findings.append(_judge_cache(promised, layers_run, case.source.facts.kv_heads))
    if not any(finding.verdict is Verdict.REGRESSION for finding in findings):
        facts = case.source.facts
        findings.append(_judge_splits(served, Heads(facts.heads, facts.kv_heads)))
    return [COMPRESSED_TENSORS.judged(VLLM.judged(finding), promised.version) for finding in findings]


def _finding(metric: str, measured: str | None, problems: Sequence[str], note: str = "") -> Finding:
    """PASS without ``problems``, REGRESSION with the first of them."""
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    problem = "; ".join([*problems[:3], *more])
    return BUILD.fact(metric, measured, problem, note="" if problem else note)


# --- which scheme a module gets


def serve(promised: Promise, group: Group, layers: Sequence[Module]) -> Served:
    """The scheme that vLLM would give ``group``; ``layers`` are all modules of the checkpoint."""
    if promised.method == "awq":
        return _serve_autoawq(promised, group, layers)
    names = [module.name for module in group.modules]
    if group.name in promised.ignore:
        return Served(group, None)
    ignored = [any(matches(name, pattern) for pattern in promised.ignore) for name in names]
    if any(ignored):
        return Served(group, None, "" if all(ignored) else _partly("ignored", names, ignored))
    whole = _target(promised, group)
    own = [_named(promised, name) or whole for name in names]
    if whole is None:
        if any(own) and not all(own):
            return Served(group, None, _partly("targeted", names, [scheme is not None for scheme in own]))
        whole = own[0]
    if any(scheme != whole for scheme in own):
        return Served(
            group, whole, f"{group.name}: its parts have different schemes, and vLLM gives them one"
        )
    return Served(group, whole)


def _target(promised: Promise, group: Group) -> LayerScheme | None:
    """By the group's own name, else by the class that it has in vLLM."""
    if (found := _named(promised, group.name)) is not None:
        return found
    classes = (EXPERTS, *CLASSES) if group.experts else () if group.name == HEAD else CLASSES
    for scheme in promised.schemes:
        for target in scheme.targets:
            if any(_of_class(name, target) for name in classes):
                return scheme
    return None


def _named(promised: Promise, name: str) -> LayerScheme | None:
    for scheme in promised.schemes:
        if any(matches(name, target) for target in scheme.targets):
            return scheme
    return None


def _of_class(name: str, target: str) -> bool:
    return matches(name, target) if target.startswith("re:") else target.lower() in name.lower()


def _partly(how: str, names: Sequence[str], hit: Sequence[bool]) -> str:
    those = [name for name, yes in zip(names, hit, strict=True) if yes]
    others = [name for name, yes in zip(names, hit, strict=True) if not yes]
    return f"{some(those)} are {how}, {some(others)} are not, and vLLM runs them as one"


def _serve_autoawq(promised: Promise, group: Group, layers: Sequence[Module]) -> Served:
    """A part of a name in ``modules_to_not_convert`` leaves a module alone; an empty list means what is not packed."""
    left = promised.ignore or tuple(module.name for module in layers if not module.quantized)
    (scheme,) = promised.schemes
    if group.name == HEAD and not promised.head:
        return Served(group, None)
    if any(part in group.name for part in left):
        return Served(group, None)
    if group.experts:
        return Served(group, scheme)
    names = [module.name for module in group.modules]
    hit = [any(part in name for part in left) for name in names]
    if any(hit):
        return Served(group, None, "" if all(hit) else _partly("left alone", names, hit))
    return Served(group, scheme)


# --- findings


def _judge_fusion(served: Sequence[Served]) -> Finding:
    """Every joined module has one scheme, in the configuration and in the files."""
    joined = [layer for layer in served if len(layer.group.modules) > 1]
    problems = [layer.problem for layer in joined if layer.problem]
    for layer in joined:
        stored = [module.quantized for module in layer.group.modules]
        if not layer.problem and any(stored) and not all(stored):
            problems.append(_partly("quantized", [module.name for module in layer.group.modules], stored))
    return _finding("fused_modules", f"{len(joined)} joined", problems)


def _judge_names(promised: Promise, served: Sequence[Served], layers: Sequence[Module]) -> Finding:
    """Targets and ignore mean the modules that the files hold, quantized or not as these are."""
    problems = []
    for layer in served:
        for module in layer.group.modules:
            if layer.problem or module.quantized == (layer.scheme is not None):
                continue
            if module.quantized:
                problems.append(f"{module.name} is quantized, but vLLM would read it as full precision")
            elif not ROUTER.search(module.name):  # vLLM never quantizes these, whatever the targets
                problems.append(f"{module.name} is not quantized, but no entry of ignore says so")
    names = [module.name for module in layers] + [layer.group.name for layer in served] + [HEAD]
    if promised.method == "awq":
        lost = [part for part in promised.ignore if not any(part in name for name in names)]
    else:
        lost = [entry for entry in promised.ignore if not entry.startswith("re:") and entry not in names]
        lost += [
            target for scheme in promised.schemes for target in scheme.targets if not _known(target, names)
        ]
    problems += [f"{name!r} in targets or ignore is neither a module nor a class of vLLM" for name in lost]
    count = sum(module.quantized for module in layers)
    return _finding("names", f"{count} of {len(layers)} modules quantized", problems)


def _known(target: str, names: Sequence[str]) -> bool:
    classes = (*CLASSES, EXPERTS, "ParallelLMHead", "VocabParallelEmbedding")
    return any(matches(name, target) for name in names) or any(_of_class(name, target) for name in classes)


def _judge_parts(served: Sequence[Served]) -> Finding:
    """Scales, zero points and packed weights are there, no others, in shapes that fit."""
    problems: list[str] = []
    count = 0
    for layer in served:
        if layer.scheme is None:
            continue
        for module in layer.group.modules:
            if module.quantized:
                count += 1
                problems += _odd_parts(layer.scheme, module)
    return _finding("scales", f"{count} modules", problems)


def _odd_parts(scheme: LayerScheme, module: Module) -> Iterator[str]:
    outputs, inputs = module.shape(scheme.weights.bits)
    expected = {part: size for part, _, size in expected_parts(scheme, outputs, inputs)}
    absent = [part for part in expected if part not in (*module.parts, UNREAD)]
    extra = [part for part in module.parts if part not in (*expected, UNREAD)]
    if absent or extra:
        yield f"{module.name} lacks {' and '.join(absent) or 'nothing'}" + (
            f" and has {' and '.join(extra)}, which vLLM has no place for" if extra else ""
        )
        return
    size = scheme.weights.group
    if size is not None and inputs % size:
        yield f"{module.name}: groups of {size} do not divide its {inputs} inputs"
        return
    for part in ("weight_scale", "scales", "input_scale"):
        tensor = module.parts.get(part)
        if tensor is not None and tensor.dtype not in FLOATS:
            yield f"{module.name}.{part} is {tensor.dtype}, not one of {', '.join(FLOATS)}"
    scale = "scales" if scheme.form == "awq" else "weight_scale"
    tensor, shape = module.parts[scale], expected[scale]
    if tensor.elements != math.prod(shape):
        yield f"{tensor.name} has {list(tensor.shape)}, but {scheme.weights.strategy} means {list(shape)}"


def _judge_kernels(served: Sequence[Served]) -> Finding:
    """Every quantized module has a kernel in vLLM; says which, and the GPUs that run it."""
    problems: list[str] = []
    names: dict[str, list[str]] = {}
    for layer in served:
        if layer.scheme is None or not all(module.quantized for module in layer.group.modules):
            continue
        found = kernel(layer.scheme, layer.group)
        if found.problem:
            problems.append(f"{layer.group.name}: {found.problem}")
        else:
            names.setdefault(f"{found.name} (compute capability {found.gpus})", []).append(layer.group.name)
    kernels = ", ".join(f"{name}: {len(those)} modules" for name, those in names.items())
    return _finding("kernel", ", ".join(name.partition(" (")[0] for name in names) or None, problems, kernels)


def _judge_cache(promised: Promise, headers: dict[str, TensorHeader], heads: int) -> Finding:
    """The attention cache's numbers are FP8, and every layer has its scales, one or one for each of the ``heads`` of keys.

    ``headers`` are those of the model's layers.
    """
    cache = promised.cache
    if cache is None:
        raise AssertionError
    problems = []
    if (cache.kind, cache.bits) != ("float", 8):
        problems.append(f"the attention cache in {cache.bits}-bit {cache.kind}; vLLM takes 8-bit float")
    if cache.strategy not in ("tensor", "attn_head") or not cache.symmetric:
        problems.append(
            f"scales of the attention cache by {cache.strategy}; vLLM takes symmetric ones by tensor"
        )
    places = {name.rpartition(".")[0].rpartition(".")[0] for name in headers if ".k_proj." in name}
    bare = [
        place for place in sorted(places) if not {f"{place}.k_scale", f"{place}.v_scale"} <= headers.keys()
    ]
    count = heads if cache.strategy == "attn_head" else 1
    odd = [
        tensor.name
        for place in sorted(places)
        for part in "kv"
        if (tensor := headers.get(f"{place}.{part}_scale")) is not None and tensor.elements != count
    ]
    if odd:
        problems.append(f"not {count} numbers, as scales by {cache.strategy} have: {some(odd)}")
    if bare and not cache.dynamic:
        problems.append(f"no k_scale and v_scale in {some(bare)}: vLLM would take 1")
    return _finding("kv_cache", f"{len(places) - len(bare)} of {len(places)} layers", problems)


def _judge_splits(served: Sequence[Served], heads: Heads) -> Finding:
    """Over how many GPUs the layers can be split (tensor parallelism); never a regression."""
    fits, notes = [], []
    for gpus in SPLITS:
        why = ""
        if heads.queries % gpus or (heads.keys % gpus and gpus % heads.keys):
            why = f"{heads.queries} heads and {heads.keys} of keys cannot be shared out"
        for layer in served if not why else ():
            if layer.scheme is not None:
                why = why or unsplittable(layer.scheme, layer.group, gpus, heads)
        if why:
            notes.append(f"not over {gpus}: {why}")
        else:
            fits.append(str(gpus))
    return _finding("tensor_parallel", ", ".join(fits), [], "; ".join(notes))
