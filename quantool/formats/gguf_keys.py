"""The keys with which a GGUF says what checkpoint it was made from and how to sample."""

from __future__ import annotations

from quantool.records import Source, fingerprint

COMMIT = "quantool.source.commit"
WEIGHTS = "quantool.source.weights_sha256"
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
"""A name of generation_config.json to the key that the engine takes as its default (gguf-py/gguf/metadata.py)."""
ADAPTER = "quantool.adapter"
"""The file beside a GGUF whose adapter belongs to it (``merge: false``)."""
UNREAD = "0" * 64
"""Stands for the weights' fingerprint in a rehearsal, which reads none; as long as one."""


def weights_sha256(source: Source) -> str | None:
    """One SHA-256 for the weight files, whatever their names; None while nobody has read them."""
    hashes = [file.sha256 for file in source.files if file.name.endswith(".safetensors")]
    if not hashes or None in hashes:
        return None
    return fingerprint(sorted(str(digest) for digest in hashes))


def origin_keys(source: Source) -> dict[str, str]:
    """The keys of ``source``; the weights' one is ``UNREAD`` where they have not been read."""
    keys = {WEIGHTS: weights_sha256(source) or UNREAD}
    return keys | ({COMMIT: source.commit} if source.commit else {})
