"""JSON schemas of Python functions, which chat templates present to the model as tools, as in transformers."""

import inspect
import json
import re
from collections.abc import Callable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SIMPLE = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
TYPES = SIMPLE | {list: "array", tuple: "array", dict: "object"}
ARGUMENT = re.compile(r"(\s*)(\w+)(?: \([^)]*\))?:\s*(.*)")
CHOICES = re.compile(r"\(choices:\s*(\[.*\])\)$", re.IGNORECASE)


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Build the JSON schema of a function from its type hints and its Google-style docstring with an "Args:" section.

    Args:
        function: a function, or a method, whose untyped `self` or `cls` is left out. An argument's description may end
            in `(choices: ["tea", "coffee"])`.

    Raises:
        ValueError: there is no docstring, or an argument has no type hint, no description or a type without a schema.
    """
    name = getattr(function, "__name__", "operation")
    try:
        return {"type": "function", "function": _described(function, name)}
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"the tool {name} has no JSON schema: {error}; fix it, or pass the schema itself") from error


def _described(function: Callable[..., Any], name: str) -> dict[str, Any]:
    text = _sections(inspect.getdoc(function) or "")
    summary, described = "\n".join(text[""]).strip(), _arguments(text.get("Args", []))
    if not summary and not described:
        raise ValueError("it has no docstring")
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    properties: dict[str, Any] = {}
    for argument in parameters:
        if argument not in hints:
            if not properties and argument in ("self", "cls"):
                continue
            raise ValueError(f"its argument {argument} has no type hint")
        if argument not in described:
            raise ValueError(f'its docstring does not describe {argument} under "Args:"')
        made, said = _schema(hints[argument]), described[argument]
        if match := CHOICES.search(said):
            made["enum"] = [one.strip() if isinstance(one, str) else one for one in json.loads(match[1])]
            said = said[: match.start()].strip()
        properties[argument] = made | {"description": said}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [one for one in properties if parameters[one].default is inspect.Parameter.empty]:
        schema["required"] = required
    made = {"name": name, "description": summary, "parameters": schema}
    try:
        returned = _schema(hints["return"])
    except (KeyError, ValueError):  # the model never writes it
        return made
    return made | {
        "return": returned | ({"description": "\n".join(text["Returns"]).strip()} if "Returns" in text else {})
    }


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type."""
    origin, args = get_origin(hint), get_args(hint)
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    if is_enum or origin is Literal:
        values = [member.value for member in hint] if is_enum else list(args)
        if values and all(type(value) in SIMPLE for value in values):
            return {"type": _one_or_all([SIMPLE[type(value)] for value in values]), "enum": values}
    elif origin in (Union, UnionType):
        kinds = [_schema(one) for one in args if one is not NoneType]
        made: dict[str, Any] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        if len(kinds) > 1 and all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
            made = {"type": _one_or_all(sorted(kind["type"] for kind in kinds))}
        return made | ({"nullable": True} if NoneType in args else {})
    elif origin is list and args:
        return {"type": "array", "items": _schema(args[0])}
    elif origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(one) for one in args]}
    elif origin is dict and args:
        return {"type": "object", "additionalProperties": _schema(args[1])}
    elif hint is Any:
        return {}
    elif (plain := hint if args else origin or hint) in TYPES:
        return {"type": TYPES[plain]}
    raise ValueError(f"the type {hint} has no JSON equivalent")


def _one_or_all(names: list[str]) -> Any:
    several = list(dict.fromkeys(names))
    return several if len(several) > 1 else several[0]


def _sections(doc: str) -> dict[str, list[str]]:
    """Split the lines of a docstring by section; "" holds those before the first."""
    found: dict[str, list[str]] = {"": []}
    lines = found[""]
    for line in doc.splitlines():
        if (title := line.strip()) in ("Args:", "Returns:", "Raises:"):
            lines = found.setdefault(title[:-1], [])
        else:
            lines.append(line)
    return found


def _arguments(lines: list[str]) -> dict[str, str]:
    """Parse the description of each argument; lines indented deeper than its name continue it."""
    found: dict[str, str] = {}
    name, depth = "", 99
    for line in filter(str.strip, lines):
        match = ARGUMENT.match(line)
        if match and len(match[1]) <= depth:
            depth, name = len(match[1]), match[2]
            found[name] = match[3].strip()
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found
