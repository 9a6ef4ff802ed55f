"""A folder of safetensors by its headers: what config.json promises of each layer against what is stored.

By the rules of compressed-tensors 0.19 and AutoAWQ 0.2.9 (``modules``). A pattern of ``targets`` and ``ignore`` may also be
a class (``Linear``); AutoAWQ leaves alone what has an entry of ``modules_to_not_convert`` in its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantool.formats.safetensors import TensorHeader, some
from quantool.plugins.contract import Case
from quantool.records import Finding
from quantool.validation._files.gguf_levels import options_of
from quantool.validation._files.modules import (
    EMBEDDING,
    FLOATS,
    HEAD,
    QUANTIZED,
    ROUTER,
    LayerScheme,
    Module,
    Promise,
    expected_parts,
    matches,
    modules,
)
from quantool.validation._findings.builder import SHOWN, FindingBuilder

EXPERT = re.compile(r"\.experts\.\d+\.")
LINEAR = "Linear"
EVERY_CLASS = frozenset({LINEAR, "Embedding"})
LEVELS = {
    "FP8_DYNAMIC": ("float", 8, "channel", True),
    "FP8_BLOCK": ("float", 8, "block", True),
    "FP8": ("float", 8, "tensor", True),
    "W4A16_ASYM": ("int", 4, "group", False),
    "W4A16": ("int", 4, "group", True),
    "W8A16": ("int", 8, "group", True),
    "W8A8": ("int", 8, "channel", True),
}
"""Kind, bits, strategy and symmetry of the weights at each level (compressed-tensors' ``quant_scheme.py``)."""


@dataclass(frozen=True)
class Folder:
    """The headers of artifact and source, and what config.json promises (None: not quantized)."""

    stored: Mapping[str, TensorHeader]
    source: Mapping[str, TensorHeader]
    promise: Promise | None

    @property
    def linear(self) -> dict[str, Module]:
        """Every linear layer that is stored, by name."""
        return {module.name: module for module in modules(self.stored)}

    def wanted(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the source, [outputs, inputs]; experts are one each."""
        found = {}
        for name, tensor in self.source.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and len(tensor.shape) == 2 and not EMBEDDING.search(module):
                found[module] = (tensor.shape[0], tensor.shape[1])
        return found

    def scheme_of(self, name: str) -> LayerScheme | None:
        """What the promise says of a layer; None for one that is left alone."""
        if self.promise is None or any(ignores(self.promise, name, entry) for entry in self.promise.ignore):
            return None
        if self.promise.method == "awq" and name == HEAD and not self.promise.head:
            return None
        for scheme in self.promise.schemes:
            if any(target == LINEAR or matches(name, target) for target in scheme.targets):
                return scheme
        return None


def ignores(promise: Promise, name: str, entry: str) -> bool:
    """Whether an entry of ``ignore`` leaves the layer ``name`` alone."""
    if promise.method == "awq":
        return entry in name
    return entry == LINEAR or matches(name, entry)


def judge_layers(case: Case, folder: Folder, build: FindingBuilder) -> list[Finding]:
    """Layers are quantized or left alone as config.json says; routers and, by default, the head are floats."""
    linear, wanted = folder.linear, folder.wanted()
    problems: list[str] = []
    counts = {"quantized": 0, "left alone": 0, "experts": 0}
    for name in dict.fromkeys((*wanted, *linear)):
        module, shape = linear.get(name), wanted.get(name)
        scheme = folder.scheme_of(name)
        if module is None:
            if not (name == HEAD and case.source.facts.tied_embeddings):
                problems.append(f"{name} is missing")
            continue
        if scheme is None:
            counts["left alone"] += 1
            problems += _untouched(module, shape)
        else:
            counts["quantized"] += 1
            counts["experts"] += bool(EXPERT.search(name))
            problems += _layer(module, shape or module.shape(scheme.weights.bits), scheme)
    if folder.promise is not None and not counts["quantized"]:
        problems.append("config.json has a quantization_config, and no layer is quantized")
    shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return [
        build.fact("layers", shown, _joined(problems)),
        build.fact("kept_layers", *_kept(case, linear)),
        build.fact("other_tensors", *_others(folder, linear)),
    ]


def _joined(problems: list[str]) -> str:
    """The first few problems, and how many more there are."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _untouched(module: Module, shape: tuple[int, int] | None) -> Iterator[str]:
    weight = module.parts.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        yield f"{module.name} is quantized, although config.json leaves it alone"
    elif shape is not None and weight.shape != shape:
        yield f"{module.name} is {list(weight.shape)}, the source's is {list(shape)}"


def _layer(module: Module, shape: tuple[int, int], scheme: LayerScheme) -> Iterator[str]:
    """What is wrong with a layer that should be quantized by ``scheme``; ``shape`` is [outputs, inputs]."""
    if not module.quantized:
        yield f"{module.name} is not quantized: its weight is {module.parts['weight'].dtype}"
        return
    for part, dtypes, size in expected_parts(scheme, *shape):
        tensor = module.parts.get(part)
        if tensor is None:
            yield f"{module.name} has no {part}"
        elif tensor.dtype not in dtypes or tensor.shape not in (size, _scalar(size)):
            yield (
                f"{module.name}.{part} is {tensor.dtype} {list(tensor.shape)}, "
                f"{' or '.join(dtypes)} {list(size)} is expected"
            )


def _scalar(size: tuple[int, ...]) -> tuple[int, ...]:
    """A single number may be stored without dimensions."""
    return () if size == (1,) else size


def _kept(case: Case, linear: Mapping[str, Module]) -> tuple[str, str]:
    """Routers, and the output head unless the plan asked for it: how many, and which of them are quantized."""
    options = options_of(case)
    routers = [module for name, module in linear.items() if ROUTER.search(name)]
    heads = [linear[HEAD]] if HEAD in linear and options.get("ignore") is None else []
    wrong = [module.name for module in (*routers, *heads) if module.quantized]
    shown = f"{len(routers)} routers" + (f", {HEAD}" if heads else "")
    return shown, f"quantized, and engines expect floats: {some(wrong)}" if wrong else ""


def _others(folder: Folder, linear: Mapping[str, Module]) -> tuple[str, str]:
    """Embeddings, norms, biases: every one of the source is there, as a float of the same shape."""
    mine = {f"{name}.weight" for name in (*linear, *folder.wanted())}
    others = {name: tensor for name, tensor in folder.source.items() if name not in mine}
    missing = [
        name for name in others if name not in folder.stored and not name.endswith("rotary_emb.inv_freq")
    ]
    changed = [
        name
        for name, tensor in others.items()
        if name in folder.stored
        and (folder.stored[name].shape != tensor.shape or folder.stored[name].dtype in QUANTIZED)
    ]
    problems = [f"missing: {some(missing)}"] * bool(missing) + [f"changed: {some(changed)}"] * bool(changed)
    return f"{len(others) - len(missing) - len(changed)} of {len(others)}", "; ".join(problems)


def judge_ignore(folder: Folder, build: FindingBuilder) -> list[Finding]:
    """Every entry of ``ignore`` and ``targets`` means a layer that exists: else a layer was renamed, or mistyped."""
    promise = folder.promise
    if promise is None:
        return []
    names = {*folder.wanted(), *folder.linear, HEAD, *_parents(folder.stored), *_parents(folder.source)}
    lost = [entry for entry in promise.ignore if not any(ignores(promise, name, entry) for name in names)]
    targets = [target for scheme in promise.schemes for target in scheme.targets]
    lost += [
        target
        for target in targets
        if target not in EVERY_CLASS and not any(matches(name, target) for name in names)
    ]
    problem = f"matches no layer: {some([repr(entry) for entry in lost])}" if lost else ""
    return [build.fact("ignore", some(list(promise.ignore)) or "nothing", problem)]


def _parents(headers: Iterable[str]) -> set[str]:
    """All modules of a checkpoint: every beginning of a tensor's name."""
    found = set()
    for name in headers:
        parts = name.split(".")
        found |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return found


def judge_level(case: Case, promise: Promise | None, dtype: str, build: FindingBuilder) -> Finding:
    """The level in the plan or the folder's name is what config.json promises; ``dtype`` is most of the weights'."""
    level = case.output.level if case.output is not None else _named(case.artifact.name)
    if level is None:
        return build.skip("level", f"the name {case.artifact.name} holds no level")
    if level in FLOATS:
        problem = (
            "" if promise is None and dtype == level else f"the weights are {_described(promise, dtype)}"
        )
        return build.fact("level", _described(promise, dtype), problem, level)
    found = {_key(scheme, promise) for scheme in promise.schemes} if promise is not None else set()
    wanted = LEVELS[level]
    if promise is not None and promise.method == "awq":
        wanted = (*wanted[:3], False)  # the layout always holds zero points
    allowed = {wanted}
    if (
        promise is not None and options_of(case).get("fit") and wanted[1] == 4
    ):  # layers may have been given 8 bits
        allowed.add(LEVELS["W8A16"])
    problem = (
        "" if found and found <= allowed else f"config.json says {_described(promise, dtype)}, not {level}"
    )
    return build.fact("level", _described(promise, dtype), problem, level)


def _named(name: str) -> str | None:
    """The level that a folder's name ends with; vendors write FP8-dynamic and W4A16-ASYM."""
    text = name.upper().replace("-", "_").replace(".", "_")
    return next((level for level in (*LEVELS, *FLOATS) if re.search(rf"(?:^|_){level}$", text)), None)


def _key(scheme: LayerScheme, promise: Promise | None) -> tuple[Any, ...]:
    weights = scheme.weights
    symmetric = weights.symmetric if promise is None or promise.method != "awq" else False
    return (weights.kind, weights.bits, weights.strategy, symmetric)


def _described(promise: Promise | None, dtype: str) -> str:
    if promise is None:
        return f"{dtype}, not quantized"
    parts = []
    for scheme in promise.schemes:
        weights = scheme.weights
        even = "symmetric" if weights.symmetric else "asymmetric"
        parts.append(f"{weights.bits}-bit {weights.kind} by {weights.strategy}, {even}")
    return f"{promise.method}: " + (", ".join(parts) or "nothing quantized")
