"""Changes to text files that know what the text means: json, YAML, XML, and lines of words."""

import json
import re
from random import Random
from xml.etree import ElementTree

import yaml

from .values import LONG_TEXT, NUMBERS, ODD_TEXT, RAW, Change, change_document, to_json

# fmt: off
LAUGHS = "a: &a [x]\n" + "".join(  # each list holds the one before ten times
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_VALUES = (
    "yes", "no", "on", "off", "~", "null", ".nan", ".inf", "010", "0b11", "1:30", "1_000", "1e3", "+1", "=", "<<",
    "2024-01-01", "2020-99-99", "&s [*s]", "&s {a: *s}", "&s {*s : 1}", "*nowhere", "{[]: 1}", "{{}: 1}", "? [a]",
    "|", ">", "!!python/object/apply:os.system ['touch executed']", "!!python/name:os.system", "!unknown x",
    "!!binary aGk=", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!int abc", "!!float x",
    "!!timestamp x", "!!null x", "!!bool x", "!!str [a]", "!!map a", "!!seq a", "[no, yes]", "[1, 2]", "{0: a, 0: b}",
    "{a: 1, <<: x}", "[" * 5000 + "]" * 5000, "{a: " * 5000 + "}" * 5000, "- " * 5000, "{<<: " * 5000, "9" * 5000,
    '"\\ud800"', '"\\e[1m"',
)
YAML_STARTS = (
    "%YAML 9.9\n---\n", "%TAG ! x\n---\n", "---\na: 1\n---\n", "\ufeff", "\t", "<<: 1\n", "? {a: b}\n: 1\n", "- a\n",
)
ENCODINGS = (
    "utf-16", "utf-16-le", "utf-32", "latin-1", "gb2312", "cp1252", "utf-7", "idna", "punycode", "rot13", "hex",
    "unicode_escape", "base64", "undefined", "x-unknown", "", "utf-8" * 1000, "mbcs", "ascii",
)
LAUGHING_ENTITIES = "".join(
    f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ENTITIES = (  # each defines &i;
    f'<!DOCTYPE a [<!ENTITY a "x">{LAUGHING_ENTITIES}]>',
    '<!DOCTYPE a [<!ENTITY i SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE a [<!ENTITY i SYSTEM "file:///dev/zero">]>',
    '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p; <!ENTITY i "x">]>',
    '<!DOCTYPE a [<!ENTITY i "&i;">]>',
    f'<!DOCTYPE a [<!ENTITY i "{"x" * 100_000}">]>',
    "",
)
XML_PIECES = (
    "<!--x-->", "<![CDATA[1]]>", "<?x y?>", "<a/>", "&#0;", "&#x1b;", "&#55296;", "]]>", "<", "\x00", "\x1b", "\ufeff",
)
XML_NAMES = ("Object", "name", "object", "bndbox", "size", "ns:x", "a" * 5000, "{http://x}object")
# fmt: on


def mutate_text(rng: Random, suffix: str, content: bytes) -> Change:
    """Change a text file in a way that its kind suggests."""
    kinds = {".json": mutate_json, ".yaml": mutate_yaml, ".xml": mutate_xml}
    return kinds.get(suffix, mutate_lines)(rng, content.decode())


def mutate_json(rng: Random, text: str) -> Change:
    """Change one to three places of a json document, or its text."""
    kind = rng.randrange(12)
    if kind == 0:
        old = rng.choice(re.findall(r"-?\d+(?:\.\d+)?", text) or ["0"])
        new = rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "01", "1.", ".5", "0x1", *RAW.values()))
        return Change(text.replace(old, new, 1).encode(), f"a number is {new:.20}")
    if kind == 1:
        more = rng.choice((text, "x", " 1"))
        return Change((text + more).encode(), f"{more[:20]!r} comes after the end", refuse=True)
    if kind == 2:
        name = rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
        return Change(text.encode(name), f"the text is {name}")
    if kind == 3:
        key = rng.choice(re.findall(r'"\w+": ', text) or ['"a": '])
        value = to_json(rng.choice(NUMBERS))
        return Change(text.replace(key, f"{key}{value}, {key}", 1).encode(), f"{key} comes twice")
    if kind == 4:
        new = rng.choice((text[:-1], f"[{text}]", f"/*x*/{text}", text.replace('"', "'"), f"\x00{text}"))
        return Change(new.encode(), f"the text begins with {new[:10]!r} and ends with {new[-10:]!r}")
    document, done = json.loads(text), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document, what = change_document(rng, document)
        done.append(what)
    return Change(to_json(document).encode(), "; ".join(done))


def mutate_yaml(rng: Random, text: str) -> Change:
    """Change a place of a YAML document, or put in what only YAML has: aliases, tags, odd words."""
    kind = rng.randrange(10)
    if kind < 4:
        document, what = change_document(rng, yaml.safe_load(text))
        text = to_json(document)
        return Change(text.replace("NaN", ".nan").replace("Infinity", ".inf").encode(), what)
    lines = [k for k, line in enumerate(text.splitlines()) if re.match(r"\s*[\w-]+:", line)]
    if kind < 7:
        return _replace_yaml_value(text, rng.choice(lines), rng.choice(YAML_VALUES))
    if kind == 7:
        change = _replace_yaml_value(text, rng.choice(lines), "*i")
        return Change(LAUGHS.encode() + change.content, f"{change.what}, a list of 10**8")
    if kind == 8:
        start = rng.choice(YAML_STARTS)
        return Change((start + text).encode(), f"begins with {start!r}")
    content = text.encode()
    forms = (text.encode("utf-16"), text.encode("utf-32"), content + b"\xff", content + b"\0", content + b"\x1b")
    new = rng.choice((*forms, content.replace(b": ", b":\t"), content.replace(b"\n", b"\r"), content * 2, b""))
    return Change(new, f"the bytes begin with {new[:12]!r} and end with {new[-12:]!r}")


def _replace_yaml_value(text: str, number: int, value: str) -> Change:
    """Put a value behind the key of a line, in place of all that was below it."""
    lines = text.splitlines()
    key = lines[number].partition(":")[0]
    indent, rest = len(key) - len(key.lstrip()), lines[number + 1 :]
    while rest and (rest[0].startswith(" " * (indent + 1)) or rest[0].startswith(" " * indent + "-")):
        del rest[0]
    return Change("\n".join([*lines[:number], f"{key}: {value}", *rest, ""]).encode(), f"{key.strip()} is {value:.40}")


def mutate_xml(rng: Random, text: str) -> Change:
    """Change the encoding of an XML document, its entities, how deep it goes, or an element."""
    kind = rng.randrange(10)
    if kind == 0:
        name = rng.choice(ENCODINGS)
        try:
            body = text.encode(name)
        except Exception:  # no encoding, or not one of text
            body = text.encode()
        head = f'<?xml version="1.0" encoding="{rng.choice((name, "utf-8"))}"?>' if rng.random() < 0.8 else ""
        return Change(head.encode() + body, f"encoding {name:.20} declared as {head:.60}")
    if kind == 1:
        entity = rng.choice(ENTITIES)
        new = re.sub(r">[^<>]+<", ">&i;<", text, count=rng.choice((1, 0)))
        return Change((entity + new).encode(), f"entities: {entity:.80}")
    if kind == 2:
        piece, at = rng.choice(XML_PIECES), rng.choice([m.end() for m in re.finditer(r">[^<>]", text)] or [0])
        return Change((text[:at] + piece + text[at:]).encode(), f"{piece!r} within a text")
    if kind == 3:
        depth, at = rng.choice((50, 300, 5_000, 100_000)), rng.choice([m.end() for m in re.finditer(">", text)][:-1])
        tag = rng.choice(("a", "object", "annotation"))
        nest = f"<{tag}>" * depth + f"</{tag}>" * depth
        return Change((text[:at] + nest + text[at:]).encode(), f"<{tag}> {depth} deep")
    root = ElementTree.fromstring(text)
    what = _change_element(rng, root)
    return Change(ElementTree.tostring(root, "utf-8"), what)


def _change_element(rng: Random, root: ElementTree.Element) -> str:
    """Change an element; return what was done."""
    parent = rng.choice([node for node in root.iter() if len(node)])
    child = rng.choice(list(parent))
    kind, what = rng.randrange(8), f"<{child.tag}> of <{parent.tag}>"
    if kind == 0:
        parent.remove(child)
        return f"{what} is dropped"
    if kind == 1:
        times = rng.choice((1, 1, 3_000))
        parent.extend([child] * times)
        return f"{what} is repeated {times} times"
    if kind == 2:
        element = rng.choice(list(root.iter()))
        old, element.tag = element.tag, rng.choice(XML_NAMES)
        return f"<{old}> is called {element.tag:.30}"
    if kind == 3:
        wrapper = ElementTree.Element(rng.choice(("objects", "annotation", "a", "part", "object")))
        wrapper.append(child)
        parent[list(parent).index(child)] = wrapper
        return f"{what} is within <{wrapper.tag}>"
    if kind == 4:
        child.set(rng.choice(("a", "xmlns", "name")), rng.choice(("", "x", LONG_TEXT)))
        return f"{what} has an attribute"
    element = rng.choice([node for node in root.iter() if not len(node)])
    element.text = str(rng.choice((*ODD_TEXT, *NUMBERS, LONG_TEXT)))
    return f"<{element.tag}> is {element.text!r:.60}"


def mutate_lines(rng: Random, text: str) -> Change:
    """Change words, lines, separators or the encoding of a text of lines: labels, lists of images, csv."""
    comma = "," if text.count(",") > text.count(" ") else " "
    lines = text.splitlines() or [""]
    number, kind, what = rng.randrange(len(lines)), rng.randrange(10), ""
    words = lines[number].split(comma)
    k = rng.randrange(len(words))
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
        return Change(new.replace(comma, separator).encode(), f"words are separated by {separator!r}")
    if kind == 9:
        forms = {name: new.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "utf-16-le")}
        forms["latin-1"] = new.encode("latin-1", "replace") + b"\xff\n"
        forms |= {"of an old Mac": new.replace("\n", "\r").encode(), "empty": b""}
        form = rng.choice(list(forms))
        return Change(forms[form], f"the text is {form}")
    return Change(new.encode("utf-8", "surrogatepass"), what)
