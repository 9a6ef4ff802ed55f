"""What quantool's fitted types reach, beside stock levels and beside the rule of llama.cpp's pull request 15550, as a table.

    python tests/fit_comparison.py tests/models/tiny-chat --output out --calibration tests/models/text/calibration.txt \
        --heldout en=tests/models/text/heldout.en.txt
    python tests/fit_comparison.py tiny-moe …                                    the trained mixture of experts
    python tests/fit_comparison.py MODEL … --recipe Q4_K_M=types.txt             a recipe made elsewhere, instead of a search

For each level: the stock file, one whose types the rule chose, and one whose types were chosen by measuring, all from the same
base, with the same importance matrix, of at most the same size. They are scored by quantool's own check on texts that nothing
was chosen on, and compared over the windows of these texts: each window is scored with both files, so the differences are
paired. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests/models"))

import making
import moe
import numpy as np

from quantool.config.schema import Config, Corpus, Validation
from quantool.formats.tensor_types import pattern, read_recipe
from quantool.plugins.contract import Case
from quantool.records import Gates
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.texts.corpus import corpora
from quantool.validation._engines.reference import references
from quantool.validation._findings.paired import of_means
from quantool.validation._findings.statistics import Tokens, summarize
from quantool.validation._score.scores import compute, kept_scores
from tests import rule_15550

STOCK, RULE, OURS = "stock", "rule", "ours"
WAYS = (STOCK, RULE, OURS)


@dataclass(frozen=True)
class Score:
    """One file on one text. ``windows`` are the mean KLD of each."""

    bytes: int
    mean_kld: float
    kld_99: float
    same_top: float
    windows: tuple[float, ...]


Row = tuple[str, str]
"""Level and text."""


def scored(size: int, tokens: Tokens, windows: int) -> Score:
    """What the tokens of ``windows`` windows say of a file of ``size`` bytes."""
    found = summarize(tokens)
    by_window = tokens.kld.astype(np.float64).reshape(windows, -1).mean(1)
    return Score(
        size, found.mean_kld.value, found.kld_99.value, found.same_top_p.value, tuple(map(float, by_window))
    )


def advantage(other: Score, ours: Score) -> float:
    """Probability that files equally close to the reference differ at least so much in favour of ours; paired."""
    return of_means([-value for value in other.windows], [-value for value in ours.windows]).better


def table(scores: Mapping[Row, Mapping[str, Score]]) -> str:
    """The Markdown table: a line for each level and text."""
    heads = ("level", "text", "MB stock/rule/ours", "KLD stock", "KLD rule", "KLD ours", "ours/stock", "p",
             "ours/rule", "p", "99 % KLD stock/rule/ours", "same top stock/rule/ours")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for (level, text), by_way in scores.items():
        all_ = [by_way.get(way) for way in WAYS]
        ours = by_way[OURS]
        cells = [level, text, _beside(all_, lambda one: f"{one.bytes / 1e6:.3f}")]
        cells += [f"{one.mean_kld:.5f}" if one else "-" for one in all_]
        for other in all_[:2]:
            cells += (
                ["-", "-"]
                if other is None
                else [f"{ours.mean_kld / other.mean_kld:.3f}", f"{advantage(other, ours):.1g}"]
            )
        cells.append(_beside(all_, lambda one: f"{one.kld_99:.4f}"))
        cells.append(_beside(all_, lambda one: f"{one.same_top:.2%}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _beside(scores: Sequence[Score | None], shown: Callable[[Score], str]) -> str:
    return " / ".join("-" if one is None else shown(one) for one in scores)


def made_of(base: Path, matrix: Path, files: Mapping[Path, Mapping[str, str]]) -> None:
    """Quantize ``base`` to each file with its types by tensor, all others at Q8_0."""
    runs = [
        making.run("Q8_0", path, matrix, "calibration", tensor_types={pattern(name): kind for name, kind in types.items()})
        for path, types in files.items()
    ]  # fmt: skip
    making.quantized(base, runs)


def scores_of(config: Config, files: Sequence[Path], workspace: Workspace) -> dict[Path, dict[str, Score]]:
    """The scores of GGUF files by text, beside the checkpoint's own predictions."""
    source = resolve(config, weights=True, progress=making.QUIET)
    cases = [
        Case(path, "llama.cpp", f"compared/{path.stem}", source, config, Gates(), workspace) for path in files
    ]
    known = references(cases[0], corpora(config), making.QUIET)
    compute(cases, known, making.QUIET)
    found = {}
    for case in cases:
        kept = kept_scores(case, known)
        if kept.failure:
            raise SystemExit(f"{case.artifact}: {kept.failure}")
        found[case.artifact] = {
            one.windows.corpus.name: scored(case.artifact.stat().st_size, tokens, one.windows.count)
            for one, tokens in zip(known, kept.tokens, strict=True)
        }
    return found


def fitted(config: Config, sizes: Sequence[int]) -> list[Path]:
    """Files of at most these sizes, their types chosen by quantool."""
    fit = [{"size": f"{size}B"} for size in sizes]
    options = (config.quantization_config or {}) | {"fit": fit}
    _, artifacts = making.make(config.model_copy(update={"quantization_config": options}))
    chosen = [one for one in artifacts if one.details.get("fit")]
    return [one.folder / one.files[0].name for one in sorted(chosen, key=lambda one: one.bytes())]


def compare(
    config: Config, recipes: Mapping[str, Path]
) -> tuple[dict[Row, dict[str, Score]], dict[str, float]]:
    """Make and score everything; the second value is the seconds that choosing took."""
    root, levels = config.output_path, [level for job in config.requested() for level in job.levels()]
    plan, artifacts = making.make(config)
    made = making.Made(Path(config.model_id), root, plan, tuple(artifacts))
    stock = {one.level: one.folder / one.files[0].name for one in artifacts}
    started = time.monotonic()
    rated = rule_15550.rate(made.base, made.matrix)
    chosen = {root / f"rule-{level}.gguf": rated.types(stock[level].stat().st_size) for level in levels}
    seconds = {RULE: time.monotonic() - started}
    ours = {root / f"ours-{level}.gguf": read_recipe(recipes[level]) for level in levels if level in recipes}
    made_of(made.base, made.matrix, chosen)
    making.quantized(
        made.base, [making.run("Q8_0", path, made.matrix, "calibration", tensor_types=types) for path, types in ours.items()]
    )  # fmt: skip
    started = time.monotonic()
    searched = [level for level in levels if level not in recipes]
    paths = fitted(config, [stock[level].stat().st_size for level in searched]) if searched else []
    seconds[OURS] = time.monotonic() - started
    files = {(level, STOCK): stock[level] for level in levels}
    files |= {(level, RULE): root / f"rule-{level}.gguf" for level in levels}
    files |= {(level, OURS): root / f"ours-{level}.gguf" for level in recipes}
    by_size = sorted(searched, key=lambda level: stock[level].stat().st_size)
    files |= {(level, OURS): path for level, path in zip(by_size, paths, strict=True)}
    found = scores_of(config, list(dict.fromkeys(files.values())), Workspace(root / "compared"))
    texts = list(next(iter(found.values())))
    rows = {
        (level, text): {way: found[files[level, way]][text] for way in WAYS}
        for level in levels
        for text in texts
    }
    return rows, seconds


def main() -> None:
    """Run the whole comparison from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint's folder, or tiny-moe")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--levels", default="Q3_K_M,Q4_K_M,Q5_K_M")
    parser.add_argument("--recipe", action="append", default=[], metavar="LEVEL=FILE")
    parser.add_argument("--tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--calibration-tokens", type=int, default=40 * 512)
    parser.add_argument("--pre-tokenizer", help="as quantization_config.pre_tokenizer")
    arguments = parser.parse_args()
    model = (
        moe.write_trained_moe(arguments.output / "model")
        if arguments.model == "tiny-moe"
        else Path(arguments.model)
    )
    texts = [
        Corpus(name=name, path=Path(path)) for name, _, path in (t.partition("=") for t in arguments.heldout)
    ]
    config = making.config(
        model, arguments.output / "made", arguments.levels.split(","),
        quantization_config={"imatrix": True, "pre_tokenizer": arguments.pre_tokenizer},
        dataset_path=arguments.calibration, calibration_config={"max_tokens": arguments.calibration_tokens},
        validation=Validation(corpora=tuple(texts), max_tokens=arguments.tokens), device="cpu",
    )  # fmt: skip
    recipes = {level: Path(path) for level, _, path in (one.partition("=") for one in arguments.recipe)}
    rows, seconds = compare(config, recipes)
    print(table(rows))
    print("choosing took " + ", ".join(f"{value:.0f} s ({way})" for way, value in seconds.items()))


if __name__ == "__main__":
    main()
