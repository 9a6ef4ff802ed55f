"""Releases to attack: tiny-chat as two GGUF levels and as a folder of bfloat16, judged, with canary, signed; and their flips.

``python -m tests.attest.releases FLIPS`` flips so many single bytes of both and counts what ``verify`` finds, then makes all
attacks of ``attacks.py``; what it prints stands in the notes of the release.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import making
from making import shared

from quantool import pipeline
from quantool.attest.proofs import Proof, Proven
from quantool.attest.release import PROVENANCE, RECORD, SUMS
from quantool.attest.signature import Trust
from quantool.attest.verify import Scope, verify
from quantool.config.schema import Config

GGUF, FOLDER = "tiny-chat-GGUF", "tiny-chat-BF16"
LEVELS = ("Q8_0", "Q4_K_M")


@shared
def keys() -> tuple[Path, Path]:
    """A private key and its public one."""
    private, public = making.room() / "signing.pem", making.room() / "signing.pub.pem"
    commands = (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)],
        ["ec", "-in", str(private), "-pubout", "-out", str(public)],
    )
    for command in commands:
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return private, public


def config(output: Path) -> Config:
    """What the releases are made of."""
    return Config.model_validate(
        {
            "model_id": str(making.TINY),
            "output_path": output,
            "quantizations": [
                {"method": "gguf", "quant_level": list(LEVELS), "quantization_config": making.QWEN2},
                {"method": "fp16", "quant_level": "BF16", "quantization_config": {"format": "safetensors"}},
            ],
            "sign": {"key": keys()[0]},
            "validation": {"checks": ["ledger", "canary"]},
        }
    )


@shared
def released() -> Path:
    """The output folder of a run that made both releases."""
    wanted = config(making.room() / "releases")
    assert not pipeline.run(wanted, making.QUIET).failed
    return wanted.output_path


@contextmanager
def copy_of(name: str, room: Path) -> Iterator[Path]:
    """A release that may be damaged."""
    folder = Path(shutil.copytree(released() / name, room / name))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def recompute(folder: Path) -> None:
    """What an attacker does who knows the format: every SHA-256 in quantool.json, provenance.json and SHA256SUMS anew."""

    def digest(name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    before = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
    for record in (RECORD, PROVENANCE):
        text = (folder / record).read_text()
        for old, name in before:
            if (folder / name).is_file() and name != record:
                text = text.replace(old, digest(name))
        (folder / record).write_text(text)
    content = json.loads((folder / RECORD).read_text())
    for report in content["reports"]:
        for file in report["artifact"]["files"]:
            if (folder / file["name"]).is_file():
                file["bytes"] = (folder / file["name"]).stat().st_size
    # ends as the packing writes it
    old_record = digest(RECORD)
    (folder / RECORD).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    stated = (folder / PROVENANCE).read_text().replace(old_record, digest(RECORD))
    (folder / PROVENANCE).write_text(stated)
    names = sorted(name for _, name in before if (folder / name).is_file())
    (folder / SUMS).write_text("".join(f"{digest(name)}  {name}\n" for name in names))


def failed(made: tuple[Proof, ...]) -> list[str]:
    """Names of the proofs that failed."""
    return [entry.name for entry in made if entry.outcome is Proven.FAILED]


def proven(
    folder: Path, *, trust: bool = False, replays: bool = True, level: str | None = None
) -> tuple[Proof, ...]:
    """What ``quantool verify`` says of a folder."""
    request = Scope(Trust(keys()[1]) if trust else Trust(), (level,) if level else (), replays=replays)
    return verify(folder, request, making.QUIET)


def flip(folder: Path, seed: int) -> str:
    """Change one byte of a release, in one of its files by their number half the time, else by their size; says where."""
    chance = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    path = chance.choices(files, sizes if chance.random() < 0.5 else None)[0]
    place, bits = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ bits]))
    return f"{path.name}, byte {place}: {old:#x} to {old ^ bits:#x}"


def flips(name: str, seeds: range, room: Path) -> list[str]:
    """Flips that ``verify`` did not find, of as many as there are seeds; each is undone before the next."""
    missed = []
    with copy_of(name, room) as folder:
        whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert failed(proven(folder, trust=True, replays=False)) == []
        for seed in seeds:
            where = flip(folder, seed)
            if not failed(proven(folder, trust=True, replays=False)):
                missed.append(where)
            for path, content in whole.items():
                if path.name in where or path.read_bytes() != content:
                    path.write_bytes(content)
    return missed


def main(count: int) -> int:
    """Run the campaign."""
    from tests.attest.attacks import ATTACKS, attack

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    room = making.room() / "campaign"
    missed = [*flips(GGUF, range(count // 2), room), *flips(FOLDER, range(count // 2, count), room)]
    print(f"{count} flips, {count - len(missed)} found", *missed, sep="\n  ")
    unsigned = 0
    for name in ATTACKS:
        plain, signed = attack(name, room)
        unsigned += bool(plain)
        print(
            f"{name:<34} signature: {'rejected' if 'signature' in signed else 'ACCEPTED'}; without: {plain or 'MISSED'}"
        )
    print(f"{unsigned} of {len(ATTACKS)} attacks found without the signature")
    return len(missed)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
