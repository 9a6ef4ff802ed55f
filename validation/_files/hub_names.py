"""What a name in a Hub repository leads to: llama.cpp's ``-hf repo:tag``, and the label that the Hub shows.

Both rules are read from their sources: ``find_best_model`` in ``common/download.cpp`` of the llama.cpp in llama-cpp-python
0.3.36, and ``parseGGUFQuantLabel`` in ``packages/tasks/src/gguf.ts`` of huggingface.js at commit 3a463ba4. The Hub says
nothing of its version: a level that is not listed here it may know by now.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantool.formats.gguf_header import SHARD
from quantool.plugins.contract import Case
from quantool.records import Finding
from quantool.validation._findings.builder import FindingBuilder

SIDECARS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""A file with one of these in its name is no model to llama.cpp (case matters)."""
DEFAULTS = ("Q4_K_M", "Q8_0")
RECORD = "quantool.json"
"""A folder with one is a repository that quantool packed."""
PRESET = "preset.ini"
"""A file of this name in the root is all that llama.cpp would fetch."""
LABELS = (
    "F32", "F16", "Q4_0", "Q4_1", "Q4_1_SOME_F16", "Q4_2", "Q4_3", "Q8_0", "Q5_0",
    "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M",
    "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
    "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8",
    "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0", "Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL",
)  # fmt: skip
LABEL = re.compile(rf"(?:UD-)?(?:{'|'.join(LABELS)})(?:_[A-Z]+)?")


def resolve(names: Sequence[str], tag: str = "") -> str | None:
    """The file that ``llama-server -hf repo:tag`` loads from a repository of ``names``; None when it refuses.

    The order is that of the Hub's listing: by name. Without a tag Q4_K_M is tried, then Q8_0, then any model.
    """
    if PRESET in names:
        return PRESET
    models = [name for name in sorted(names) if _is_model(name) and _is_first(name)]
    for wanted in [tag] if tag else DEFAULTS:
        pattern = re.compile(f"{re.escape(wanted)}[.-]", re.IGNORECASE)
        found = next((name for name in models if pattern.search(name)), None)
        if found is not None:
            return found
    return None if tag else next(iter(models), None)


def tag_of(name: str) -> str | None:
    """The tag that llama.cpp sees in a file's name (``get_gguf_split_info``), upper-cased; None without one."""
    stem = SHARD.sub(r"\g<stem>", name).removesuffix(".gguf")
    found = re.search(r"[-.]([A-Z0-9_]+)$", stem, re.IGNORECASE)
    return found[1].upper() if found else None


def _is_model(name: str) -> bool:
    return name.endswith(".gguf") and not any(mark in name.rpartition("/")[2] for mark in SIDECARS)


def _is_first(name: str) -> bool:
    shard = SHARD.match(name)
    return shard is None or int(shard["total"]) <= 1 or int(shard["number"]) == 1


def label(name: str) -> str | None:
    """The quantization that the Hub shows for a file: the last one that its upper-cased name holds."""
    found = LABEL.findall(name.upper())
    return found[-1] if found else None


def judge_names(
    case: Case, level: str | None, planned: Sequence[str], build: FindingBuilder
) -> list[Finding]:
    """``-hf repo:level`` finds exactly this file among all of the repository, and the Hub labels it with the level.

    ``planned`` are the models of the repository to be. Without a plan it is the folder, which may be none.
    """
    if level is None:
        reason = f"{case.artifact.name} names no level to ask for"
        return [build.skip("hf_resolver", reason), build.skip("hub_label", reason)]
    folder = case.artifact.parent
    present = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    names = sorted({*planned, case.artifact.name} if planned else present | {case.artifact.name})
    return [
        _judge_resolver(names, case.artifact.name, level, build, certain=bool(planned) or RECORD in present),
        _judge_label(case.artifact.name, level, build),
    ]


def _judge_resolver(
    names: Sequence[str], wanted: str, level: str, build: FindingBuilder, *, certain: bool
) -> Finding:
    found = resolve(names, level)
    problem = ""
    if found == PRESET:
        problem = f"{PRESET} beside the models is all that llama.cpp would load: remove it"
    elif found is None:
        marks = [mark for mark in SIDECARS if mark in wanted]
        why = (
            f"its name holds {marks[0]!r}, which marks a file that is no model"
            if marks
            else "no name ends so"
        )
        problem = f"llama-server -hf repo:{level} finds no file ({why}): rename {wanted}"
    elif found != wanted:
        problem = f"llama-server -hf repo:{level} loads {found}: give it and {wanted} repositories of their own, or other names"
        if not certain:
            return build.skip("hf_resolver", f"the folder is no packed one; as a repository, {problem}")
    measured = f"-hf repo:{level} finds {found}; -hf repo finds {resolve(names)}"
    return build.fact("hf_resolver", measured, problem, wanted)


def _judge_label(name: str, level: str, build: FindingBuilder) -> Finding:
    found = label(name)
    known = level in LABELS
    problem = ""
    if found != level and (known or found is not None):
        problem = f"the Hub would show {name} as {found or 'a file without quantization'}, it is {level}"
    measured = found or f"none: the Hub does not know {level}"
    return build.fact("hub_label", measured, problem, level)
