"""The READMEs: the table of keys is current, links lead somewhere, commands compose, and Python blocks run."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from detkit.config import check_values, compose_config, config_dir, group_options, resolve
from detkit.config_docs import BEGIN, END, render
from detkit.errors import DetkitError
from detkit.tasks import find_task, list_tasks

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "detkit", "tools", "tests")
READMES = [ROOT / "README.md", *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("README.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LONGEST = 250  # lines of a README without the generated tables
LONGEST_LINE = 130  # characters of its prose
COMPOSE_EXAMPLES = """
import torch
from detkit.config import compose_config, resolve
from detkit.models.detector import build_detector
parts = {"backbone": {"name": "my_backbone", "width": 8}, "neck": {"name": "my_fpn", "width": 8}}
detector = build_detector(resolve(compose_config("train", ["~data"])) | parts, ["a"])
assert detector(torch.rand(1, 3, 64, 96)).cls.shape == (1, 8 * 12 + 4 * 6 + 2 * 3, 1)
"""


def name_of(readme: Path) -> str:
    return str(readme.relative_to(ROOT))


def blocks(readme: Path, language: str) -> list[str]:
    """The code blocks of a README in one language."""
    return [code for tag, code in BLOCK.findall(readme.read_text(encoding="utf-8")) if tag == language]


def anchors(readme: Path) -> set[str]:
    """The names by which GitHub links to the headings of a README."""
    text = BLOCK.sub("", readme.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the task and the arguments of every ``tools/NAME.py`` or ``detkit NAME`` in a line of a shell."""
    arguments = shlex.split(line, comments=True)
    for k, argument in enumerate(arguments):
        script = re.fullmatch(r"(?:.*/)?tools/(\w+)\.py", argument)
        starts = k == 0 or arguments[k - 1] in ("&&", "nohup")
        if script or (argument == "detkit" and starts and k + 1 < len(arguments)):
            rest = arguments[k + 1 :] if script else arguments[k + 2 :]
            end = next((i for i, w in enumerate(rest) if re.fullmatch(r"[|>&;]+", w)), len(rest))
            yield (script[1] if script else arguments[k + 1]), rest[:end]


def all_commands() -> dict[str, tuple[str, list[str]]]:
    """Every command in the shell blocks of the READMEs, by its README and its arguments."""
    found = {}
    for readme in READMES:
        for code in blocks(readme, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                for task, arguments in find_commands(line):
                    if task.endswith(".py"):  # the reader's own: test_plugins.py runs it
                        continue
                    found[f"{name_of(readme)}: {shlex.join([task, *arguments])}"] = (task, arguments)
    return found


def without_flags(arguments: list[str]) -> list[str]:
    """The overrides among a command's arguments; an ellipsis stands for more of them."""
    flags = {k for k, argument in enumerate(arguments) if argument.startswith("-")}
    values = {k + 1 for k in flags if arguments[k] in ("--config-dir", "--cfg")}
    return [re.sub(r"\$\w+", "x", w) for k, w in enumerate(arguments) if k not in flags | values and w != "..."]


def each_alone(overrides: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of single jobs such that every value of a sweep is in one of them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [list(p.sweep_string_iterator()) if p.is_sweep_override() else [None] for p in parsed]
    for k in range(max(map(len, choices), default=1)):
        yield [
            override if values == [None] else f"{p.get_key_element()}={values[min(k, len(values) - 1)]}"
            for override, p, values in zip(overrides, parsed, choices, strict=True)
        ]


COMMANDS = all_commands()


def test_the_table_of_keys_is_what_the_schema_says():
    text = (config_dir() / "README.md").read_text(encoding="utf-8")
    block = text.partition(BEGIN)[2].partition(END)[0]
    assert block.strip() == render().strip(), "run python -m detkit.config_docs"


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_links_lead_somewhere(readme):
    text = BLOCK.sub("", readme.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (readme.parent / path).resolve() if path else readme
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_files_that_are_named_exist(readme):
    text = BLOCK.sub("", readme.read_text(encoding="utf-8"))
    for path in re.findall(r"`([a-z_./]*/[a-z_0-9]+\.(?:py|yaml|yml|sh))`", text):
        if "my_" not in path:  # the reader's own
            assert (readme.parent / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_a_readme_is_short_and_its_lines_are(readme):
    text = readme.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[0] + text.partition(END)[2]
    assert len(written.splitlines()) <= LONGEST
    prose = [line for line in BLOCK.sub("", written).splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > LONGEST_LINE]


@pytest.mark.parametrize("readme", ["README.md", "tools/README.md"])
def test_every_command_is_listed(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    missing = [task for task in list_tasks() if not re.search(rf"^\|.*`(detkit )?{task}[` ]", text, re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    task, arguments = COMMANDS[command]
    assert task in list_tasks()
    overrides = without_flags(arguments)
    for override in [o for o in overrides if o.startswith("hydra")]:
        group, _, option = override.partition("=")
        assert group.startswith("hydra.") or option in group_options(group)
        overrides.remove(override)
    if "--config-dir" in arguments:  # of the reader, whose options are not here
        overrides = [
            o for o in overrides for g, _, option in [o.partition("=")] if option in (group_options(g) or [option])
        ]
    for job in each_alone(overrides) if "-m" in arguments else [overrides]:
        cfg = compose_config(task, job)
        if not OmegaConf.missing_keys(cfg):
            check_values(resolve(cfg), find_task(task).config)


@pytest.mark.parametrize(
    "command", ["python tools/train.py optim.no_such_key=1", "detkit train model=yolov8z", "detkit trian"]
)
def test_a_wrong_command_is_found(command):
    ((task, arguments),) = find_commands(f"{command}  # a comment")
    with pytest.raises(DetkitError):
        find_task(task)
        compose_config(task, without_flags(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("readme", [readme for readme in READMES if blocks(readme, "python")], ids=name_of)
def test_python_blocks_run(readme, tmp_path):
    """All blocks of a README in a process of their own, but those that begin with ``# needs``."""
    runnable = [code for code in blocks(readme, "python") if not code.startswith("# needs")]
    if not runnable:
        pytest.skip("every block needs data")
    if name_of(readme) == "detkit/README.md":
        runnable.append(COMPOSE_EXAMPLES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(runnable)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
