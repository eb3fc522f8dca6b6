"""Mutations of text files that know what the text means: json, YAML, XML, and lines of words."""

import json
import re
from random import Random
from xml.etree import ElementTree

import yaml

from .values import LONG_TEXT, NUMBERS, ODD_TEXT, RAW, change_document, to_json

LAUGHS = "a: &a [x]\n" + "".join(  # each list holds the one before ten times
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_VALUES = (
    *("yes", "no", "on", "off", "~", "null", ".nan", ".inf", "010", "0b11", "1:30", "1_000", "1e3", "+1", "2024-01-01"),
    *(
        "2020-99-99",
        "=",
        "<<",
        "&s [*s]",
        "&s {a: *s}",
        "&s {*s : 1}",
        "*nowhere",
        "{[]: 1}",
        "{{}: 1}",
        "? [a]",
        "|",
        ">",
    ),
    *("!!python/object/apply:os.system ['touch executed']", "!!python/name:os.system", "!!binary aGk=", "!!binary x"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!unknown x", "!!int abc", "!!float x", "!!timestamp x"),
    *(
        "!!null x",
        "!!bool x",
        "!!str [a]",
        "!!map a",
        "!!seq a",
        "[no, yes]",
        "[1, 2]",
        "{0: a, 0: b}",
        "{a: 1, <<: x}",
    ),
    *(
        "[" * 5000 + "]" * 5000,
        "{a: " * 5000 + "}" * 5000,
        "- " * 5000,
        "{<<: " * 5000,
        "9" * 5000,
        '"\\ud800"',
        '"\\e[1m"',
    ),
)
YAML_STARTS = (
    "%YAML 9.9\n---\n",
    "%TAG ! x\n---\n",
    "---\na: 1\n---\n",
    "\ufeff",
    "\t",
    "<<: 1\n",
    "? {a: b}\n: 1\n",
    "- a\n",
)
ENCODINGS = (
    *("utf-16", "utf-16-le", "utf-32", "latin-1", "gb2312", "cp1252", "utf-7", "idna", "punycode", "rot13", "hex"),
    *("unicode_escape", "base64", "undefined", "x-unknown", "", "utf-8" * 1000, "mbcs", "ascii"),
)
LAUGHING_ENTITIES = "".join(
    f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ENTITIES = (
    f'<!DOCTYPE a [<!ENTITY a "x">{LAUGHING_ENTITIES}]>',
    '<!DOCTYPE a [<!ENTITY i SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE a [<!ENTITY i SYSTEM "file:///dev/zero">]>',
    '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p; <!ENTITY i "x">]>',
    '<!DOCTYPE a [<!ENTITY i "&i;">]>',
    f'<!DOCTYPE a [<!ENTITY i "{"x" * 100_000}">]>',
    "",
)


def mutate_text(rng: Random, suffix: str, content: bytes) -> tuple[bytes, str]:
    """Change a text file in a way that its kind suggests; return it, and what was done."""
    kinds = {".json": mutate_json, ".yaml": mutate_yaml, ".xml": mutate_xml}
    return kinds.get(suffix, mutate_lines)(rng, content.decode())


def mutate_json(rng: Random, text: str) -> tuple[bytes, str]:
    """Change one to three places of a json document, or its text."""
    kind = rng.randrange(12)
    if kind == 0:
        old = rng.choice(re.findall(r"-?\d+(?:\.\d+)?", text) or ["0"])
        new = rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "01", "1.", ".5", "0x1", *RAW.values()))
        return text.replace(old, new, 1).encode(), f"a number is {new:.20}"
    if kind == 1:
        new = rng.choice(
            (text + text, text + "x", "\ufeff" + text, text[:-1], f"[{text}]", "/*x*/" + text, text.replace('"', "'"))
        )
        return new.encode(), f"the text begins with {new[:20]!r} and ends with {new[-20:]!r}"
    if kind == 2:
        name = rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
        return text.encode(name), f"the text is {name}"
    if kind == 3:
        key = rng.choice(re.findall(r'"\w+": ', text) or ['"a": '])
        value = to_json(rng.choice(NUMBERS))
        return text.replace(key, f"{key}{value}, {key}", 1).encode(), f"{key} comes twice"
    document, done = json.loads(text), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document, what = change_document(rng, document)
        done.append(what)
    return to_json(document, ensure_ascii=True).encode(), "; ".join(done)


def mutate_yaml(rng: Random, text: str) -> tuple[bytes, str]:
    """Change a place of a YAML document, or put in what only YAML has: aliases, tags, odd words."""
    kind = rng.randrange(10)
    if kind < 4:
        document, what = change_document(rng, yaml.safe_load(text))
        return to_json(document).encode(), what
    if kind < 7:
        lines = [k for k, line in enumerate(text.splitlines()) if re.match(r"\s*[\w-]+:", line)]
        return _replace_yaml_value(rng, text, rng.choice(lines), rng.choice(YAML_VALUES))
    if kind == 7:
        lines = [k for k, line in enumerate(text.splitlines()) if re.match(r"[\w-]+:", line)]
        new, what = _replace_yaml_value(rng, text, rng.choice(lines), "*i")
        return LAUGHS.encode() + new, f"{what} (a list of 10**8)"
    if kind == 8:
        start = rng.choice(YAML_STARTS)
        return (start + text).encode(), f"begins with {start!r}"
    new = rng.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.encode() + b"\xff",
            text.encode() + b"\0",
            text.encode() + b"\x1b",
            text.replace(": ", ":\t").encode(),
            text.replace("\n", "\r").encode(),
            b"",
            text.encode() * 2,
        )
    )
    return new, f"the bytes begin with {new[:12]!r} and end with {new[-12:]!r}"


def _replace_yaml_value(rng: Random, text: str, number: int, value: str) -> tuple[bytes, str]:
    lines = text.splitlines()
    key = lines[number].partition(":")[0]
    lines[number] = f"{key}: {value}"
    indent = len(key) - len(key.lstrip())
    rest = lines[number + 1 :]
    while rest and (rest[0].startswith(" " * (indent + 1)) or rest[0].startswith(" " * indent + "-")):
        del rest[0]  # what was below the key
    return "\n".join([*lines[: number + 1], *rest, ""]).encode(), f"{key.strip()} is {value:.40}"


def mutate_xml(rng: Random, text: str) -> tuple[bytes, str]:
    """Change an element of an XML document, its encoding, its entities, or how deep it goes."""
    kind = rng.randrange(12)
    if kind == 0:
        name = rng.choice(ENCODINGS)
        try:
            body = text.encode(name)
        except Exception:  # no encoding, or not one of text
            body = text.encode()
        head = f'<?xml version="1.0" encoding="{rng.choice((name, "utf-8"))}"?>' if rng.random() < 0.8 else ""
        return head.encode() + body, f"encoding {name:.20} declared as {head:.60}"
    if kind == 1:
        entity = rng.choice(ENTITIES)
        return (
            entity + re.sub(r">[^<>]+<", ">&i;<", text, count=rng.choice((1, 0)))
        ).encode(), f"entities: {entity:.80}"
    if kind == 2:
        piece = rng.choice(
            (
                "<!--x-->",
                "<![CDATA[1]]>",
                "<?x y?>",
                "<a/>",
                "&#0;",
                "&#x1b;",
                "&#55296;",
                "]]>",
                "<",
                "\x00",
                "\x1b",
                "\ufeff",
            )
        )
        at = rng.choice([m.end() for m in re.finditer(r">[^<>]", text)] or [0])
        return (text[:at] + piece + text[at:]).encode(), f"{piece!r} within a text"
    if kind == 3:
        depth, where = rng.choice((50, 300, 5_000, 100_000)), rng.choice([m.end() for m in re.finditer(">", text)][:-1])
        tag = rng.choice(("a", "object", "annotation"))
        return (
            text[:where] + f"<{tag}>" * depth + f"</{tag}>" * depth + text[where:]
        ).encode(), f"<{tag}> {depth} deep"
    root = ElementTree.fromstring(text)
    element = rng.choice(list(root.iter()))
    parent = rng.choice([node for node in root.iter() if len(node)])
    child = rng.randrange(len(parent))
    what = f"<{parent[child].tag}> of <{parent.tag}>"
    if kind == 4:
        parent.remove(parent[child])
        what += " is dropped"
    elif kind == 5:
        times = rng.choice((1, 1, 3_000))
        parent.extend([parent[child]] * times)
        what += f" is repeated {times} times"
    elif kind == 6:
        element.tag = rng.choice(("Object", "name", "object", "bndbox", "size", "ns:x", "a" * 5000, "{http://x}object"))
        what = f"an element is called {element.tag:.30}"
    elif kind == 7:
        wrapper = ElementTree.Element(rng.choice(("objects", "annotation", "a", "part", "object")))
        wrapper.append(parent[child])
        parent[child] = wrapper
        what += f" is within <{wrapper.tag}>"
    elif kind == 8:
        parent[child].set(rng.choice(("a", "xmlns", "name")), rng.choice(("", "x", LONG_TEXT)))
        what += " has an attribute"
    else:
        texts = [node for node in root.iter() if not len(node)]
        element = rng.choice(texts or [root])
        element.text = str(rng.choice((*ODD_TEXT, *NUMBERS, LONG_TEXT)))
        what = f"<{element.tag}> is {element.text!r:.60}"
    return ElementTree.tostring(root, "utf-8"), what


def mutate_lines(rng: Random, text: str) -> tuple[bytes, str]:
    """Change words, lines, separators or the encoding of a text of lines: labels, lists of images, csv."""
    comma = "," if text.count(",") > text.count(" ") else " "
    lines = text.splitlines() or [""]
    number = rng.randrange(len(lines))
    words = lines[number].split(comma)
    k, kind = rng.randrange(len(words)), rng.randrange(10)
    if kind < 4:
        words[k] = str(rng.choice((*ODD_TEXT, *NUMBERS, "1_0", "٣", "1;2", "9" * 5000, LONG_TEXT)))
        what = f"line {number + 1}, word {k + 1} is {words[k]!r:.60}"
    elif kind == 4:
        del words[k]
        what = f"line {number + 1} has no word {k + 1}"
    elif kind == 5:
        words += [words[-1]] * rng.choice((1, 2, 3, 20, 300_000))
        what = f"line {number + 1} has {len(words)} words"
    lines[number] = comma.join(words)
    if kind == 6:
        times = rng.choice((1, 2, 20_000))
        lines += [lines[number]] * times
        what = f"line {number + 1} is repeated {times} times"
    elif kind == 7:
        lines.insert(number, rng.choice((*ODD_TEXT, "#", "\x00" * 1000, "0", LONG_TEXT)))
        what = f"line {number + 1} is {lines[number]!r:.60}"
    new = "\n".join(lines) + "\n"
    if kind == 8:
        separator = rng.choice((",", ";", "\t", "  ", "\x00", "\u00a0", "\x0b", "\x85"))
        return new.replace(comma, separator).encode(), f"words are separated by {separator!r}"
    if kind == 9:
        choices = {name: new.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "utf-16-le")}
        choices |= {
            "old Mac": new.replace("\n", "\r").encode(),
            "empty": b"",
            "latin-1": new.encode("latin-1", "replace") + b"\xff\n",
        }
        what = rng.choice(list(choices))
        return choices[what], f"the text is {what}"
    return new.encode("utf-8", "surrogatepass"), what
