"""Texts as token ids on both sides: llama.cpp's tokenizer of a GGUF, and the tokenizers of ``hf_tokenizer``.

llama.cpp loads the vocabulary only, in a worker: a file that it cannot load raises ``UnloadableError`` here, which a
check turns into a REGRESSION. What it answers follows from the file's keys, so that levels which have the same keys, by
the hash of each one's own, are asked once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError, SourceError
from quantool.formats.gguf_header import SHARD, read_header, read_shards, shard_names
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends, key_of
from quantool.runtime.llama_cpp import LlamaLog, load_gguf
from quantool.runtime.process import call, name_of
from quantool.runtime.worker import Report, Work
from quantool.runtime.workspace import Stage
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._findings.builder import without_folders

SURROUNDINGS = 4  # tokens shown on each side of a difference
TEMPLATE = "tokenizer.chat_template"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
TOKENIZER = Depends(libraries=("transformers", "tokenizers"))
"""What the source's tokenizer answers."""
LLAMA_CPP = Depends(libraries=("llama-cpp-python",))
OF_A_LEVEL = ("general.file_type", "general.quantization_version", "quantize.", "split.")
"""Beginnings of the keys in which levels of one base may differ, and which no tokenizer or template reads."""


class UnloadableError(Exception):
    """The artifact's vocabulary or template is of no use to an engine; the message is the engine's reason."""

    def __init__(self, reason: str, case: Case) -> None:
        super().__init__(without_folders(reason, case.artifact, case.artifact.parent))


@dataclass(frozen=True)
class ProbeText:
    """A text to tokenize: whether BOS/EOS are added as the tokenizer's settings say, and special tokens recognized."""

    name: str
    text: str
    add_special: bool = False
    parse_special: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF's vocabulary says through llama.cpp; ids are None where there is no such token."""

    size: int
    bos: int | None
    eos: int | None
    eot: int | None
    pad: int | None
    adds_bos: bool
    adds_eos: bool
    space_prefix: bool
    """Whether llama.cpp puts a space before the text and before what follows a special token (SentencePiece only)."""
    ends: tuple[int, ...]
    """Ids at which generation stops (``llama_vocab_is_eog``)."""
    templates: dict[str, str]
    """The chat templates by name; the one without a name is ``default``."""
    template_names: tuple[str, ...]
    """What ``tokenizer.chat_templates`` lists."""
    keys: dict[str, str]
    """The single values of the file's ``tokenizer.ggml.`` keys, as text."""
    pieces: tuple[str, ...]


def gguf_key(case: Case, depends: Depends, *parts: Any) -> str | None:
    """The key of what llama.cpp says of the case's GGUF without its weights: that of its keys, less those of a level.

    None for a file with a header that is refused, or that lacks a shard: such a one has to be asked itself.
    """
    first = case.artifact
    shard = SHARD.match(first.name)
    names = shard_names(f"{shard['stem']}.gguf", int(shard["total"])) if shard else [first.name]
    try:
        status = [first.with_name(name).stat() for name in names]
        return case.key(
            depends, _keys_hash(first, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in status)), *parts
        )
    except (OSError, SourceError):
        return None


@lru_cache(maxsize=16)
def _keys_hash(first: Path, state: tuple[tuple[int, int, int], ...]) -> str:  # noqa: ARG001 - for the cache
    """SHA-256 of the names and values of all keys of a GGUF but those ``OF_A_LEVEL``; raises SourceError."""
    header = read_shards(first)[0]
    digest = hashlib.sha256()
    for name, (start, end) in sorted(header.spans.items()):
        if not name.startswith(OF_A_LEVEL):
            digest.update(f"{len(name)} {name} {end - start} ".encode() + header.raw[start:end])
    return digest.hexdigest()


def of_gguf(
    case: Case, texts: Sequence[ProbeText] = (), *, anew: bool = False
) -> tuple[Vocabulary, list[list[int]]]:
    """The vocabulary of the case's GGUF and the ids of ``texts`` in it; raises UnloadableError.

    Another file with the same keys may have been asked before, unless ``anew`` wants this one loaded.
    """
    log = case.workspace.logs / f"vocabulary-{case.name.replace('/', '-')}.log"
    probes = [vars(text) for text in texts]
    stages = [Stage("vocabulary", gguf_key(case, LLAMA_CPP))]
    if texts:
        stages.append(Stage("vocabulary-texts", gguf_key(case, LLAMA_CPP, probes)))

    def produce(missing: list[int]) -> list[dict[str, Any]]:
        result = call(tokenize, {"model": str(case.artifact), "texts": probes}, log=log, failure=WorkerError)
        return [(result["vocabulary"], {"ids": result["ids"]})[number] for number in missing]

    try:
        results = case.workspace.together(stages, produce, anew=anew)
    except WorkerError as error:
        raise UnloadableError(crash(error, "llama.cpp"), case) from error
    except QuantizationError as error:
        raise UnloadableError(f"llama.cpp: {error.message}", case) from error
    fields = results[0]
    lists = {name: tuple(fields[name]) for name in ("ends", "pieces", "template_names")}
    return Vocabulary(**fields | lists), results[1]["ids"] if texts else []


def by_source(case: Case, name: str, work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """What the worker ``work`` answers for the source's folder.

    Kept in the workspace under ``name``, for the next artifact and for other checks that ask the same.
    """
    small = tuple(file for file in case.source.files if not file.name.endswith(WEIGHTS))
    key = key_of(TOKENIZER, case.source.model_copy(update={"files": small}), name_of(work), request)
    whole = {
        "folder": str(case.source.folder),
        "trust_remote_code": case.source.trust_remote_code,
        **request,
    }
    log = case.workspace.logs / "tokenizer-reference.log"
    stage = Stage(f"reference-tokens-{name}", key)  # reference-{check} holds what the model answers
    return case.workspace.together([stage], lambda _: [call(work, whole, log=log)])[0]


def by_artifact(case: Case, work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The same for the folder of an artifact that transformers loads; raises UnloadableError."""
    log = case.workspace.logs / f"tokenizer-{case.name.replace('/', '-')}.log"
    whole = {
        "folder": str(case.artifact),
        "trust_remote_code": case.source.trust_remote_code,
        **request,
    }
    try:
        return call(work, whole, log=log)
    except SourceError as error:
        raise UnloadableError(f"transformers: {error.message}", case) from error


def differing(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first difference; None when equal."""
    if list(expected) == list(found):
        return None
    pairs = enumerate(zip(expected, found, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(expected), len(found)))


def explain(expected: Sequence[int], found: Sequence[int], pieces: Sequence[str]) -> str:
    """The first difference of two lists of ids with its surroundings, as pieces and ids."""
    index = differing(expected, found)
    if index is None:
        raise AssertionError

    def around(ids: Sequence[int]) -> str:
        shown = ids[max(0, index - SURROUNDINGS) : index + SURROUNDINGS]
        return " ".join(f"{_piece(token, pieces)!r}:{token}" for token in shown) or "nothing"

    return f"at token {index}: expected {around(expected)}; found {around(found)}"


def _piece(token: int, pieces: Sequence[str]) -> str:
    return pieces[token] if 0 <= token < len(pieces) else "?"


def tokenize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: load the vocabulary of a GGUF and tokenize.

    Request: ``model`` (path), ``texts`` (``ProbeText`` as objects). Result: ``vocabulary`` (fields of
    ``Vocabulary``), ``ids`` (a list for each text). Raises LoadError.
    """
    import llama_cpp

    path = Path(request["model"])
    ids: list[list[int]] = []
    with LlamaLog() as log, load_gguf(path, log, vocabulary=True) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        for done, text in enumerate(request["texts"]):
            ids.append(_tokenize(llama_cpp, vocabulary, text))
            report(done + 1, len(request["texts"]))
        return {"vocabulary": _describe(llama_cpp, model, vocabulary, str(path)), "ids": ids}


def _tokenize(library: Any, vocabulary: Any, text: dict[str, Any]) -> list[int]:
    raw = text["text"].encode()
    room = len(raw) + 16
    ids = (library.llama_token * room)()
    count = library.llama_tokenize(
        vocabulary, raw, len(raw), ids, room, text["add_special"], text["parse_special"]
    )
    if count < 0:  # more tokens than bytes: only a normalizer that llama.cpp does not have could do that
        raise QuantizationError(f"llama.cpp made {-count} tokens of {len(raw)} bytes")
    return list(ids[:count])


def _keys(library: Any, model: Any) -> dict[str, str]:
    """The single values of the file's ``tokenizer.`` keys, as text."""
    import ctypes

    def read(get: Any, index: int) -> str:
        size = get(model, index, None, 0) + 1
        value = ctypes.create_string_buffer(size)
        get(model, index, value, size)
        return value.value.decode("utf-8", "replace")

    names = (
        read(library.llama_model_meta_key_by_index, index)
        for index in range(library.llama_model_meta_count(model))
    )
    return {
        name: read(library.llama_model_meta_val_str_by_index, index)
        for index, name in enumerate(names)
        if name.startswith("tokenizer.")
    }


def _template_names(model: str) -> list[str]:
    """The list ``tokenizer.chat_templates``, which llama.cpp's own interface does not give."""
    return list(read_header(Path(model)).value(f"{TEMPLATE}s", []))


def _describe(library: Any, model: Any, vocabulary: Any, path: str) -> dict[str, Any]:
    def known(token: int) -> int | None:
        return token if token >= 0 else None

    def text_of(token: int) -> str:
        found: bytes = library.llama_vocab_get_text(vocabulary, token) or b""
        return found.decode("utf-8", "replace")

    size = library.llama_vocab_n_tokens(vocabulary)
    keys = _keys(library, model)
    templates = {
        name.removeprefix(TEMPLATE).removeprefix(".") or "default": text
        for name, text in keys.items()
        if name == TEMPLATE or name.startswith(f"{TEMPLATE}.")
    }
    sentencepiece = library.llama_vocab_type(vocabulary) == library.LLAMA_VOCAB_TYPE_SPM
    return {
        "size": size,
        "bos": known(library.llama_vocab_bos(vocabulary)),
        "eos": known(library.llama_vocab_eos(vocabulary)),
        "eot": known(library.llama_vocab_eot(vocabulary)),
        "pad": known(library.llama_vocab_pad(vocabulary)),
        "adds_bos": bool(library.llama_vocab_get_add_bos(vocabulary)),
        "adds_eos": bool(library.llama_vocab_get_add_eos(vocabulary)),
        "space_prefix": sentencepiece and keys.get("tokenizer.ggml.add_space_prefix") != "false",
        "ends": [token for token in range(size) if library.llama_vocab_is_eog(vocabulary, token)],
        "templates": templates,
        "template_names": _template_names(path) if templates.keys() - {"default"} else [],
        "keys": {name: text for name, text in keys.items() if name.startswith("tokenizer.ggml.")},
        "pieces": [text_of(token) for token in range(size)],
    }
