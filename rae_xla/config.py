"""The base of every configuration object, and YAML plus ``key=value`` overrides turned into plain mappings.

A component's own configuration stands beside the component; `rae_xla.recipe` puts them together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rae_xla.errors import UserError

# Mappings of which all methods have the same keys.
ONE_KIND = ("sampler",)


class Config(BaseModel):
    """A frozen, keyword-only, strictly typed object; unknown keys fail."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
    )


class NamedSizes(Config):
    """Sizes that a ``name`` of ``sizes`` stands for, or each of them; one that is given wins over the name's."""

    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str):
            return content
        if name not in cls.sizes:
            raise ValueError(f"name {name!r} is not known; use {', '.join(cls.sizes)}, or give every size")
        return {**cls.sizes[name], **content}


def read_yaml(path: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with the file named under ``base`` merged below it.

    ``base`` is relative to the file that names it; how they merge is said at `merge`. ``above`` are the files that led
    here.

    Raises:
        UserError: no such file, not YAML, not a mapping, or its own base.
    """
    file = Path(path)
    if file.resolve() in above:
        raise UserError(f"{path}: is its own base, by way of {above[-1]}")
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this file holds {type(content).__name__}")
    base = content.pop("base", None)
    if base is None:
        return content
    return merge(read_yaml(str(file.parent / str(base)), (*above, file.resolve())), content)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: mappings merge key by key, anything else replaces.

    A mapping that chooses another ``name`` or ``method`` replaces too: what was said of the old choice is not about it.
    Not so in those of `ONE_KIND`.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        mappings = isinstance(value, dict) and isinstance(old, dict)
        merges = mappings and (key in ONE_KIND or not _chooses_another(merged[key], value))
        merged[key] = merge(merged[key], value) if merges else value
    return merged


def _chooses_another(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return any(choice in above and above[choice] != below.get(choice) for choice in ("name", "method"))


def flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their keys with dots, ``key.sub``; lists are values."""
    if not isinstance(content, Mapping):
        yield prefix, content
        return
    for key, value in content.items():
        yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))


def override(key: str, value: Any) -> str:
    """``key=value`` for `apply_overrides`. JSON is YAML, and keeps a directory called 2026 text."""
    return f"{key}={json.dumps(value)}"


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``content`` with every ``key.sub=value`` applied; the value is read as YAML.

    Raises:
        UserError: an override without ``=``, or with a value that is no YAML.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: an override is written key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is not valid YAML") from error
        *parents, last = key.split(".")
        nested: dict[str, Any] = {last: value}
        for parent in reversed(parents):
            nested = {parent: nested}
        content = merge(content, nested)
    return content


def describe_errors(error: ValidationError, where: str, model: type[BaseModel], content: Any) -> str:
    """All of pydantic's findings about ``content`` in one line: which key of which file, what is wrong, what to do."""
    return "; ".join(f"{where}: {_describe(finding, model, content)}" for finding in error.errors())


def _describe(finding: Any, model: type[BaseModel], content: Any) -> str:
    location = _keys(finding, content)
    key = ".".join(location) or "(top level)"
    value = finding.get("input")
    if finding["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(location, model)}"
    if finding["type"] == "missing":
        return f"{key}: required key is missing"
    if finding["type"] == "union_tag_invalid":
        choice = finding["ctx"]["discriminator"].strip("'")
        return f"{key}.{choice}: {finding['ctx']['tag']!r} is not known; use {finding['ctx']['expected_tags']}"
    if finding["type"] == "union_tag_not_found":
        return f"{key}.{finding['ctx']['discriminator'].strip(chr(39))}: required key is missing"
    if finding["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: should be a mapping of keys to values, got {value!r}"
    if finding["type"] == "float_type" and isinstance(value, str) and _is_number(value):
        return f"{key}: YAML reads {value} as text; write {_dotted(float(value))} with a dot before the e"
    if finding["type"] == "value_error":
        # About several keys, the message names them itself.
        return f"{key}: {finding['ctx']['error']}" if location else str(finding["ctx"]["error"])
    return f"{key}: {finding['msg'][0].lower()}{finding['msg'][1:]}, got {value!r}"


def _keys(finding: Any, content: Any) -> list[str]:
    """The location as the user wrote it: pydantic also names which class of a union it tried."""
    keys = []
    for part in finding["loc"]:
        inside = isinstance(content, dict) and part in content
        if inside or (isinstance(content, list) and isinstance(part, int)):
            content = content[part]
            keys.append(str(part))
    if finding["type"] == "missing":
        keys.append(str(finding["loc"][-1]))
    return keys


def _suggestion(location: list[str], model: type[BaseModel]) -> str:
    fields = _fields_at(location[:-1], model)
    close = difflib.get_close_matches(location[-1], fields, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(sorted(fields))}" if fields else ""


def _fields_at(location: list[str], model: type[BaseModel]) -> set[str]:
    classes = [model]
    for part in location:
        classes = [
            inner
            for outer in classes
            if part in outer.model_fields
            for inner in _config_classes(outer.model_fields[part].annotation)
        ]
    return {name for found in classes for name in found.model_fields}


def _config_classes(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that an annotation allows."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    arguments = getattr(annotation, "__args__", ())
    return [found for argument in arguments for found in _config_classes(argument)]


def _dotted(value: float) -> str:
    mantissa, exponent = f"{value:.6e}".split("e")
    mantissa = mantissa.rstrip("0")
    return f"{mantissa}0e{exponent}" if mantissa.endswith(".") else f"{mantissa}e{exponent}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
