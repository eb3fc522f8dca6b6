"""Validate configurations; an error is one sentence with the key, its value and the allowed values."""

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from detkit.config.common import CommonConfig, TrainConfig
from detkit.config.schema import Section
from detkit.errors import DetkitError, nearest, shorten

AnySection = TypeVar("AnySection", bound=Section)

MAX_DEPTH = 50  # of nested mappings and lists
MAX_VALUES = 1_000_000  # per file; detkit's own configurations have about 200
NAMES = {None: "null", True: "true", False: "false"}


def check_values(cfg: Mapping[str, Any], schema: type[Section] = TrainConfig, partial: bool = False) -> None:
    """Check a resolved configuration against a schema.

    Args:
        cfg: the configuration.
        schema: the model of its keys.
        partial: accept missing and unknown keys, as in a file that another version may have written.

    Raises:
        DetkitError: names the first key that is unknown, missing or has an invalid value, and the allowed values.
    """
    if message := first_unsupported_value(cfg) or validate(schema, cfg, partial)[1]:
        raise DetkitError(message)


def parse_config(values: Mapping[str, Any], schema: type[AnySection]) -> AnySection:
    """Validate a resolved configuration and return it as a model such as ``TrainConfig``.

    Raises:
        DetkitError: as ``check_values``.
    """
    if message := first_unsupported_value(values):
        raise DetkitError(message)
    config, message = validate(schema, values)
    if config is None:
        raise DetkitError(message)
    return config


def validate(
    schema: type[AnySection], values: Mapping[str, Any], partial: bool = False
) -> tuple[AnySection | None, str]:
    """Return ``values`` as a model and an empty string, or None and a message about the first error.

    Args:
        schema: the model.
        values: a resolved configuration.
        partial: accept missing and unknown keys; if there are any, return None and no message.
    """
    try:
        return schema.model_validate(values), ""
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    if partial:
        errors = [item for item in errors if item["type"] not in ("missing", "extra_forbidden")]
    if not errors:
        return None, ""
    keys, field = _locate(schema, errors[0]["loc"])
    errors = [item for item in errors if _locate(schema, item["loc"])[0] == keys]
    return None, _message(schema, values, keys, field, errors)


def first_unsupported_value(content: Any) -> str:
    """Return a message about the first value that no configuration may contain; an empty string if there is none.

    These are control characters (NUL in a path, say), objects of other types, integers beyond the range of a float, and
    too many or too deeply nested values.
    """
    count = 0
    todo: list[tuple[str, Any, int]] = [("", content, 0)]
    while todo:
        key, value, depth = todo.pop()
        count += 1
        name = shorten(key, 100) or "the configuration"
        if depth > MAX_DEPTH or count > MAX_VALUES:
            return f"{name} has too many or too deeply nested values"
        if isinstance(value, Mapping):
            invalid = next((k for k in value if not isinstance(k, (str, int)) or _has_control(k) or _is_huge(k)), None)
            if invalid is not None:
                return f"{name} has the key {shorten(invalid, 100)}: a key must be printable text"
            todo += [(f"{key[:200]}.{k}" if key else f"{k}", v, depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(key, v, depth + 1) for v in value]
        elif _has_control(value):
            return f"{name}={shorten(value)} must not contain control characters"
        elif _is_huge(value):
            return f"{name}={shorten(value, 50)} has too many digits"
        elif not isinstance(value, (str, int, float, type(None))):
            return f"{name}={shorten(value)} must be text, a number, a list or a mapping"
    return ""


def _has_control(value: Any) -> bool:
    return isinstance(value, str) and any(c < " " or c == "\x7f" for c in value)


def _is_huge(value: Any) -> bool:
    """Return whether a value is an integer beyond the range of a float; Python refuses to print some of these."""
    return isinstance(value, int) and value.bit_length() > 1024


def _locate(schema: type[Section], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], FieldInfo | None]:
    """Return the keys and the field of pydantic's ``loc``, as deep as the schema goes.

    The field is None if the key does not exist. An unknown key in a mapping within a group (``data.tiles``) is
    reported as an error of that mapping.
    """
    keys: tuple[str, ...] = ()
    field: FieldInfo | None = None
    model: type[Section] | None = schema
    for part in loc:
        if model is None:
            break
        if part not in model.model_fields:
            return (keys, field) if len(keys) > 1 else ((*keys, str(part)), None)
        keys, field = (*keys, str(part)), model.model_fields[str(part)]
        model = section_of(field)
    return keys, field


def _message(
    schema: type[Section],
    values: Mapping[str, Any],
    keys: tuple[str, ...],
    field: FieldInfo | None,
    errors: list[Any],
) -> str:
    key = shorten(".".join(keys), 100)
    if errors[0]["type"] == "message":
        return errors[0]["msg"]
    if field is None:
        return f"there is no key '{key}'{nearest(key, _known_keys(schema))}"
    allowed = allowed_values(field)
    value: Any = values
    for name in keys:
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is _ABSENT:
        return f"{key} is not set: add {key}=VALUE"
    if len(keys) == 1 and section_of(field) and issubclass(schema, CommonConfig):
        allowed = f"one of the options of configs/{key}"
    if value is None:
        return f"{key} is not set: it must be {allowed}"
    most = _extra(field).get("most")
    if most is not None and any(m["type"] == "less_than_equal" for m in errors):
        allowed += f", and {most:.10g} at most"
    shown = NAMES[value] if isinstance(value, bool) else shorten(value)
    return f"{key}={shown} must be {allowed}"


def allowed_values(field: FieldInfo) -> str:
    """Describe the allowed values of a field."""
    options = [option for option in _options(field.annotation) if option is not types.NoneType]
    optional = types.NoneType in _options(field.annotation)
    allowed = _extra(field).get("must")
    if allowed:
        return f"{allowed}, or null" if optional and "null" not in allowed else allowed
    if model := section_of(field):
        allowed = f"a mapping of {_join(model.model_fields, 'and')}"
        return f"null, or {allowed}" if optional else allowed
    if options[0] is bool:
        return "true or false"
    choices = [str(choice) for option in options for choice in typing.get_args(option)]
    if not choices:  # Any
        return "a value"
    return _join([*(["null"] if optional else []), *choices], "or")


def _extra(field: FieldInfo) -> dict[str, Any]:
    """Return the ``must`` and ``most`` of a field (see ``config/fields.py``)."""
    extra = field.json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the model of a field that is a nested section, else None."""
    models = [o for o in _options(field.annotation) if isinstance(o, type) and issubclass(o, Section)]
    return models[0] if models else None


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _join(names: typing.Iterable[str], conjunction: str) -> str:
    *others, final = names
    return f"{', '.join(others)} {conjunction} {final}" if others else final


def _known_keys(schema: type[Section]) -> Iterator[str]:
    """Yield every dotted key of a schema."""
    for name, field in schema.model_fields.items():
        yield name
        if model := section_of(field):
            yield from (f"{name}.{key}" for key in _known_keys(model))


_ABSENT = object()
