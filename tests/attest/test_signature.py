import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quantool.attest import signature
from quantool.attest.signature import SignatureError, Trust, check_signature, require_signer, sign
from quantool.config.schema import Sign
from quantool.errors import ConfigError, DependencyError
from quantool.records import sha256_of
from tests.attest.releases import keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "release"
    made.mkdir()
    for name in ("a.gguf", "b.json"):
        (made / name).write_text(name)
    return made


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != "model.sig"}


@pytest.fixture
def signed(folder: Path) -> Path:
    sign(folder, digests(folder), Sign(key=keys()[0]))
    return folder


def test_the_signature_is_checked_by_the_format_s_own_verifier(signed: Path) -> None:
    """The command of OpenSSF model-signing, which knows nothing of quantool."""
    (signed / ".gitattributes").write_text("what a checkout adds\n")
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    words = ["--signature", str(signed / "model.sig"), "--public_key", str(keys()[1])]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (signed / "a.gguf").write_text("other")
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_a_signature_that_holds_is_not_made_anew(signed: Path) -> None:
    before = (signed / "model.sig").read_bytes()
    sign(signed, digests(signed), Sign(key=keys()[0]))
    assert (signed / "model.sig").read_bytes() == before
    (signed / "b.json").write_text("other")
    sign(signed, digests(signed), Sign(key=keys()[0]))
    assert "by" not in check_signature(signed, digests(signed), Trust(keys()[1])).split()[0]
    assert (signed / "model.sig").read_bytes() != before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"mediaType"', '"mediatype"', 1),
        lambda text: text + " ",
        lambda text: text.replace("sigstore.bundle", "sigstore.bundel", 1),
        lambda text: text.replace('"sig": "M', '"sig": "N', 1).replace('"sig":"M', '"sig":"N', 1),
        lambda text: text[:-40],
        lambda text: "[]",
    ],
)  # fmt: skip
def test_a_changed_signature_is_refused(signed: Path, spoil: Any) -> None:
    path = signed / "model.sig"
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    with pytest.raises(SignatureError):
        check_signature(signed, digests(signed), Trust(keys()[1]))


def test_another_key_and_another_file_are_refused(signed: Path, tmp_path: Path) -> None:
    other, public = tmp_path / "other.pem", tmp_path / "other.pub"
    curve = ["-name", "secp384r1", "-genkey", "-noout"]
    subprocess.run(["openssl", "ecparam", *curve, "-out", other], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "ec", "-in", other, "-pubout", "-out", public], check=True, capture_output=True
    )
    with pytest.raises(SignatureError, match="Key mismatch"):
        check_signature(signed, digests(signed), Trust(public))
    with pytest.raises(SignatureError, match=r"Hash mismatch for 'a.gguf'"):
        check_signature(signed, digests(signed) | {"a.gguf": "0" * 64}, Trust(keys()[1]))


def test_a_key_that_is_none_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_signer(None)
    require_signer(Sign(key=keys()[0]))
    (tmp_path / "no.pem").write_text("no key")
    for path in (tmp_path / "no.pem", tmp_path / "nothing.pem"):
        with pytest.raises(ConfigError, match=r"sign\.key"):
            require_signer(Sign(key=path))
    rsa = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genrsa", "-out", rsa, "2048"], check=True, capture_output=True)
    with pytest.raises(ConfigError, match="no elliptic curve key"):
        require_signer(Sign(key=rsa))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match="model-signing"):
        require_signer(Sign(keyless=True))


def test_a_password_comes_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked.pem"
    command: list[str | Path] = ["openssl", "pkcs8", "-topk8", "-in", keys()[0], "-out", locked]
    command += ["-passout", "pass:open sesame"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match=r"sign\.key"):
        require_signer(Sign(key=locked))
    monkeypatch.setenv(signature.PASSWORD, "open sesame")
    sign(folder, digests(folder), Sign(key=locked))
    check_signature(folder, digests(folder), Trust(keys()[1]))
    assert "sesame" not in (folder / "model.sig").read_text()


def test_one_way_of_signing_is_chosen() -> None:
    for given in ({}, {"key": "a.pem", "keyless": True}):
        with pytest.raises(ValidationError, match="give a key, or keyless: true"):
            Sign.model_validate(given)


def test_keyless_signing_asks_sigstore_for_the_identity_of_the_ci(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls alone: no test has an OIDC token or sigstore's log."""
    from model_signing import signing, verifying

    asked: list[Any] = []

    def use(self: Any, **settings: Any) -> Any:
        asked.append(settings)
        return self.use_elliptic_key_signer(private_key=keys()[0])

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", use)
    sign(folder, digests(folder), Sign(keyless=True))

    def trust(self: Any, **settings: Any) -> Any:
        asked.append(settings)
        return self.use_elliptic_key_verifier(public_key=keys()[1])

    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", trust)
    signer = check_signature(
        folder, digests(folder), Trust(None, "ci@example.org", "https://issuer.example.org")
    )
    assert signer == "ci@example.org, says https://issuer.example.org"
    assert asked == [
        {"use_ambient_credentials": True},
        {"identity": "ci@example.org", "oidc_issuer": "https://issuer.example.org"},
    ]
    with pytest.raises(ConfigError, match="belong together"):
        check_signature(folder, digests(folder), Trust(None, "ci@example.org"))


def test_the_bundle_names_no_folder_of_this_machine(signed: Path) -> None:
    assert str(signed.parent) not in json.dumps(json.loads((signed / "model.sig").read_text()))
