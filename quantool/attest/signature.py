"""Signatures over a whole folder, in the format of OpenSSF model-signing: any verifier of that format can check them.

The signature covers every file by its SHA-256, SHA256SUMS included (https://github.com/ossf/model-signing-spec). A key is an
elliptic curve key in PEM (``openssl ecparam -name prime256v1 -genkey -noout``); without one, sigstore binds the signature to
the identity that a CI's OIDC token states.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.attest.release import SIGNATURE
from quantool.config.schema import Sign
from quantool.errors import ConfigError, DependencyError, PublicationError
from quantool.records import sha256_of

PASSWORD = "QUANTOOL_SIGN_PASSWORD"  # noqa: S105 - the variable's name
IGNORED = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore", ".cache")
"""What a checkout or a download of the Hub adds."""
BUNDLE = "application/vnd.dev.sigstore.bundle"


@dataclass(frozen=True)
class Trust:
    """Whose signature is believed: that of a public key, or of an identity that an OIDC issuer vouched for."""

    key: Path | None = None
    identity: str | None = None
    issuer: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether anybody is."""
        return self.key is not None or self.identity is not None

    def require(self) -> None:
        """ConfigError for what does not name one signer, or a key that is none; DependencyError without model-signing."""
        if (self.identity is None) != (self.issuer is None) or "" in (self.identity, self.issuer):
            raise ConfigError("--identity and --oidc-issuer belong together")
        if self.key is not None and self.identity is not None:
            raise ConfigError("a release has one signature: give --key, or --identity with --oidc-issuer")
        if self.is_given:
            _require_library()
        if self.key is not None:
            _require_public(self.key)


class SignatureError(Exception):
    """A signature that does not prove what it should; the message is the reason."""


def require_signer(settings: Sign | None) -> None:
    """DependencyError or ConfigError for what signing would refuse after hours of work."""
    if settings is None:
        return
    _require_library()
    if settings.key is not None:
        _private_key(settings.key)


def sign(folder: Path, digests: Mapping[str, str], settings: Sign) -> None:
    """Write ``model.sig`` over the files ``digests`` (SHA-256 by name); one that already covers them so is kept.

    Raises ConfigError for a key that is none, PublicationError when sigstore does not sign.
    """
    _require_library()
    from model_signing import signing

    config = _configured(signing, folder, digests)
    if settings.key is None:
        try:
            config.use_sigstore_signer(use_ambient_credentials=True).sign(folder, folder / SIGNATURE)
        except _library_errors(OSError, ValueError) as error:
            raise PublicationError(
                f"sigstore does not sign {folder.name}: {type(error).__name__}: {error}",
                hint="a keyless signature needs an OIDC token of the CI (permissions: id-token: write) and the network; "
                "or give a key: sign: {key: …}",
            ) from error
        return
    private = _private_key(settings.key)
    with tempfile.TemporaryDirectory() as place:
        public = Path(place) / "public.pem"
        public.write_bytes(_public_pem(private))
        try:
            check_signature(folder, digests, Trust(public))
        except SignatureError:
            password = os.environ.get(PASSWORD)
            config.use_elliptic_key_signer(
                private_key=settings.key, password=password.encode() if password else None
            ).sign(folder, folder / SIGNATURE)


def check_signature(folder: Path, digests: Mapping[str, str], trust: Trust) -> str:
    """Who signed ``folder``; SignatureError unless ``model.sig`` is sound, of the one who is trusted, and over ``digests``.

    Raises as ``Trust.require`` does.
    """
    trust.require()
    from model_signing import verifying

    path = folder / SIGNATURE
    if not path.is_file():
        raise SignatureError("it is not signed")
    claimed(folder)
    config = _configured(verifying, folder, digests)
    if trust.key is not None:
        config.use_elliptic_key_verifier(public_key=trust.key)
        signer = f"the key {trust.key.name} (SHA-256 {sha256_of(trust.key)[:12]})"
    else:
        config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer)
        signer = f"{trust.identity}, says {trust.issuer}"
    try:
        config.verify(folder, path)
    except _library_errors(LookupError, TypeError, ValueError, AttributeError) as error:
        raise SignatureError(
            str(error).strip() or f"not signed by that key ({type(error).__name__})"
        ) from error
    if trust.key is not None:
        _require_canonical(path)
    return signer


def claimed(folder: Path) -> dict[str, str]:
    """What ``model.sig`` says that it covers, SHA-256 by name, whoever signed it. Raises SignatureError when it is damaged."""
    try:
        bundle = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        found = {str(entry["name"]): str(entry["digest"]) for entry in payload["predicate"]["resources"]}
        kind = str(bundle["mediaType"])
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        binascii.Error,
        RecursionError,
    ) as error:
        raise SignatureError(f"{SIGNATURE} is damaged ({type(error).__name__})") from error
    if not kind.startswith(BUNDLE):
        raise SignatureError(f"{SIGNATURE} is damaged: its media type is {kind[:60]!r}")
    return found


def _require_canonical(path: Path) -> None:
    """No byte beside the signed ones was changed: white space, unknown fields, other spellings of the same."""
    from model_signing._signing.sign_sigstore_pb import Signature

    with tempfile.TemporaryDirectory() as place:
        again = Path(place) / SIGNATURE
        Signature.read(path).write(again)
        if again.read_bytes() != path.read_bytes():
            raise SignatureError(f"{SIGNATURE} was changed after it was written, beside what it signs")


def _configured(library: Any, folder: Path, digests: Mapping[str, str]) -> Any:
    """The ``Config`` of model-signing's ``signing`` or ``verifying``, told the digests: the files were read once already."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    kind = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(IGNORED)}
    )
    items = [kind.new_item(file, Digest("sha256", bytes.fromhex(digest))) for file, digest in digests.items()]

    base: Any = hashing.Config

    class KnownDigests(base):  # type: ignore[misc] # the library has no types
        def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:  # noqa: ARG002
            return manifest.Manifest(folder.name, items, kind)

    config: Any = library.Config
    return config().set_hashing_config(KnownDigests())


def _library_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What the libraries below model-signing raise of a signature that is none, and sigstore of a token that is none."""
    from cryptography.exceptions import InvalidSignature
    from google.protobuf.json_format import Error as MessageError
    from sigstore.errors import Error as SigstoreError

    return (InvalidSignature, MessageError, SigstoreError, *others)


def _require_library() -> None:
    if importlib.util.find_spec("model_signing") is None:
        raise DependencyError("signatures need model-signing", hint="pip install 'quantool[sign]'")


def _private_key(path: Path) -> Any:
    """An elliptic curve key; ConfigError for anything else."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    password = os.environ.get(PASSWORD)
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), password.encode() if password else None)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"sign.key: {path} cannot be used: {reason}",
            hint=f"a PEM file of an elliptic curve key; the password of an encrypted one goes into {PASSWORD}",
        ) from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"sign.key: {path} is no elliptic curve key")
    return found


def _public_pem(private: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    pem: bytes = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _require_public(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    try:
        serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no public key in PEM"
        raise ConfigError(f"--key {path}: {reason}") from error
