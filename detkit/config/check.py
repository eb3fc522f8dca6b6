"""The first value that the schema refuses, in one sentence: its key, the value, and what it must be."""

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

MAX_DEPTH = 50  # of mappings and lists within one another
MAX_VALUES = 1_000_000  # of a file; detkit's own configurations have some 200
NAMES = {None: "null", True: "true", False: "false"}


def check_values(cfg: Mapping[str, Any], schema: type[Section] = TrainConfig, partial: bool = False) -> None:
    """Check a resolved configuration against a schema.

    Args:
        partial: keys may be missing, and others be there: it is of a file that another version may have written.

    Raises:
        DetkitError: names the first key that is unknown, missing, or whose value is not allowed, and what is.
    """
    if odd := first_odd_value(cfg) or validate(schema, cfg, partial)[1]:
        raise DetkitError(odd)


def parse_config(values: Mapping[str, Any], schema: type[AnySection]) -> AnySection:
    """Return a resolved configuration as a model, such as ``TrainConfig``.

    Raises:
        DetkitError: as ``check_values``.
    """
    if odd := first_odd_value(values):
        raise DetkitError(odd)
    config, odd = validate(schema, values)
    if config is None:
        raise DetkitError(odd)
    return config


def validate(
    schema: type[AnySection], values: Mapping[str, Any], partial: bool = False
) -> tuple[AnySection | None, str]:
    """Return ``values`` as a model, and an empty string; or None, and a sentence on the first mistake in them.

    Args:
        partial: keys may be missing, and others be there: then there is no model, and perhaps no mistake either.
    """
    try:
        return schema.model_validate(values), ""
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    if partial:
        found = [mistake for mistake in found if mistake["type"] not in ("missing", "extra_forbidden")]
    if not found:
        return None, ""
    keys, field = _place(schema, found[0]["loc"])
    mistakes = [mistake for mistake in found if _place(schema, mistake["loc"])[0] == keys]
    return None, _sentence(schema, values, keys, field, mistakes)


def first_odd_value(content: Any) -> str:
    """Return a sentence on what no YAML file of ours would hold; an empty string where all is well.

    That is a control character, as in a path with NUL, an object of some class, a number or values without end, or
    nested deeply.
    """
    count = 0
    todo: list[tuple[str, Any, int]] = [("", content, 0)]
    while todo:
        key, value, depth = todo.pop()
        count += 1
        name = shorten(key, 100) or "the configuration"
        if depth > MAX_DEPTH or count > MAX_VALUES:
            return f"{name} is refused: its values are nested too deeply, or too many"
        if isinstance(value, Mapping):
            odd = next((k for k in value if not isinstance(k, (str, int)) or _has_control(k) or _is_endless(k)), None)
            if odd is not None:
                return f"{name} has the key {shorten(odd, 100)}: a key is text that can be printed"
            todo += [(f"{key[:200]}.{k}" if key else f"{k}", v, depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(key, v, depth + 1) for v in value]
        elif _has_control(value):
            return f"{name}={shorten(value)} must not hold control characters"
        elif _is_endless(value):
            return f"{name}={shorten(value, 50)} has too many digits"
        elif not isinstance(value, (str, int, float, type(None))):
            return f"{name}={shorten(value)} must be text, a number, a list or a mapping"
    return ""


def _has_control(value: Any) -> bool:
    return isinstance(value, str) and any(c < " " or c == "\x7f" for c in value)


def _is_endless(value: Any) -> bool:
    """Whether a value is a whole number beyond any that a float can stand for; Python refuses to print some of them."""
    return isinstance(value, int) and value.bit_length() > 1024


def _place(schema: type[Section], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], FieldInfo | None]:
    """Return the keys and the field that pydantic means by ``loc``, as far down as the schema goes.

    A key without a field is one that does not exist. Within a mapping of a group (``data.tiles``) an unknown key is a
    mistake of that mapping.
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


def _sentence(
    schema: type[Section],
    values: Mapping[str, Any],
    keys: tuple[str, ...],
    field: FieldInfo | None,
    mistakes: list[Any],
) -> str:
    key, kind = shorten(".".join(keys), 100), mistakes[0]["type"]
    if kind == "sentence":
        return mistakes[0]["msg"]
    if field is None:
        return f"there is no key '{key}'{nearest(key, _known_keys(schema))}"
    words = allowed_values(field)
    value: Any = values
    for name in keys:
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is _ABSENT:
        return f"{key} is not set: add {key}=VALUE"
    if len(keys) == 1 and section_of(field) and issubclass(schema, CommonConfig):
        words = f"one of the options of configs/{key}"
    if value is None:
        return f"{key} is not set: it must be {words}"
    most = _extra(field).get("most")
    if most is not None and any(m["type"] == "less_than_equal" for m in mistakes):
        words += f", and {most:.10g} at most"
    shown = NAMES[value] if isinstance(value, bool) else shorten(value)
    return f"{key}={shown} must be {words}"


def allowed_values(field: FieldInfo) -> str:
    """Return what the value of a field must be, in words."""
    options = [option for option in _options(field.annotation) if option is not types.NoneType]
    optional = types.NoneType in _options(field.annotation)
    words = _extra(field).get("must")
    if words:
        return f"{words}, or null" if optional and "null" not in words else words
    if model := section_of(field):
        words = f"a mapping of {_listed(model.model_fields, 'and')}"
        return f"null, or {words}" if optional else words
    if options[0] is bool:
        return "true or false"
    choices = [str(choice) for option in options for choice in typing.get_args(option)]
    if not choices:  # of Any
        return "a value"
    return _listed([*(["null"] if optional else []), *choices], "or")


def _extra(field: FieldInfo) -> dict[str, Any]:
    """Return what ``config/fields.py`` says of a field beside its type: ``must`` and ``most``."""
    extra = field.json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the model of a field that is a mapping with keys of its own."""
    models = [o for o in _options(field.annotation) if isinstance(o, type) and issubclass(o, Section)]
    return models[0] if models else None


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _listed(names: typing.Iterable[str], last: str) -> str:
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final


def _known_keys(schema: type[Section]) -> Iterator[str]:
    """Yield every dotted key of a schema."""
    for name, field in schema.model_fields.items():
        yield name
        if model := section_of(field):
            yield from (f"{name}.{key}" for key in _known_keys(model))


_ABSENT = object()
