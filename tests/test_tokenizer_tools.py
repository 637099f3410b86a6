"""Python functions passed as tools get the same JSON schemas as in transformers."""

import json
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
import transformers
from transformers.utils import get_json_schema

from llama import LlamaTokenizerFast

MODEL = Path(__file__).parent / "goldens" / "tokenizer.model"
CALL = [{"role": "user", "content": "What is the weather?"}]


class Unit(Enum):
    CELSIUS = "c"
    KELVIN = 1


def current_weather(location: str, unit: Literal["c", "f"] = "c") -> float:
    """Get the current weather.

    It is that of the nearest station.

    Args:
        location: The city and country, such as
            "Paris, France": no abbreviations.
        unit: The unit of temperature

    Returns:
        The temperature,
        as a number.
    """


def nothing() -> None:
    """Do nothing."""


def everything(
    a: int, b: float, c: bool, d: Any, e: list, f: dict, g: tuple, h: list[int], i: dict[str, float], j: tuple[int, str]
):
    """
    Take one of each.

    Args:
        a: one
        b: two

        c: three
        d: four
        e: five
        f: six
        g: seven
        h: eight
        i: nine
        j: ten
    """


def unions(
    a: int | str,
    b: int | None,
    c: list[int] | str,
    d: Optional[float] = None,  # noqa: UP045
    e: Union[list, tuple] = (),  # noqa: UP007
    f: int | float | None = 1,
):
    """Take one of several.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
        f: six
    """


def enums(unit: Unit, level: Literal[1, "high", None]):
    """Take one of a few.

    Args:
        unit: of temperature
        level: how much
    """


def drinks(beverage: str, sizes: list[dict[str, list[int]]]) -> Unit:
    """Order a drink.

    Args:
        beverage: The beverage (choices: ["tea ", "coffee"])
        sizes: In
          millilitres: each
    Raises:
        ValueError: there is none.
    """


def returns_a_class(path: str) -> Path:
    """Read a file.

    Args:
        path: Where it is.

    Returns:
        The file.
    """


def late(text: "str", count: "int | None" = None) -> "list[str]":
    """Cut a text: into pieces.

    Args:
        text: The text
        count: Their number: at most

    Returns:
        The pieces
    Raises:
        ValueError: none
    """


class Station:
    def temperature(self, hour: int) -> float:
        """The temperature then.

        Args:
            hour: From 0 to 23
        """

    @classmethod
    def named(cls, name: str):
        """A station.

        Args:
            name: Its name
        """


TOOLS = [
    current_weather, nothing, everything, unions, enums, drinks, returns_a_class, late, Station().temperature,
    Station.temperature, Station.named,
]  # fmt: skip
TEMPLATE = "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ messages[0].content }}"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__qualname__)
def test_a_function_is_described_as_transformers_describes_it(tool):
    ours = LlamaTokenizerFast(MODEL).apply_chat_template(CALL, tools=[tool], chat_template=TEMPLATE, tokenize=False)
    assert ours == json.dumps(get_json_schema(tool), ensure_ascii=False) + "\nWhat is the weather?"


def test_functions_and_schemas_go_together():
    ours = LlamaTokenizerFast(MODEL)
    library = transformers.PreTrainedTokenizerFast(tokenizer_object=LlamaTokenizerFast(MODEL).backend_tokenizer)
    tools = [current_weather, get_json_schema(nothing)]
    made = (
        one.apply_chat_template(CALL, tools=tools, chat_template=TEMPLATE, tokenize=False) for one in (ours, library)
    )
    assert len(set(made)) == 1


def test_a_function_that_says_too_little_is_named():
    def silent(a: int): ...

    def untyped(a):
        """One.

        Args:
            a: one
        """

    def undescribed(a: int):
        """One."""

    def strange(a: Path):
        """One.

        Args:
            a: one
        """

    def unknown(a: "Nowhere"):
        """One.

        Args:
            a: one
        """

    def choosy(a: str):
        """One.

        Args:
            a: one (choices: [tea])
        """

    for tool, message in [
        (silent, "silent has no JSON schema: it has no docstring"),
        (untyped, "argument a has no type hint"),
        (undescribed, 'does not describe a under "Args:"'),
        (strange, "the type .* has no JSON equivalent"),
        (unknown, "'Nowhere' is not defined"),
        (choosy, "choosy has no JSON schema"),
        (3, r"tools must be JSON schemas \(dictionaries\) or functions, got int"),
    ]:
        with pytest.raises(ValueError, match=message):
            LlamaTokenizerFast(MODEL).apply_chat_template(CALL, tools=[tool], chat_template=TEMPLATE)
