"""The child process in which a checkpoint's chat templates are compiled and rendered: ``python -m quantool.source.template_child``.

A template is a program of a stranger: it can loop for ever and fill memory. So this process limits itself, and only
plain text leaves it: one JSON object a line, ``{"at": place}`` before each step, then what came of it.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

OUTPUT = 1 << 20
"""Characters that a rendered conversation has at most."""

REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What an expression of a template raises beside Jinja's own errors."""


def environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the settings, filters and functions that transformers gives a chat template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the model's own words for training; here it renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, *, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return made


def main() -> None:
    """Answer the request on standard input: ``templates`` by place, ``render`` (a place or null), its ``variables``.

    ``seconds`` of processor time and bytes of ``memory`` are the limits.
    """
    request = json.load(sys.stdin)
    _limit(request["seconds"], request["memory"])
    for place, text in request["templates"].items():
        _send({"at": place})
        with _failures():
            environment().compile(text)
    if (place := request["render"]) is not None:
        _send({"at": place})
        with _failures():
            _send(_rendered(request["templates"][place], request["variables"]))


def _limit(seconds: int, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere libraries alone can take more addresses than that
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _rendered(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """``text``, or ``refused``: why the template does not take these messages."""
    import jinja2

    try:
        text, pieces = "", environment().from_string(template).generate(variables)
        for piece in pieces:
            text += piece
            if len(text) > OUTPUT:
                return {"problem": f"writes more than {OUTPUT:,} characters for one question and answer"}
    except (jinja2.TemplateError, *REFUSALS) as error:
        return {"refused": f"{type(error).__name__}: {error}"[:500]}
    return {"text": text}


@contextmanager
def _failures() -> Iterator[None]:
    """Say what stopped a template, and end."""
    import jinja2

    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        _end({"problem": f"does not parse: {error.message}", "line": error.lineno})
    except (SyntaxError, RecursionError) as error:  # Python's compiler has limits for what Jinja made of it
        what = "calls itself without end, or is nested too deeply"
        _end(
            {"problem": what if isinstance(error, RecursionError) else f"is nested too deeply ({error.msg})"}
        )
    except MemoryError:
        _end({"problem": "needs too much memory"})
    except jinja2.TemplateError as error:
        _end({"problem": f"does not compile: {error}"})
    except REFUSALS as error:  # a constant expression that Jinja computes while it compiles
        _end({"problem": f"does not compile: {type(error).__name__}: {error}"[:500]})


def _end(message: dict[str, Any]) -> NoReturn:
    _send(message)
    sys.exit()


def _send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
