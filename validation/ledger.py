"""Whether the finished artifact holds what the plan's ledger says of every tensor and file of the source.

The ledger is made before weights are touched; this reads the artifact's own headers, name by name, and looks for tensors
whose values were lost though their names are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import JsonValue

from quantool.errors import SourceError
from quantool.formats.safetensors import read_headers as read_safetensors
from quantool.formats.safetensors import some
from quantool.ledger import CHOSEN, ArtifactTensor, Fate, Ledger, TensorLine, names
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding
from quantool.runtime.progress import Progress
from quantool.validation._engines.unpacked import quantization
from quantool.validation._files.fitted_layers import with_choice
from quantool.validation._files.gguf_levels import options_of
from quantool.validation._files.modules import promise
from quantool.validation._files.tensor_values import (
    HeldTensor,
    constant_parts,
    gguf_tensors,
    is_constant,
    of_safetensors,
    safetensors_tensors,
)
from quantool.validation._findings.builder import FindingBuilder, without_folders

BUILD = FindingBuilder("ledger")
WEIGHTS = ("weight", "weight_packed", "qweight", "bias")
"""Last parts of the names of what holds weights; beside them stand scales, zero points and shapes."""
EXPERTS = re.compile(r"_exps\.|\.experts\.[a-z]")
"""In the name of a tensor that holds all experts of a layer, along its first axis."""
SHOWN = 4


@check("ledger", depends=Depends(fields=("drop",)))
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Every tensor and file that the plan accounts for is in the artifact, none is more, and none lost its values."""
    del progress  # seconds: headers and samples
    ledger = case.output.ledger if case.output is not None else None
    if ledger is None:
        return [BUILD.skip("tensors", "no plan says what became of the source's tensors")]
    files = _judge_files(case, ledger)
    if not ledger.traced:
        return [BUILD.skip("tensors", "its method does not say what becomes of each tensor"), files]
    try:
        if case.engine == "transformers" and options_of(case).get("fit"):
            ledger = with_choice(ledger, promise(quantization(case.artifact)))
        held = gguf_tensors(case) if case.engine == "llama.cpp" else safetensors_tensors(case.artifact)
    except SourceError as error:
        return [BUILD.fail("tensors", without_folders(error.message, case.artifact)), files]
    except ValueError as error:
        return [BUILD.fail("tensors", f"quantization_config of config.json: {error}"), files]
    return [_judge_tensors(ledger, held, case.details), _judge_values(case, ledger, held), files]


def _judge_tensors(
    ledger: Ledger, held: Mapping[str, HeldTensor], details: Mapping[str, JsonValue]
) -> Finding:
    """Names, dtypes and shapes are those of the ledger (of the recipe where types were chosen), no more and no fewer."""
    promised = {
        tensor.name: (_with_type(tensor, details), line)
        for line in ledger.tensors
        for tensor in line.stored()
    }
    lost = [_origin(name, line) for name, (_, line) in promised.items() if name not in held]
    changed = [
        f"{name} is {held[name].dtype} {[*held[name].shape]}, not {tensor.dtype} {[*tensor.shape]}"
        for name, (tensor, _) in promised.items()
        if name in held and not _same(held[name], tensor)
    ]
    tied = {name for line in ledger.tensors if line.fate is Fate.TIED for name in names(line.name)}
    more = sorted(held.keys() - promised.keys() - tied)
    problems = [f"missing: {some(lost)}"] * bool(lost) + changed[:4]
    problems += [f"not accounted for: {some(more)}"] * bool(more)
    return BUILD.fact("tensors", ledger.statement(), "; ".join(problems))


def _with_type(tensor: ArtifactTensor, details: Mapping[str, JsonValue]) -> ArtifactTensor:
    """The tensor with the type that a search chose for it, where the plan left it open."""
    recipe = details.get("recipe")
    if tensor.dtype != CHOSEN or not isinstance(recipe, dict):
        return tensor
    return tensor.model_copy(update={"dtype": str(recipe.get(tensor.name, CHOSEN)).upper()})


def _origin(name: str, line: TensorLine) -> str:
    return name if not line.name or name == line.name else f"{name} (of {line.name})"


def _same(found: HeldTensor, promised: ArtifactTensor) -> bool:
    """A single number may be stored without dimensions."""
    shapes = {promised.shape, () if promised.shape == (1,) else promised.shape}
    return found.dtype == promised.dtype and found.shape in shapes


def _judge_values(case: Case, ledger: Ledger, held: Mapping[str, HeldTensor]) -> Finding:
    """No tensor, and no expert of one, is one value throughout that in the source is not, and no scale is zero throughout."""
    found = [(tensor, line) for line in ledger.tensors for tensor in line.stored() if tensor.name in held]
    suspects = [
        (tensor, line, expert, constant)
        for tensor, line in found
        if line.fate.is_in and held[tensor.name].bytes
        for expert, constant in _constants(held[tensor.name], alone=len(line.to) == 1)
    ]
    source = _source_tensors(case) if suspects else {}
    problems = []
    for tensor, line, expert, constant in suspects:
        origins = [source[name] for name in _origins(tensor.name, line)]
        if expert is not None:
            origins = _of_expert(origins, expert, tensor.shape[0])
        if any(is_constant(origin) is None for origin in origins):
            what = "zero" if constant == 0 else "one value"
            which = "" if expert is None else f": expert {expert}"
            problems.append(f"{_origin(tensor.name, line)}{which} is {what} throughout, the source's is not")
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return BUILD.fact("values", f"{len(found)} tensors looked into", "; ".join(problems[:SHOWN]) + more)


def _constants(data: HeldTensor, *, alone: bool) -> Iterator[tuple[int | None, int]]:
    """Whether a tensor is one value throughout (None, and that of ``is_constant``), else which of its experts are.

    ``alone``: it is all that became of a tensor, with no scale beside it.
    """
    is_weight = data.name.rpartition(".")[2] in WEIGHTS or alone
    constant = is_constant(data) if is_weight or data.is_float else None
    if constant is not None and (constant == 0 or is_weight):
        yield None, constant
    elif constant is None and is_weight and EXPERTS.search(data.name) and len(data.shape) > 1:
        yield from constant_parts(data).items()


def _source_tensors(case: Case) -> dict[str, HeldTensor]:
    files = [case.source.folder / file.name for file in case.source.files if _is_weights(file.name)]
    return of_safetensors(case.source.folder, read_safetensors(files).values())


def _of_expert(origins: Sequence[HeldTensor], expert: int, count: int) -> list[HeldTensor]:
    """What one of ``count`` experts was made of: of as many tensors its own, of others its part."""
    if len(origins) == count:
        return [origins[expert]]
    return [origin.part(expert) if origin.shape[0] == count else origin for origin in origins]


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _origins(name: str, line: TensorLine) -> Iterable[str]:
    """The source's tensors that a tensor of the artifact was made of: those of its line with its numbers."""
    own = line.numbers(name)
    every = [*names(line.name)]
    return [origin for origin in every if line.numbers(origin)[: len(own)] == own] or every


def _judge_files(case: Case, ledger: Ledger) -> Finding:
    """Files that are carried are there."""
    folder = case.artifact if case.artifact.is_dir() else case.artifact.parent
    carried = [line.name for line in ledger.files if line.fate is Fate.COPIED]
    lost = [name for name in carried if not (folder / name).is_file()]
    fates = ", ".join(
        f"{count} {fate}" for fate in Fate if (count := sum(line.fate is fate for line in ledger.files))
    )
    return BUILD.fact("files", fates or "none", f"missing: {some(lost)}" if lost else "")
