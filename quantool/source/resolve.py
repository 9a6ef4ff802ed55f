"""Where the checkpoint comes from: a local folder, or a Hub repository at one commit.

``resolve`` answers with a ``records.Source``. For a plan only small files are fetched and the safetensors headers are
read by range requests; for a run the weights too. Pickles are never fetched, Python files only with
``trust_remote_code``. huggingface_hub does the transfer and honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from quantool.config.sampling import to_write
from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.formats.json_file import JsonLimits, read_json, read_optional, require_bounded
from quantool.formats.safetensors import (
    INDEX,
    PICKLES,
    TensorHeader,
    check_index,
    compare,
    read_index,
    remote_headers,
    weight_files,
)
from quantool.hub.download import Listing, fetch, hub_errors, list_repository
from quantool.ledger import MTP
from quantool.origins import Origin, SourceFile
from quantool.records import Source, sha256_of
from quantool.runtime.progress import Progress
from quantool.source.adapter import CONFIG as ADAPTER
from quantool.source.adapter import WEIGHTS, LoraAdapter, base_of
from quantool.source.model_card import model_card
from quantool.source.model_facts import model_facts, read_configuration
from quantool.source.mtp import is_absent
from quantool.source.prepare import found_headers, restated, sketch
from quantool.source.rewrite import preparation_of
from quantool.source.task import SENTENCE_FILES, module_files, task_of

MODEL_FILES = ("config.json", "generation_config.json", "README.md", "LICENSE*", INDEX, *SENTENCE_FILES)
TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt")
"""Without one of these there is no tokenizer."""
CODE_FILES = ("*.py",)
DATA = (".safetensors", ".gguf", *PICKLES)

CACHED = re.compile(r"models--(?P<id>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class _Place:
    """Where one repository's files are. ``sizes`` lists all of them, also those that were not fetched."""

    model_id: str
    name: str
    commit: str | None
    folder: Path
    sizes: Mapping[str, int]
    remote: bool


def resolve(config: Config, *, weights: bool, progress: Progress) -> Source:
    """The checkpoint that ``config`` names, checked as far as its headers go.

    With ``weights`` False (a plan) nothing large is fetched and ``folder`` may lack the weights. Raises SourceError
    when the checkpoint cannot be used, DependencyError when the Hub cannot be reached or the disk is too small, and
    ConfigError for a revision of a local folder.
    """
    place, adapter = _places(config)
    small = _small_files(place, config)
    configuration, notes = read_configuration(place.folder, trust_remote_code=config.trust_remote_code)
    names, headers = _headers(place, config, weights=weights, progress=progress)
    added = _adapter(adapter, config, weights=weights, progress=progress) if adapter is not None else None
    preparation = preparation_of(
        place.folder, headers, (added[0].folder, added[1]) if added is not None else None
    )
    tokenizer = _tokenizer(place, adapter, config)
    generation = read_optional(place.folder / "generation_config.json", JsonLimits(finite=True))
    _bound(tokenizer)
    made = preparation.made_headers()
    facts, more = model_facts(configuration, generation, tokenizer.folder, made)
    headless = is_absent(configuration.top, made, facts.layers, dropped=MTP in config.drop)
    card, remarks = model_card(place.folder)
    task = task_of(place.folder, facts.architecture, configuration.top, card.pipeline_tag)
    places = {name: place.folder for name in small if place is tokenizer or not _is_tokenizer(name)}
    if tokenizer is not place:
        places |= dict.fromkeys(_chosen(tokenizer.sizes, TOKENIZER_FILES), tokenizer.folder)
    named = adapter or place
    source = Source(
        model_id=named.model_id,
        name=named.name,
        commit=named.commit,
        folder=place.folder,
        files=(
            *(_read_file(folder, name) for name, folder in sorted(places.items())),
            *(SourceFile(name=name, bytes=place.sizes[name]) for name in names),
        ),
        others=tuple(
            SourceFile(name=name, bytes=size)
            for name, size in sorted(place.sizes.items())
            if name not in small and name not in names
        ),
        facts=facts.model_copy(update={"task": task}),
        card=card,
        generation=generation,
        sampling=to_write(generation, config),
        trust_remote_code=config.trust_remote_code,
        tokenizer=tokenizer.folder if tokenizer is not place else None,
        notes=(*notes, *more, *remarks, *_other_base(place, preparation.adapter)),
        absent=(MTP,) if headless else (),
    )
    if not config.merge and adapter is None:
        raise ConfigError("merge: false, but there is no adapter", hint="name it: adapter")
    if preparation.is_plain:
        return restated(source, places) if headless else source
    origin = _origin(place, ("config.json", INDEX), names)
    return sketch(
        source, preparation, (origin, added[0] if added is not None else None), places, apart=not config.merge
    )


def _small_files(place: _Place, config: Config) -> list[str]:
    """Everything of a checkpoint but weights, fetched; SourceError without a config.json."""
    if "config.json" not in place.sizes:
        raise SourceError(
            f"{place.model_id} has no config.json", hint="is it a checkpoint in transformers' format?"
        )
    small = _chosen(place.sizes, (*MODEL_FILES, *TOKENIZER_FILES))
    if config.trust_remote_code:
        small += _chosen(place.sizes, CODE_FILES)
    _get(place, small, config)
    further = module_files(place.folder, place.sizes)
    _get(place, further, config)
    return [*small, *further]


def _origin(place: _Place, small: Sequence[str], weights: Sequence[str]) -> Origin:
    """What was found at ``place``: its ``small`` files with their hashes, its ``weights`` by size."""
    return Origin(
        model_id=place.model_id,
        commit=place.commit,
        folder=place.folder,
        files=(
            *(_read_file(place.folder, name) for name in small if name in place.sizes),
            *(SourceFile(name=name, bytes=place.sizes[name]) for name in weights),
        ),
    )


def _places(config: Config) -> tuple[_Place, _Place | None]:
    """Where the model is, and where the adapter for it, if any: ``adapter``, or ``model_id`` itself and the base that it names."""
    place = _place(config.model_id, config.cache_dir, config.revision)
    if config.adapter is not None:
        return place, _place(config.adapter, config.cache_dir, config.adapter_revision)
    if ADAPTER not in place.sizes or any(_is_model_weight(name) for name in place.sizes):
        return place, None
    _get(place, [ADAPTER], config)
    base, revision = base_of(place.folder)
    return _place(base, config.cache_dir, revision), place


def _is_model_weight(name: str) -> bool:
    return name == INDEX or (name.startswith("model") and name.endswith(".safetensors"))


def _adapter(
    place: _Place, config: Config, *, weights: bool, progress: Progress
) -> tuple[Origin, dict[str, TensorHeader]]:
    """The adapter at ``place`` and the headers of its tensors; fetches them when ``weights``."""
    for name in (ADAPTER, WEIGHTS):
        if name not in place.sizes:
            raise SourceError(
                f"{place.model_id} has no {name}", hint="an adapter is a folder as peft saves it"
            )
    _get(place, [ADAPTER, *([WEIGHTS] if weights else [])], config, progress if weights else None)
    found = _origin(place, (ADAPTER,), (WEIGHTS,))
    return found, found_headers(found)


def _other_base(place: _Place, adapter: LoraAdapter | None) -> list[str]:
    """A note when the adapter says it was trained on another model than the one it is merged into."""
    if adapter is None or adapter.base is None or _last(adapter.base) == _last(place.model_id):
        return []
    return [
        f"the adapter says that it was trained on {_last(adapter.base)}; it is merged into {_last(place.model_id)}"
    ]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _bound(tokenizer: _Place) -> None:
    """SourceError for a JSON file of the tokenizer that would do harm to the libraries that read it."""
    for name in _chosen(tokenizer.sizes, TOKENIZER_FILES):
        if name in ("special_tokens_map.json", "added_tokens.json"):
            read_json(tokenizer.folder / name)
        elif name.endswith(
            ".json"
        ):  # can be tens of megabytes: the tokenizers library says whether it is sound
            require_bounded(tokenizer.folder / name)


def overlay(source: Source, folder: Path) -> Source:
    """The same source in one ``folder`` of links, its own files beside those of the other tokenizer.

    Returned as it is when ``tokenizer_name`` asked for no other. Weights that were not fetched are not linked; what
    links an earlier call left in ``folder`` is replaced.
    """
    if source.tokenizer is None:
        return source
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        file.name: source.tokenizer if _is_tokenizer(file.name) else source.folder for file in source.files
    }
    wanted = {
        folder / name: (place / name).resolve() for name, place in places.items() if (place / name).exists()
    }
    links = {path: path.readlink() for path in folder.rglob("*") if path.is_symlink()}
    if links != wanted:  # else left alone: stages on other nodes may be reading
        for path in links:
            path.unlink()
        for path, origin in sorted(wanted.items()):
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(origin)
    return source.model_copy(update={"folder": folder, "tokenizer": None})


def _place(name: str, cache_dir: Path | None, revision: str | None) -> _Place:
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        return _local(name, path, revision)
    if not HUB_ID.fullmatch(name):
        raise SourceError(
            f"{name!r} is neither a folder here nor a Hub id",
            hint="a Hub id looks like organisation/model; a relative path starts in the current folder",
        )
    listing = list_repository(name, revision, cache_dir)
    return _Place(name, name.rpartition("/")[2], listing.commit, listing.folder, listing.sizes, remote=True)


def _local(name: str, path: Path, revision: str | None) -> _Place:
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        hint = "give the folder of a checkpoint, or a Hub id"
        raise SourceError(f"{name} {what}", hint=hint)
    folder = path.resolve()
    cached = CACHED.search(folder.as_posix())
    commit = cached["commit"] if cached else None
    if revision is not None and revision != commit:
        raise ConfigError(
            f"revision {revision!r} means nothing for the local folder {name}", hint="remove revision"
        )
    files = [file for file in (*folder.iterdir(), *folder.glob("[!.]*/*")) if file.is_file()]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    if cached:
        hub_id = cached["id"].replace("--", "/")
        return _Place(hub_id, hub_id.rpartition("/")[2], commit, folder, sizes, remote=False)
    return _Place(name, folder.name, None, folder, sizes, remote=False)


def _tokenizer(place: _Place, adapter: _Place | None, config: Config) -> _Place:
    """Where the tokenizer files are, fetched; an adapter's own count before its base's. SourceError when there are none."""
    found = place
    if adapter is not None and _chosen(adapter.sizes, VOCABULARIES):
        found = adapter
    if config.tokenizer_name is not None:
        found = _place(config.tokenizer_name, config.cache_dir, None)
    if found is not place:
        _get(found, _chosen(found.sizes, TOKENIZER_FILES), config)
    if not _chosen(found.sizes, VOCABULARIES):
        raise SourceError(
            f"{found.model_id} has no tokenizer ({', '.join(VOCABULARIES)})",
            hint="name another one: tokenizer_name",
        )
    own_code = read_optional(found.folder / "tokenizer_config.json").get("auto_map")
    if own_code and not config.trust_remote_code and not (found.folder / "tokenizer.json").is_file():
        raise SourceError(
            f"{found.folder / 'tokenizer_config.json'}: auto_map: the tokenizer needs Python code of the checkpoint",
            hint="read that code; then allow it with trust_remote_code: true",
        )
    return found


def _headers(
    place: _Place, config: Config, *, weights: bool, progress: Progress
) -> tuple[tuple[str, ...], dict[str, TensorHeader]]:
    """The weight files and their headers; fetches the files when ``weights``."""
    if not place.remote:
        headers = check_index(place.folder)
        return tuple(sorted({tensor.file for tensor in headers.values()})), headers
    index = read_index(place.folder / INDEX) if INDEX in place.sizes else None
    names = weight_files(place.sizes, index, place.model_id)
    if weights:
        _get(place, names, config, progress)
    if all((place.folder / name).exists() for name in names):
        return names, check_index(place.folder)
    with hub_errors(place.model_id, config.revision):
        headers = remote_headers(
            place.model_id, place.commit or "main", {name: place.sizes[name] for name in names}
        )
    if index is not None:
        compare(index, headers, place.model_id)
    return names, headers


def _get(place: _Place, names: Iterable[str], config: Config, progress: Progress | None = None) -> None:
    if place.remote:
        listing = Listing(place.commit or "main", place.folder, place.sizes)
        fetch(place.model_id, listing, tuple(names), config.cache_dir, progress)


def _chosen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, folder by folder; data and code never match by accident."""
    return sorted(
        name
        for name in names
        if not name.endswith(DATA) and any(_matches(name, pattern) for pattern in patterns)
    )


def _matches(name: str, pattern: str) -> bool:
    code = name.endswith(".py") == pattern.endswith(".py")  # tokenizer* is not meant to bring tokenizer_x.py
    return code and name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _is_tokenizer(name: str) -> bool:
    return bool(_chosen((name,), TOKENIZER_FILES))


def _read_file(folder: Path, name: str) -> SourceFile:
    path = folder / name
    return SourceFile(name=name, bytes=path.stat().st_size, sha256=sha256_of(path))
