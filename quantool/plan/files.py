"""What becomes of every file of a source in an output: one line each, those included that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

from quantool.config.sampling import GENERATION
from quantool.formats.safetensors import INDEX, PICKLES
from quantool.ledger import Fate, FileLine
from quantool.plan.collisions import FILE_ENGINES
from quantool.records import OutputPlan, Source

REASONS = (
    (tuple(f"*{ending}" for ending in PICKLES), "a pickle, which can run code; the weights are read from safetensors"),
    (("consolidated*.safetensors", "original/*"), "the same weights again, in another layout"),
    (("adapter_*", "*/adapter_*"), "an adapter, which is not merged into these weights"),
    (("*.gguf",), "an artifact of somebody else"),
    (("*.onnx", "*.onnx_data", "onnx/*", "*.msgpack", "*.h5", "*.ot", "*.mlmodel", "openvino/*", "*.tflite"),
     "weights for another engine"),
    (("*.safetensors",), "weights that the checkpoint's index does not name: no loader reads them"),
    (("*.safetensors.index.json",), "an index of files that are not the checkpoint's weights"),
    (("*.py",), "Python code, which neither loader needs"),
    (("*preprocessor_config.json", "processor_config.json", "*image_processor*"),
     "settings of towers that are not in the artifact"),
    (("*.md", "*.txt", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.html", "*.ipynb", "assets/*",
      "images/*"), "documentation"),
    ((".*", "*/.*"), "of the repository, not of the model"),
    (("training_args*", "trainer_state.json", "*_results.json", "optimizer*", "scheduler*", "rng_state*", "events.*",
      "runs/*", "checkpoint-*"), "of the training"),
)  # fmt: skip
"""Patterns of names that nothing reads, with the reason; the first that fits counts."""
UNKNOWN = "no loader that quantool knows reads it"


def file_lines(output: OutputPlan, source: Source) -> tuple[FileLine, ...]:
    """A line for each file of the source, in the order of their names."""
    lines = [*_read(output, source), *_unread(source)]
    return tuple(sorted(lines, key=lambda line: line.name))


def unknown_files(source: Source) -> list[str]:
    """Files that nothing reads and nothing is known of."""
    return [line.name for line in _unread(source) if line.reason == UNKNOWN]


def _read(output: OutputPlan, source: Source) -> Iterator[FileLine]:
    planned = {file.name for file in output.files}
    in_file = output.engine in FILE_ENGINES
    for file in source.files:
        fate, reason = Fate.CONVERTED, ""
        if file.name.endswith(".safetensors"):
            reason = "its tensors have lines of their own"
        elif file.name == INDEX:
            reason = "written anew for the new shards" if file.name in planned else "one file needs none"
        elif file.name == "README.md":
            reason = "license, languages and tags are in the new card"
        elif in_file:
            fate, reason = _in_metadata(file.name)
        elif file.name == "config.json":
            reason = "the source's, with what the method adds"
        elif file.name == GENERATION and source.sampling:
            reason = "the source's, with the sampling of validation.generation"
        elif file.name in planned:
            fate = Fate.COPIED
        else:
            fate, reason = Fate.DROPPED, "the method does not carry it"
        yield FileLine(name=file.name, bytes=file.bytes, fate=fate, reason=reason)


def _in_metadata(name: str) -> tuple[Fate, str]:
    if name.endswith((".py", ".md")) or name.upper().startswith(("LICENSE", "NOTICE")):
        return Fate.DROPPED, "the file's metadata and the card name the license and the source"
    return Fate.CONVERTED, "in the file's metadata"


def _unread(source: Source) -> Iterator[FileLine]:
    for file in source.others:
        reason = next(
            (text for patterns, text in REASONS if any(fnmatch(file.name, entry) for entry in patterns)),
            UNKNOWN,
        )
        yield FileLine(name=file.name, bytes=file.bytes, fate=Fate.DROPPED, reason=reason)
