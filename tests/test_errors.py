import inspect
import re

import pytest

from quantool import errors
from quantool.errors import BY_NAME, QuantoolError, nearest


def test_every_kind_has_its_exit_code() -> None:
    codes = {name: kind.exit_code for name, kind in BY_NAME.items()}
    assert codes == {
        "ConfigError": 2,
        "SourceError": 2,
        "DependencyError": 3,
        "QuantizationError": 4,
        "GateError": 5,
        "PublicationError": 6,
    }
    assert errors.INTERRUPTED == 130


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    told = dict(re.findall(r"── (\w+)\s+(\d+)", errors.__doc__ or ""))
    assert {name: int(code) for name, code in told.items()} == {
        name: kind.exit_code for name, kind in BY_NAME.items()
    }


def test_every_kind_can_cross_a_process_boundary() -> None:
    kinds = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, QuantoolError) and value is not QuantoolError
    }
    assert kinds == set(BY_NAME)


def test_message_and_hint() -> None:
    error = errors.ConfigError("level: no", hint="yes")
    assert (str(error), error.message, error.hint) == ("level: no", "level: no", "yes")
    assert QuantoolError("x").hint == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("q4_k_n", "did you mean Q4_K_M?"),
        ("Q4_K_M", "did you mean Q4_K_M?"),
        ("q8", "did you mean Q8_0?"),
        ("something else", ""),
        ("", ""),
    ],
)
def test_nearest(value: str, said: str) -> None:
    assert nearest(value, ["Q4_K_M", "Q8_0", "BF16"]) == said


def test_nearest_of_nothing() -> None:
    assert nearest("x", []) == ""
