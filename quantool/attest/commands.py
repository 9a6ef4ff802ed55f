"""The commands for those who download a release: ``quantool verify`` and ``quantool diff``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantool.errors import ConfigError, GateError

Release = Annotated[
    str,
    typer.Argument(
        help="A repository (NAMESPACE/NAME or NAMESPACE/NAME@REVISION), a folder or a file of one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]


def verify(
    release: Release,
    key: Annotated[Path | None, typer.Option(help="Public key of who should have signed it (PEM).")] = None,
    identity: Annotated[str | None, typer.Option(help="Who should have signed it, by sigstore.")] = None,
    oidc_issuer: Annotated[str | None, typer.Option(help="Who vouches for that identity (a URL).")] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="Read, and of a repository fetch, this level alone. Repeatable.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay/--no-replay", help="Whether to run the artifacts; default: yes.")
    ] = True,
    device: Annotated[str, typer.Option(help="Where GGUF files are run: cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
    ] = False,
    as_json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, only warnings, errors and the result.")
    ] = False,
) -> None:
    """Prove a release of quantool, without the bf16 model: signature, hashes, records, headers, what it computes."""
    from quantool.attest import verify as proving
    from quantool.attest.signature import Trust
    from quantool.attest.target import locate
    from quantool.runtime.progress import Progress

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is cpu or cuda, not {device}")
    progress = Progress(quiet=quiet)
    with progress.whole():
        folder, levels = locate(release, tuple(level or ()), progress)
        scope = proving.Scope(Trust(key, identity, oidc_issuer), levels, replay, device, trust_remote_code)
        made = proving.verify(folder, scope, progress)
    proven = proving.is_proven(made)
    if as_json:
        record = {"verified": proven, "proofs": [entry.model_dump(mode="json") for entry in made]}
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        typer.echo(proving.table(made))
    if not proven:
        raise GateError(
            f"{release} is not what was released", hint="do not use it: fetch it again, or ask who made it"
        )


def diff(old: Release, new: Release, as_json: Json = False) -> None:
    """Say what changed between two releases: source, versions, options, tensors, figures; a table for a changelog."""
    from quantool.attest.compare import as_markdown, changes
    from quantool.attest.target import locate_record

    found = changes(locate_record(old), locate_record(new))
    record = [change.model_dump(mode="json") for change in found]
    typer.echo(json.dumps(record, indent=1, ensure_ascii=False) if as_json else as_markdown(found).rstrip())
