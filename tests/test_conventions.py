"""Conventions of the package: names, the size of functions and files, and logging instead of printing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import detkit

PACKAGE = Path(detkit.__file__).parent
FILES = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
LONGEST_FUNCTION, LONGEST_FILE = 64, 320  # lines, with the docstring
PRIVATE_WORDS = {"afresh", "heed", "mend", "mended", "odd", "picture", "pictures", "said", "sentence", "told", "words"}
PRINTS = ("viz/", "cli.py", "benchmarks/")


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name that a file defines or uses; not those of other libraries' attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


def test_names_are_those_of_the_field():
    wrong = {
        f"{file}: {name}"
        for file, tree in FILES.items()
        for name in identifiers(tree)
        if PRIVATE_WORDS & {*name.lower().split("_")}
    }
    assert not wrong


def test_functions_fit_a_screen():
    functions = ((file, node) for file, tree in FILES.items() for node in ast.walk(tree))
    long = [
        f"{file}: {node.name}"
        for file, node in functions
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_files_are_short():
    assert not [file for file in FILES if len((PACKAGE / file).read_text().splitlines()) > LONGEST_FILE]


def test_messages_go_through_logging():
    """Only what draws tables and the command line's own help may print."""
    calls = (
        (file, node.func.id)
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )
    assert not [file for file, name in calls if name == "print" and not file.startswith(PRINTS)]
