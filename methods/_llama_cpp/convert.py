"""The child that runs llama.cpp's own converter (``convert_hf_to_gguf.py``, ``conversion/``) on a checkpoint.

It brings its own ``gguf`` package, which differs from the one on the package index: never import both in one process.
What is changed around it, and why:

* the pre-tokenizer may be named by the user, or by the steps in tokenizer.json where they are those of a name: upstream
  knows tokenizers by a hash over their vocabulary only;
* the chat template is the one that transformers applies: upstream prefers tokenizer_config.json to chat_template.jinja;
* tokens added to a SentencePiece vocabulary get their type from tokenizer.json too: upstream reads it from a list that
  transformers 5 no longer writes, and ``<|im_start|>`` would be plain text to llama.cpp;
* ``general.name`` is the source's name: upstream takes the folder's, and llama.cpp changes its behaviour by that name;
* names guessed from the folder are those of the source's own folder, also where a folder of links is converted;
* a README.md whose front matter upstream cannot read gives what quantool can read of it, which the plan notes;
* tensors are prepared ahead of the writer, with the same bytes (``convert_ahead``);
* how states are pooled is what ``1_Pooling/config.json`` says, for every architecture (``pooled``);
* ``rehearse`` stops before tensor data is read or written, so that headers alone (sparse files) are enough.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from quantool.errors import DependencyError, QuantizationError, SourceError
from quantool.methods._llama_cpp import pooled
from quantool.methods._llama_cpp.convert_ahead import cores, prepared_ahead, round_with_torch
from quantool.methods._llama_cpp.lineage import Lineage
from quantool.methods._llama_cpp.name_pre_tokenizer import PreTokenizer
from quantool.runtime.worker import Report, preloaded
from quantool.source.model_card import front_matter

UPSTREAM = (
    NotImplementedError, FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, RuntimeError, struct.error,
)  # fmt: skip
"""What the converter raises for a checkpoint that it cannot convert."""
MOST_TEXT = 300
OUT_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}


@preloaded("transformers")
def convert(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Convert a checkpoint to GGUF.

    Request: ``toolchain`` (folder), ``model`` (folder), ``output`` (path), ``type`` (f16, bf16 or f32), ``metadata``
    (path of a metadata override file), ``folder_name`` (what upstream guesses names by), ``pre_tokenizer`` (name or null),
    ``chat_template`` (text or null), ``named_templates`` (name to text),
    ``add_space_prefix`` (bool or null), ``pooling`` (name or null), ``extra`` (further string keys), ``split_bytes`` (0: one file), ``rehearse`` (header only).
    Result: ``files`` (paths written), ``headers`` (of a rehearsal: bytes of each file's header without padding), ``sources``
    (of a rehearsal: name of a tensor to the names of those that it is made of),
    ``keys`` (scalar metadata), ``tokens``, ``space_prefix_dropped``, ``equal_steps`` (the pre-tokenizer that the steps
    named, or null), ``tensors`` (name to shape, type, bytes and number of the shard).
    """
    from huggingface_hub.errors import StrictDataclassError  # of a config.json that transformers refuses

    conversion, gguf = _load(Path(request["toolchain"]))
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    try:
        return _convert(conversion, gguf, request, report)
    except (*UPSTREAM, StrictDataclassError) as error:
        raise _explain(error, Path(request["toolchain"]), Path(request["model"])) from error
    except OSError as error:
        if error.errno is None and "requested and" in str(error):  # numpy.ndarray.tofile: a disk that is full
            raise DependencyError(f"cannot write {request['output']}: the disk is full") from error
        raise


def _convert(conversion: ModuleType, gguf: Any, request: dict[str, Any], report: Report) -> dict[str, Any]:
    pre_tokenizer = PreTokenizer(request["pre_tokenizer"])
    pre_tokenizer.watch(conversion)
    _name_folder(gguf, request["folder_name"])
    _read_cards(gguf)
    round_with_torch(gguf)
    model, dropped, lineage = _prepare(conversion, gguf, request)
    writer = model.gguf_writer
    pre_tokenizer.write_bos(writer, gguf)
    if request["rehearse"]:
        writer.write_header_to_file(path=model.fname_out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        headers = [file.tell() for file in writer.fout]
    else:
        headers = []
        _report_progress(writer, report)
        writer.write_header_to_file(path=model.fname_out)
        writer.write_kv_data_to_file()
        with prepared_ahead(writer, gguf, request.get("threads") or cores()):
            writer.write_tensors_to_file(progress=False)
    files = writer.format_shard_names(writer.path)
    summary = _summarize(writer)
    if request["rehearse"]:
        summary["sources"] = lineage.sources(writer, Path(request["model"]))
    writer.close()
    return {
        "files": [str(file) for file in files],
        "headers": headers,
        "space_prefix_dropped": dropped,
        "equal_steps": pre_tokenizer.by_steps,
        **summary,
    }


def _load(toolchain: Path) -> tuple[ModuleType, Any]:
    if "gguf" in sys.modules:
        raise AssertionError("the converter needs its own gguf package")
    os.environ.pop("NO_LOCAL_GGUF", None)
    sys.path[:0] = [str(toolchain), str(toolchain / "gguf-py")]
    import conversion  # type: ignore[import-not-found]
    import gguf

    if toolchain not in Path(str(gguf.__file__)).parents:
        raise QuantizationError(f"the converter found the gguf package of {gguf.__file__}, not its own")
    loaded: ModuleType = conversion
    return loaded, gguf


def _name_folder(gguf: Any, name: str) -> None:
    """Let upstream guess base name, size and fine-tune by ``name``: the folder may be one of links, or a cache's."""
    guess = gguf.Metadata.apply_metadata_heuristic

    def guess_by_name(metadata: Any, card: Any, parameters: Any, _folder: Path, total: int) -> Any:
        return guess(metadata, card, parameters, Path(name), total)

    gguf.Metadata.apply_metadata_heuristic = staticmethod(guess_by_name)


def _read_cards(gguf: Any) -> None:
    """Let upstream go on with what can be read of a README.md that its own reader fails on."""
    import yaml

    load = gguf.Metadata.load_model_card

    def load_readable(folder: Path | None = None) -> dict[str, Any]:
        try:
            card: dict[str, Any] = load(folder)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if folder is None:
                raise
            card, notes = front_matter(folder)
            logging.getLogger(__name__).warning("README.md: %s; %s", error, " ".join(notes))
        return card

    gguf.Metadata.load_model_card = staticmethod(load_readable)


def _prepare(conversion: ModuleType, gguf: Any, request: dict[str, Any]) -> tuple[Any, bool, Lineage]:
    """Make the upstream model object with header and (lazy) tensors complete."""
    import torch

    folder = Path(request["model"])
    parameters = conversion.ModelBase.load_hparams(folder, False)
    architecture = conversion.get_model_architecture(parameters, conversion.ModelType.TEXT)
    try:
        kind = conversion.get_model_class(architecture, mmproj=False)
    except NotImplementedError as error:
        raise SourceError(
            f"llama.cpp's converter does not know the architecture {architecture}",
            hint="a newer llama.cpp may: set quantization_config.llama_cpp_path to a checkout",
        ) from error
    torch.set_grad_enabled(False)
    pooled.keep_classifier(kind, parameters)
    model = kind(
        folder,
        getattr(gguf.LlamaFileType, OUT_TYPES[request["type"]]),
        Path(request["output"]),
        metadata_override=Path(request["metadata"]),
        split_max_size=request["split_bytes"],
    )
    lineage = Lineage(model, gguf)
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    _type_added_tokens(model.gguf_writer, gguf, folder)
    _set_templates(model.gguf_writer, gguf, request["chat_template"], request["named_templates"])
    dropped = _set_space_prefix(model.gguf_writer, gguf, request)
    pooled.set_pooling(model.gguf_writer, gguf, request["pooling"])
    for key, value in request["extra"].items():
        model.gguf_writer.add_string(key, value)
    return model, dropped, lineage


def _set_space_prefix(writer: Any, gguf: Any, request: dict[str, Any]) -> bool:
    """Write ``add_space_prefix`` as asked; where nothing was, false if it makes the chats of the source equal.

    A SentencePiece tokenizer with ``legacy: false`` puts a space before the first word of a text only; llama.cpp puts one
    after every special token too, or none anywhere. With a chat template, text always follows a special token.
    Returns whether it decided so itself.
    """
    wanted = request["add_space_prefix"]
    chosen = wanted is None and request["chat_template"] is not None and _is_spm(writer)
    chosen = chosen and _prefixes_first_word_only(request["model"])
    if chosen:
        wanted = False
    if wanted is not None:
        for data in writer.kv_data:
            data.pop(gguf.Keys.Tokenizer.ADD_PREFIX, None)
        writer.add_add_space_prefix(wanted)
    return chosen


def _is_spm(writer: Any) -> bool:
    return bool(writer.kv_data[0]["tokenizer.ggml.model"].value == "llama")


def _prefixes_first_word_only(folder: str) -> bool:
    from transformers import AutoTokenizer

    backend = getattr(AutoTokenizer.from_pretrained(folder), "backend_tokenizer", None)
    if backend is None:
        return False
    step = json.loads(backend.to_str())["pre_tokenizer"] or {"type": None}
    return bool(step["type"] == "Metaspace" and step["prepend_scheme"] == "first")


def _explain(error: Exception, tools: Path, folder: Path) -> SourceError:
    """Turn what upstream raises into one line; its own traceback goes to the log."""
    traceback.print_exc()
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) or "tokenizer.model" in text:
        missing = "tokenizer.model" if "tokenizer.model" in text else text
        return SourceError(
            f"the converter misses {missing} in {folder}",
            hint="transformers 5 does not save tokenizer.model: copy it from the original checkpoint",
        )
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if tools / "conversion" in Path(frame.filename).parents]
    last = own[-1] if own else None
    if last and isinstance(error, AssertionError) and "vocab_size" in (last.line or ""):
        return _vocabulary_too_large(folder)
    where = f" ({Path(last.filename).relative_to(tools)}:{last.lineno}: {last.line})" if last else ""
    name = type(error).__name__ if not isinstance(error, struct.error) else "struct.error"
    reason = f"{name}: {text[:MOST_TEXT]}" if text else name
    return SourceError(
        f"llama.cpp's converter refuses this checkpoint: {reason}{where}",
        hint="config.json, tokenizer and weights must be of one model",
    )


def _vocabulary_too_large(folder: Path) -> SourceError:
    from transformers import AutoTokenizer

    last = max(AutoTokenizer.from_pretrained(folder).get_vocab().values())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return SourceError(
        f"config.json: vocab_size {size}, but the tokenizer has ids up to {last}",
        hint="use the tokenizer of this model, or mend vocab_size",
    )


def _type_added_tokens(writer: Any, gguf: Any, folder: Path) -> None:
    """Give tokens that tokenizer.json adds to a SentencePiece vocabulary the type that upstream left out.

    Special ones are control tokens, others user-defined, as ``_create_vocab_sentencepiece`` has them where
    tokenizer_config.json still lists ``added_tokens_decoder``. What upstream typed itself stays.
    """
    data = writer.kv_data[0]
    file = folder / "tokenizer.json"
    if not _is_spm(writer) or not file.is_file():
        return
    names, scores, types = (data[f"tokenizer.ggml.{key}"].value for key in ("tokens", "scores", "token_type"))
    untyped = (gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    for token in json.loads(file.read_text(encoding="utf-8")).get("added_tokens", []):
        number = token["id"]
        if number < len(types) and types[number] in untyped:
            types[number] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
            names[number] = token["content"].encode()
            scores[number] = -1000.0


def _set_templates(writer: Any, gguf: Any, template: str | None, named: dict[str, str]) -> None:
    """Make ``tokenizer.chat_template`` what transformers applies, and the named ones those it has.

    Upstream takes them from tokenizer_config.json before the files, and lists their names in the order of a set, which is
    another one in every process. A name keeps its letters and digits, as upstream writes it.
    """
    keys = gguf.Keys.Tokenizer
    for data in writer.kv_data:
        for key in [key for key in data if key.startswith(keys.CHAT_TEMPLATE)]:
            del data[key]
    if template is not None:
        writer.add_chat_template(template)
    names = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in named.items()}
    for name, text in sorted(names.items()):
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), text)
    if names:
        writer.add_array(keys.CHAT_TEMPLATES, sorted(names))


def _report_progress(writer: Any, report: Report) -> None:
    """Report bytes as upstream pads each tensor it has written (its own bar goes to a log nobody watches)."""
    total = sum(info.nbytes for shard in writer.tensors for info in shard.values())
    done = 0
    pad = writer.write_padding

    def counted(file: Any, size: int, align: int | None = None) -> None:
        nonlocal done
        pad(file, size, align)
        if writer.state.name == "TI_DATA" and file.tell() > size:
            done += size
            report(min(done, total), total)

    writer.write_padding = counted


def _summarize(writer: Any) -> dict[str, Any]:
    """Scalar keys, number of tokens and the tensors of what was prepared."""
    keys: dict[str, Any] = {}
    tokens = 0
    for data in writer.kv_data:
        for key, entry in data.items():
            if isinstance(entry.value, (bool, int, float, str)):
                keys[key] = entry.value
            elif key == "tokenizer.ggml.tokens":
                tokens = len(entry.value)
    tensors = {
        name: {
            "shape": [int(size) for size in info.shape],
            "type": info.dtype.name,
            "bytes": int(info.nbytes),
            "shard": number,
        }
        for number, shard in enumerate(writer.tensors)
        for name, info in shard.items()
    }
    return {"keys": keys, "tokens": tokens, "tensors": tensors}
