"""The command line. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantool.attest import commands as releases
from quantool.console import complain, end_run, interrupt, publication_line, reported, show_error
from quantool.errors import ConfigError, GateError, nearest

if TYPE_CHECKING:
    from quantool.config.schema import Config
    from quantool.runtime.progress import Progress

app = typer.Typer(
    name="quantool",
    help="Quantize a checkpoint, prove each file against its bf16 reference, package what passed.\n\n"
    "`quantool CONFIG` is short for `quantool run CONFIG`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
chain = typer.Typer(help="The parts of llama.cpp that no Python package installs.", no_args_is_help=True)
app.add_typer(chain, name="toolchain")
app.command()(reported(releases.verify))
app.command()(reported(releases.diff))

COMMANDS = (
    "run",
    "submit",
    "status",
    "plan",
    "validate",
    "publish",
    "verify",
    "diff",
    "stage",
    "methods",
    "schema",
    "doctor",
    "toolchain",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key: a.b=value. Repeatable."),
]
AllowRegression = Annotated[
    bool,
    typer.Option(
        "--allow-regression",
        help="Publish artifacts that did not pass as well; the card says so, and the exit code stays 5.",
    ),
]
Rehash = Annotated[
    bool,
    typer.Option("--rehash", help="Compare finished files and checkpoint by hash, not by size and time."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, only warnings, errors and the result.")
]


def main() -> None:
    """Run the command line; a first argument that is no command is taken for a configuration to run."""
    signal.signal(signal.SIGTERM, interrupt)
    if sys.stderr is None:  # closed by the caller (`2>&-`): there is nobody to tell
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    arguments = sys.argv[1:]
    first = next((word for word in arguments if not word.startswith("-")), None)
    if first is not None and first not in COMMANDS and not {"--help", "--version"} & set(arguments):
        _refuse_misspelled(first)
        sys.argv[1:] = ["run", *arguments]
    app()


def _refuse_misspelled(word: str) -> None:
    """Exit with the nearest command when ``word`` looks like one and is no file."""
    if word.isidentifier() and not Path(word).exists() and (hint := nearest(word, list(COMMANDS))):
        show_error(ConfigError(f"{word} is neither a command nor a file", hint=hint))
        sys.exit(ConfigError.exit_code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from quantool import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
@reported
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    allow_regression: AllowRegression = False,
    rehash: Rehash = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize, judge and package what CONFIG asks for; a rerun redoes only what changed."""
    from quantool import pipeline

    loaded, progress = _load(config, overrides, quiet=quiet)
    with progress.whole():
        result = pipeline.run(loaded, progress, allow_regression=allow_regression, rehash=rehash)
    end_run(result, progress, loaded.output_path, as_json=as_json)


@app.command()
@reported
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; nothing is fetched or sent.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Send the stages of a run to the cluster that CONFIG names; what is done or on its way is not sent again."""
    from quantool import submitting

    loaded, progress = _load(config, overrides, quiet=quiet)
    typer.echo(submitting.submit(loaded, progress, dry_run=dry_run))


@app.command()
@reported
def status(
    output: Annotated[
        Path, typer.Argument(help="The output folder of a run, here or on a cluster.", show_default=False)
    ],
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Wait for the end; then publish what passed, if the configuration says so."
        ),
    ] = False,
    allow_regression: AllowRegression = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the stages of a run: waiting, running (time left), done, failed."""
    from quantool import submitting
    from quantool.runtime.progress import Progress

    progress = Progress(quiet=quiet)
    if not wait:
        typer.echo(submitting.shown(output, as_json=as_json))
        return
    result = submitting.wait(output, progress, allow_regression=allow_regression)
    end_run(result, progress, output, as_json=as_json)


@app.command(hidden=True)
@reported
def stage(
    output: Annotated[Path, typer.Argument(help="The output folder.", show_default=False)],
    name: Annotated[str, typer.Argument(help="As `quantool status` has it.", show_default=False)],
    quiet: Quiet = False,
) -> None:
    """Do one stage of what was ordered in OUTPUT, as a job of a cluster does."""
    from quantool.run.stages import do_stage
    from quantool.runtime.progress import Progress

    do_stage(output.absolute(), name, Progress(quiet=quiet))


@app.command()
@reported
def publish(
    folder: Annotated[Path, typer.Argument(help="A folder that `quantool run` packed.", show_default=False)],
    repo_id: Annotated[
        str | None, typer.Option(help="NAMESPACE/NAME; default: what the run's configuration named.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Of a new repository; default: as the configuration said, else private.",
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="commit or pull_request; default: as the configuration said.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; made when it is missing.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of the commit, set once it is verified.")] = None,
    collection: Annotated[str | None, typer.Option(help="Slug of a collection to add it to.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    connect_timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait for a connection; default: as configured, else 10.")
    ] = None,
    read_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that the Hub may be silent; default: as configured, else 60."),
    ] = None,
    allow_regression: AllowRegression = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push FOLDER to the Hub in one commit, after comparing its files with what was judged; verify it there."""
    from quantool.publish import publish as delivery
    from quantool.runtime.progress import Progress

    order = delivery.Order(repo_id, private, None, allow_regression)
    given = {
        "mode": mode, "revision": revision, "tag": tag, "collection": collection, "commit_message": message,
        "connect_timeout": connect_timeout, "read_timeout": read_timeout,
    }  # fmt: skip
    made = delivery.publish_folder(folder, order, given, Progress(quiet=quiet))
    typer.echo(made.model_dump_json(indent=1) if as_json else publication_line(made))
    if made.allow_regression:
        raise GateError("what is published did not all pass", hint=f"findings: {folder / 'README.md'}")


@app.command()
@reported
def plan(
    config: ConfigFile, overrides: Overrides = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Say what a run would do: files with exact sizes, disk, memory, what is done already."""
    from quantool import pipeline
    from quantool.report.table import planned, terminal_width
    from quantool.run.preparing import require_room

    loaded, progress = _load(config, overrides, quiet=quiet)
    with progress.whole():
        made, machine = pipeline.plan_here(loaded, progress)
    for note in made.warnings:
        progress.warn(note)
    if as_json:
        record = made.model_dump(mode="json") | {"machine": machine.model_dump(mode="json")}
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        typer.echo(planned(made, machine, terminal_width()))
    require_room(loaded, made, machine)


@app.command()
@reported
def validate(
    artifact: Annotated[
        Path, typer.Argument(help="A .gguf file, a folder of them, or one that transformers loads.")
    ],
    reference: Annotated[str, typer.Option(help="The bf16 checkpoint: folder or Hub id.")],
    config: Annotated[Path | None, typer.Option(help="YAML file whose validation section applies.")] = None,
    level: Annotated[
        str | None, typer.Option(help="Level whose gates apply; default: from the name.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for reference scores, logs and report.")] = Path(
        "validation-output"
    ),
    base: Annotated[
        Path | None,
        typer.Option(
            help="The unquantized GGUF that it was made from, to tell the conversion's damage apart."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="llama.cpp, transformers or vllm; default: by the kind of artifact."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge artifacts that exist, whoever made them: a file, or all those of a downloaded repository."""
    from quantool import gates, pipeline
    from quantool.given_artifacts import artifacts_of, engine_for, settings_for
    from quantool.records import Verdict
    from quantool.report.finding_text import failures
    from quantool.report.table import table, terminal_width, write_step_summary
    from quantool.runtime.progress import Progress

    settings = settings_for(config, overrides, reference, output)
    given = artifacts_of(artifact, level)
    engine = engine_for(engine, given[0][1])
    if base is not None and not base.is_file():
        raise ConfigError(f"--base {base} is no file")
    artifacts = [entry for entry, _ in given]
    limits = [gates.resolve(entry.level, settings.validation.gates, None) for entry in artifacts]
    progress = Progress(quiet=quiet)
    with progress.whole():
        reports = pipeline.validate(artifacts, engine, settings, limits, progress, base)
    write_step_summary(reports)
    if as_json:
        records = [report.model_dump(mode="json") | {"verdict": report.verdict()} for report in reports]
        typer.echo(json.dumps(records if len(records) > 1 else records[0], indent=1))
    else:
        typer.echo(table(reports, terminal_width()))
        progress.say(f"report: {output / 'report.md'}")
    if any(report.verdict() is not Verdict.PASS for report in reports):
        complain("\n".join(failures(reports)) or "nothing could be judged")
        raise GateError(f"{artifact} did not pass", hint=f"findings: {output / 'report.md'}")


@app.command()
@reported
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="One method, with what its options mean; default: all.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, their levels and options; or one of them."""
    from quantool.plugins import describe

    entries = describe.methods(name)
    typer.echo(json.dumps(entries, indent=1, ensure_ascii=False) if as_json else describe.as_text(entries))


@app.command()
@reported
def schema() -> None:
    """Print the JSON schema of a configuration, for editors."""
    from quantool.config import load
    from quantool.plugins import find

    typer.echo(json.dumps(load.schema(find), indent=1, ensure_ascii=False))


@app.command()
@reported
def doctor(as_json: Json = False) -> None:
    """Show what is installed: libraries, llama.cpp, tools, accelerator, disk, Hub token."""
    from quantool.doctor import examine

    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name.ljust(width)}  {value}")


@chain.command()
@reported
def install(
    sdist: Annotated[
        Path | None,
        typer.Option(help="Source package of the installed llama-cpp-python; default: pip downloads it."),
    ] = None,
) -> None:
    """Put llama.cpp's converter, of the installed llama-cpp-python's commit, into the user cache (2 MB)."""
    from quantool.runtime import toolchain

    located = toolchain.install(sdist)
    typer.echo(f"{located.folder} ({located.origin}, llama.cpp {located.commit or 'unknown commit'})")


def _load(path: Path, overrides: list[str] | None, *, quiet: bool) -> tuple[Config, Progress]:
    from quantool.config.load import load
    from quantool.plugins import find
    from quantool.runtime.progress import Progress

    progress = Progress(quiet=quiet)
    loaded = load(path, overrides or (), find)
    for warning in loaded.warnings:
        progress.warn(warning)
    return loaded.config, progress
