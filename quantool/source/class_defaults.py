"""What transformers' configuration classes say about keys that a config.json leaves out.

Read from the installed transformers' source text: importing it takes three seconds, parsing one file 20 ms.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def model_types() -> list[str]:
    """All model types of the installed transformers, sorted."""
    return sorted(_special_modules()[0])


@cache
def class_defaults(model_type: str) -> dict[str, Any] | None:
    """Literal defaults of transformers' configuration class for ``model_type``; None when it has none.

    Read from ``models/<module>/configuration_<module>.py`` without importing it. Values that are not literals are
    left out.
    """
    names, modules = _special_modules()
    module = modules.get(model_type, model_type.replace("-", "_"))
    path = _transformers() / "models" / module / f"configuration_{module}.py"
    if not module.isidentifier() or not path.is_file():
        return {} if model_type in names else None
    classes = {node.name: node for node in _parse(path).body if isinstance(node, ast.ClassDef)}
    for node in classes.values():
        found = _literals(node, classes)
        if found.get("model_type") == model_type:
            return found
    return {} if model_type in names else None


def _literals(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _literals(classes[base.id], classes)
    for line in node.body:
        match line:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                continue
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:  # a call or an expression
            found.pop(name, None)
    return found


@cache
def _special_modules() -> tuple[frozenset[str], dict[str, str]]:
    """All model types of the installed transformers, and the module of those that are not named like it."""
    auto = _transformers() / "models" / "auto"
    tables: dict[str, dict[str, str]] = {}
    for path in (auto / "auto_mappings.py", auto / "configuration_auto.py"):
        for node in _parse(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[table])):
                    pass
                case ast.Expr(ast.Call(ast.Attribute(ast.Name(id=name), "update"), args=[table])):
                    pass
                case _:
                    continue
            try:
                tables.setdefault(name, {}).update(dict(ast.literal_eval(table)))
            except (ValueError, TypeError):  # not a literal table
                continue
    return frozenset(tables["CONFIG_MAPPING_NAMES"]), tables["SPECIAL_MODEL_TYPE_TO_MODULE_NAME"]


def _transformers() -> Path:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:  # a dependency of quantool
        raise AssertionError
    return Path(spec.origin).parent


def parsed(name: str) -> ast.Module:
    """A file of the installed transformers, by its path below the package."""
    return _parse(_transformers() / name)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
