"""Generate the tables of keys in ``configs/README.md`` from the schema and the YAML files.

``python -m detkit.config_docs`` rewrites the block between the two markers; a test compares it with ``render()``.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic.fields import FieldInfo

from detkit.config.check import allowed_values, section_of
from detkit.config.common import CommonConfig, TrainConfig
from detkit.config.compose import compose_config, config_dir
from detkit.config.fields import MOST
from detkit.config.schema import Section
from detkit.tasks import find_task, list_tasks

BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
PARTS = ("model", "backbone", "neck", "head", "loss")
GROUPS = ("data", "augment", "optim", "trainer")
FORMATS = ("coco", "yolo", "voc", "webdataset")
LONGEST = 40  # characters of a default value in a table
MISSING = "???"  # OmegaConf's marker of a mandatory value
PRESET = "${oc.select:data.preset."  # prefix of values that data.preset may replace
REQUIRED, UNSET = "required", "unset"


class Row(NamedTuple):
    """The table row of a key: dotted name, default, allowed values and meaning."""

    key: str
    default: str
    allowed: str
    meaning: str


def render() -> str:
    """Return the tables, without the markers."""
    cfg = compose_config("train", ["data=coco", "data.root=."])
    train = [Row(f"`{row.key}`", *row[1:]) for row in _rows(TrainConfig, cfg)]
    names = {row.key.strip("`"): row for row in train}
    common = [names[name] for name in CommonConfig.model_fields]
    own = [row for name, row in names.items() if "." not in name and name not in CommonConfig.model_fields]
    tables = [("Keys of every command", common), ("`train` (and every trial of `tune`)", own)]
    for group in GROUPS:
        rows = [row for name, row in names.items() if name.startswith(f"{group}.")]
        tables.append((f"`{group}`", list(_with_formats(rows)) if group == "data" else rows))
    tables.append(("`model` and the parts", [row for name, row in names.items() if name.partition(".")[0] in PARTS]))
    blocks = [_table(title, ("key", "default", "allowed", "meaning"), rows) for title, rows in tables]
    blocks.append(_table("The other commands", ("command", "key", "default", "allowed", "meaning"), _other_commands()))
    return "\n".join(blocks)


def update(path: Path) -> None:
    """Rewrite the block between the markers of a README.

    Raises:
        ValueError: a marker is missing.
    """
    text = path.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(f"{text[:start]}\n{render()}{text[end:]}", encoding="utf-8")


def _rows(section: type[Section], cfg: DictConfig, prefix: str = "") -> Iterator[Row]:
    """Yield a row for each key of a section and its nested sections."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if nested := section_of(field):
            yield from _rows(nested, cfg, f"{key}.")
        else:
            yield Row(key, _default(key, cfg), _allowed(field), field.description or "")


def _default(key: str, cfg: DictConfig) -> str:
    """Return the default of a key in the YAML files; a star marks those that ``data.preset`` may replace."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return UNSET
        node = node[name]
    if node == MISSING:
        return REQUIRED
    is_preset = isinstance(node, str) and node.startswith(PRESET)
    value = OmegaConf.select(cfg, key)
    text = _as_yaml(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
    if len(text) > LONGEST:
        return "see the file"
    return f"`{text}` \\*" if is_preset else f"`{text}`"


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _allowed(field: FieldInfo) -> str:
    allowed, extra = allowed_values(field), field.json_schema_extra
    most = extra.get("most") if isinstance(extra, dict) else None
    return f"{allowed} (at most {most:,})" if isinstance(most, (int, float)) and most != MOST else allowed


def _with_formats(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of the group ``data``, whose defaults depend on the format."""
    files = {name: yaml.safe_load((config_dir() / "data" / f"{name}.yaml").read_text()) for name in FORMATS}
    for row in rows:
        name = row.key.strip("`").removeprefix("data.")
        holders = [form for form in FORMATS if name in files[form]]
        if not holders or "." in name:
            yield row
        elif name == "name":
            yield row._replace(default="set by `data=`")
        else:
            value = files[holders[0]][name]
            default = REQUIRED if value == MISSING else f"`{_as_yaml(value)}`"
            yield row._replace(default=f"{default} ({', '.join(holders)})")


def _other_commands() -> list[tuple[str, ...]]:
    """Return the rows of keys that ``train`` does not have, each prefixed with its commands."""
    commands: dict[Row, list[str]] = {}
    for task in list_tasks():
        schema = find_task(task).config
        is_training = issubclass(schema, TrainConfig)
        known = {*CommonConfig.model_fields, *(TrainConfig.model_fields if is_training else ())}
        cfg = compose_config(task)
        for name, field in schema.model_fields.items():
            if name in known:
                continue
            if not (nested := section_of(field)):
                rows = [Row(name, _default(name, cfg), _allowed(field), field.description or "")]
            elif field.description:
                rows = [Row(name, UNSET, f"an option of `configs/{name}/`", field.description)]
            else:
                rows = [] if name in (*PARTS, *GROUPS) else [*_rows(nested, cfg, f"{name}.")]
            for row in rows:
                commands.setdefault(row, []).append(task)
    return [(", ".join(f"`{task}`" for task in tasks), f"`{row.key}`", *row[1:]) for row, tasks in commands.items()]


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return f"### {title}\n\n" + "\n".join(cells) + "\n"


if __name__ == "__main__":
    update(config_dir() / "README.md")
