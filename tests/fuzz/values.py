"""Values of all kinds of nonsense, and documents (mappings, lists, numbers, text) in which one thing is changed."""

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

# What Python objects cannot say, and json and YAML can; ``to_json`` puts it in.
RAW = {
    "<5000 digits>": "9" * 5000,
    "<deep list>": "[" * 20_000 + "]" * 20_000,
    "<deep mapping>": '{"a":' * 20_000 + "1" + "}" * 20_000,
}
LONG_TEXT = "long" * 25_000
# fmt: off
ODD_TEXT = (
    "", " ", "text", "0", "1", "-1", "1.0", "nan", "1e999", "0x10", "true", "None", "a" * 300, "ü", "日本", "\ud800",
    "\x1b[31mred\x1b[0m", "\x00", "a\nb", "a\rb", "\u202e", "\x9b2J", "\x07", "[bold]x[/bold]", "[/x]", ":smile:",
    "%s", "{}", "{0}", "${oc.env:HOME}", "'", '"', "\\", "a/b", "../../etc/passwd", "/dev/zero", "/dev/null",
    ".", "..", "~", "file:///etc/passwd", "http://127.0.0.1:9/x", "pipe:true", "C:\\x\\y.jpg",
)
NUMBERS = (
    0, 1, -1, 2, 7, 100, 255, 256, 65_536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, -(2**63), 2**63, 2**64, 10**30, -64,
    10**400, 0.0, -0.0, 0.5, 3.7, 1e-9, -1e-9, 1e-320, 1e6, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)
# fmt: on


class Change(NamedTuple):
    """A file's new content, what was done to it, and whether using it would be wrong."""

    content: bytes
    what: str
    refuse: bool = False


def odd_value(rng: Random) -> Any:
    """Return a value that may be right nowhere."""
    return rng.choice(
        (
            lambda: rng.choice((None, True, False)),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(ODD_TEXT),
            lambda: rng.choice(ODD_TEXT),
            lambda: rng.choice(([], {}, [[]], [{}], {"": None}, [None], ["a", "a"], [0, 0], {"a": {"b": {}}})),
            lambda: rng.choice((LONG_TEXT, [0] * 20_000, ["name"] * 5_000, {str(k): k for k in range(5_000)})),
            lambda: rng.choice(list(RAW)),
        )
    )()


def places(document: Any) -> list[tuple[Any, Any, str]]:
    """Return every place in a document: the mapping or list that holds it, its key there, and its path in words."""

    def walk(node: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                name = f"{path}.{key}".lstrip(".")
                yield node, key, name
                yield from walk(node[key], name)

    return list(walk(document, ""))


def change_document(
    rng: Random, document: Any, *, below: str = "", odd: Callable[[Random], Any] = odd_value
) -> tuple[Any, str]:
    """Change one place of a document, or all of it; return it and what was done.

    Args:
        below: only places whose path begins so.
        odd: makes the values that are put in.
    """
    found = [place for place in places(document) if place[2].startswith(below)]
    if not found or rng.random() < 0.02:
        value = odd(rng)
        return value, f"all is {value!r:.60}"
    # First a depth, then a place there: a list of a hundred boxes is no more likely than the key that holds it.
    depth = rng.choice(sorted({name.count(".") for _, _, name in found}))
    node, key, name = rng.choice([place for place in found if place[2].count(".") == depth])
    value = node[key]
    change = rng.randrange(10)
    if change == 0:
        del node[key]
        return document, f"{name} is dropped"
    if change == 1 and isinstance(node, list):
        node.extend([copy.deepcopy(value)] * rng.choice((1, 1, 3000)))
        return document, f"{name} is repeated"
    if change == 1:
        other = rng.choice(list(node))
        node[key], node[other] = node[other], value
        return document, f"{name} and {other} change places"
    if change == 2 and isinstance(node, dict):
        new = rng.choice(ODD_TEXT)
        node[new] = node.pop(key)
        return document, f"{name} is called {new!r:.60}"
    if change == 2:
        node.insert(key, odd(rng))
        return document, f"{node[key]!r:.60} is put before {name}"
    if change == 3:
        node[key] = rng.choice(([value], {"a": value}, [value, value], str(value), {0: value}))
        return document, f"{name} is {node[key]!r:.60}"
    if change == 4 and isinstance(value, int | float):
        node[key] = rng.choice((-value, value * 10**9, value + 0.5, value + 1, value - 1, float(value), str(value)))
        return document, f"{name} is {node[key]!r:.60}"
    if change == 4 and isinstance(value, str):
        node[key] = rng.choice(
            (value * 1000, value + "\x1b[1m", value.upper(), f" {value} ", value[:-1], f"../{value}")
        )
        return document, f"{name} is {node[key]!r:.60}"
    node[key] = odd(rng)
    return document, f"{name} is {node[key]!r:.60}"


def to_json(document: Any, **options: Any) -> str:
    """Return a document as json, which YAML takes as well; lone surrogates as escapes."""
    text = json.dumps(document, **options)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text
