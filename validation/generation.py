"""Recommended sampling: one answer in generation_config.json, in the artifact and in the model card.

``validation.generation`` of the configuration says what it should be; without it, generation_config.json of the source.
Methods write the former into what they make, so a source that says something else is worth a note and no more.
llama.cpp takes ``general.sampling.*`` of a GGUF as its defaults, transformers and vLLM generation_config.json of a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantool.config.sampling import (
    GENERATION,
    chosen,
    disagreements,
    listed,
    of_generation,
    recommended,
    stated,
)
from quantool.errors import QuantizationError, SourceError
from quantool.formats.gguf_keys import SAMPLING_KEYS
from quantool.formats.json_file import read_optional
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding
from quantool.runtime.process import call
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.validation._files import gguf_file
from quantool.validation._findings.builder import FindingBuilder, without_folders

NAME = "generation"
CARD = "README.md"
OURS = "quantized_by: quantool"


@check(
    NAME,
    depends=Depends(fields=("validation.generation",), engine=True, folder=True),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Recommended sampling: generation_config.json, the artifact and the model card say the same."""
    del progress  # headers only
    build = FindingBuilder(NAME)
    findings = [_judge_source(case, build), _judge_artifact(case, build)]
    folder = case.artifact if case.artifact.is_dir() else case.artifact.parent
    if case.output is None:  # a run writes its card after the checks, from the same function
        findings += _judge_card(case, folder / CARD, build)
    return findings


def _judge_source(case: Case, build: FindingBuilder) -> Finding:
    """Where the user recommends something else than generation_config.json of the source, a note says so."""
    wanted = recommended(case.source, case.config)
    if not listed(wanted):
        return build.skip("sampling_source", f"{GENERATION} recommends no sampling")
    other = disagreements(
        wanted,
        of_generation(case.source.generation),
        f"the source's {GENERATION}",
        "validation.generation",
    )
    note = f"{'; '.join(other)}, which counts" if other else ""
    return build.fact("sampling_source", listed(wanted), note=note)


def _judge_artifact(case: Case, build: FindingBuilder) -> Finding:
    """The artifact carries the recommended sampling and no other."""
    wanted = chosen(case.source, case.config)
    gguf = case.engine == "llama.cpp"
    where = "the GGUF's general.sampling keys" if gguf else f"the artifact's {GENERATION}"
    try:
        found = _of_gguf(case) if gguf else of_generation(read_optional(case.artifact / GENERATION))
    except (QuantizationError, SourceError) as error:
        return build.fail("sampling", without_folders(error.message, case.artifact))
    if not found and not wanted:
        return build.skip("sampling", f"neither {GENERATION} nor the artifact recommends any")
    origin = f"the source's {GENERATION}" if case.settings.generation is None else "validation.generation"
    wrong = disagreements(wanted, found, where, origin)
    return build.fact("sampling", listed(found) or "none", "; ".join(wrong), listed(wanted))


def _of_gguf(case: Case) -> dict[str, float]:
    """``general.sampling.*`` by the names of generation_config.json."""
    log = case.workspace.logs / f"headers-{case.name.replace('/', '-')}.log"
    keys = call(gguf_file.read_keys, {"path": str(case.artifact)}, log=log)["keys"]
    found = {name: keys.get(key) for name, key in SAMPLING_KEYS.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _judge_card(case: Case, path: Path, build: FindingBuilder) -> list[Finding]:
    """The card beside an artifact that somebody packed; nothing to say where there is none of ours."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if OURS not in text:
        return []
    wanted = recommended(case.source, case.config)
    found = stated(text)
    if not found and not wanted:
        return []
    wrong = disagreements(wanted, found, f"the card ({CARD})", "the recommendation")
    return [build.fact("sampling_card", listed(found) or "none", "; ".join(wrong))]
