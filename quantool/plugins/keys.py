"""What a result depends on: declared by the method, check or stage that makes it; the key it is kept under is built here.

A result is taken again as long as its key is the same. Quantool's own version and the checkpoint are part of every key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from quantool.config.schema import Config
from quantool.records import FileRecord, Source, fingerprint
from quantool.runtime.arithmetic import native
from quantool.runtime.versions import version_of

Entry = TypeVar("Entry")

EVERY_FIELD = "*"
UNCOUNTED = frozenset(
    {
        "model_id", "revision", "tokenizer_name", "adapter", "adapter_revision",  # the checkpoint counts by its files
        "method", "quant_level", "quantization_config", "quantizations",  # so does the artifact
        "output_path", "cache_dir", "dataset_cache_dir",
        "push_to_hub", "repo_id", "private", "publish", "disk_bounded", "card", "sign", "cluster",
    }
)  # fmt: skip
"""Keys of a configuration that ``EVERY_FIELD`` leaves out: they say where things go, or count by what they lead to."""
DEFAULTS = {"device": "auto"}
"""What a key of the configuration means that nobody set."""
ENGINES = {
    "llama.cpp": ("llama-cpp-python", "torch", "transformers", "tokenizers"),
    "transformers": ("torch", "transformers", "tokenizers", "compressed-tensors"),
    "vllm": ("vllm", "torch", "transformers", "tokenizers", "compressed-tensors"),
}
"""Distributions that an engine's results depend on; transformers has the tokenizer, torch the output head."""

PACKED = frozenset(
    {"README.md", "quantool.json", "SHA256SUMS", "Modelfile", "canary.json", "provenance.json", "model.sig"}
)
"""What packing writes beside an artifact, with the pictures in ``plots/``: no part of it."""

Inputs = Callable[[Config], Iterable[tuple[str, str | None]]]
"""What a configuration leads to (texts, tools, limits): name and identity; None where nothing tells a change."""


@dataclass(frozen=True)
class Depends:
    """What a result depends on beside the checkpoint and quantool's own version."""

    fields: tuple[str, ...] = ()
    """Keys of the configuration, dotted: ``validation.context``; a section counts whole, ``EVERY_FIELD`` is all."""
    inputs: tuple[Inputs, ...] = ()
    libraries: tuple[str, ...] = ()
    """Distributions whose version counts."""
    engine: bool = False
    """Whether the artifact's engine computes: then the versions of its ``ENGINES`` count."""
    gates: bool = False
    """Whether the limits of the artifact's level count."""
    folder: bool = False
    """Whether the other files of the artifact's folder count: those of the plan; of given artifacts what lies there."""
    without: tuple[str, ...] = ()
    """Options of a method that change no byte, or that count by what follows from them, handed in as a part."""

    def __or__(self, other: Depends) -> Depends:
        """All that either depends on."""
        return Depends(
            fields=_either(self.fields, other.fields),
            inputs=_either(self.inputs, other.inputs),
            libraries=_either(self.libraries, other.libraries),
            engine=self.engine or other.engine,
            gates=self.gates or other.gates,
            folder=self.folder or other.folder,
            without=_either(self.without, other.without),
        )

    def is_traceable(self, config: Config) -> bool:
        """Whether a change of every input would be seen; if not, nothing that was kept may be taken again."""
        return all(identity is not None for given in self.inputs for _, identity in given(config))

    def versions(self, engine: str = "") -> dict[str, str]:
        """Quantool's version, those of the libraries (empty for a missing one), and torch's arithmetic where it computes."""
        names = ("quantool", *self.libraries, *(ENGINES.get(engine, ()) if self.engine else ()))
        found = {name: version_of(name) for name in names}
        return found | ({"arithmetic": ", ".join(native())} if "torch" in found else {})


UNDECLARED = Depends(fields=(EVERY_FIELD,))
"""Of a method that declares nothing, until the core adds the texts and libraries that it knows."""


def key_of(
    depends: Depends,
    source: Source,
    *parts: Any,
    config: Config | None = None,
    options: BaseModel | None = None,
    engine: str = "",
) -> str:
    """The key of a result: ``parts`` are what only its maker knows (token ids, other keys), as JSON values or records.

    ``config`` is needed by declarations with fields or inputs, ``options`` are the method's, ``engine`` the artifact's.
    """
    if config is None and (depends.fields or depends.inputs):
        raise AssertionError
    return fingerprint(
        source.identity(),
        {name: value(config, name) for name in depends.fields if config is not None},
        [sorted(given(config), key=str) for given in depends.inputs if config is not None],
        depends.versions(engine),
        engine if depends.engine else "",
        None if options is None else options.model_dump(mode="json", exclude=set(depends.without)),
        parts,
    )


def own_files(files: Iterable[FileRecord]) -> list[FileRecord]:
    """The files of an artifact without what packing put beside them, which is written anew at every run."""
    return [file for file in files if file.name not in PACKED and not file.name.startswith("plots/")]


def value(config: Config, name: str) -> Any:
    """What a configuration says under a dotted key; None for an entry that a table does not have."""
    if name == EVERY_FIELD:
        return config.model_dump(mode="json", exclude=set(UNCOUNTED))
    found: Any = config
    for part in name.split("."):
        if found is None:
            break
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part)
    return DEFAULTS.get(name) if found is None else found


def _either(mine: tuple[Entry, ...], theirs: tuple[Entry, ...]) -> tuple[Entry, ...]:
    return tuple(dict.fromkeys((*mine, *theirs)))
