"""The keys with which a GGUF says what checkpoint it was made from."""

from __future__ import annotations

from quantool.records import Source, fingerprint

COMMIT = "quantool.source.commit"
WEIGHTS = "quantool.source.weights_sha256"
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
