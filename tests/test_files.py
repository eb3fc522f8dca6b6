"""Other people's files are opened within bounds, and never waited for."""

import os
import time
from pathlib import Path

import pytest

from detkit.errors import DetkitError, is_name, printable, shorten
from detkit.ops.files import cache_dir, open_regular, read_regular, read_yaml


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    start = time.monotonic()
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", tmp_path / "none", f"{tmp_path}/a\0b"):
        with pytest.raises(OSError):
            open_regular(path)
    assert time.monotonic() - start < 30  # a pipe would be waited for without end
    assert read_regular(tmp_path / "file") == b"content"
    with pytest.raises(OSError):
        read_regular(tmp_path / "file", limit=6)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "a: !!python/object:os.system [x]\n",
        "a: &a [*a]\n",
        "[" * 5000,
        "a: &a {<<: *a}\n",
        "&l0 x: 1\n"
        + "l0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"l{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 9)),
        "a: 2001-99-99\n",
        f"a: 0x{'f' * 5000}\n",
        f"{':'.join(['59'] * 3000)}: a\n",
        "? [1, 2]\n: 3\n",
        "names: {0: a, 1: b, 1: c}\n",
    ],
)
def test_a_yaml_file_that_is_no_plain_data_is_refused_by_name(tmp_path, text):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(DetkitError) as error:
        read_yaml(file)
    assert time.monotonic() - start < 30
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 400 + len(str(file))


def test_a_duplicate_key_in_a_yaml_file_is_named_with_its_line(tmp_path):
    (tmp_path / "file.yaml").write_text("names: [a]\ntrain: x\nnames: [b]\n")
    with pytest.raises(DetkitError, match="line 3: the key 'names' is given twice"):
        read_yaml(tmp_path / "file.yaml")
    (tmp_path / "file.yaml").write_text("a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b, x: 3}\n")
    assert read_yaml(tmp_path / "file.yaml")["c"] == {"x": 3, "y": 2}


def test_plain_yaml_is_read_with_its_aliases(tmp_path):
    (tmp_path / "file.yaml").write_bytes("\ufeffa: &x {b: [1, 2.5, ü]}\nc: *x\n".encode())
    assert read_yaml(tmp_path / "file.yaml") == {"a": {"b": [1, 2.5, "ü"]}, "c": {"b": [1, 2.5, "ü"]}}


def test_scalars_under_text_keys_are_text(tmp_path):
    text = "n: [no, 1.0, 2024-01-01, 010, 12:30, 0x10, 1_000, ~, null, '', \"on\", =, <<]\n"
    text += "nc: 1_0\nk: {on: off, 1.0: {y: n}}\nz: ~\ne:\nw: ''\no: 1_0\n"
    (tmp_path / "file.yaml").write_text(text)
    found = read_yaml(tmp_path / "file.yaml", text_keys=("n", "k", "nc", "z", "e", "w"))
    texts = ["no", "1.0", "2024-01-01", "010", "12:30", "0x10", "1_000", "~", "null", "", "on", "=", "<<"]
    assert found == {
        "n": texts,
        "nc": "1_0",
        "k": {"on": "off", "1.0": {"y": "n"}},
        "z": None,
        "e": None,
        "w": "",
        "o": 10,
    }
    (tmp_path / "file.yaml").write_text("a: &a {0: yes, 1: b}\nn: {<<: *a, 2: off}\n")
    assert read_yaml(tmp_path / "file.yaml", text_keys=("n",))["n"] == {"0": "yes", "1": "b", "2": "off"}


def test_values_in_messages_are_cut_and_printable():
    assert shorten("short") == "short"
    assert len(shorten("x" * 10**6)) == 200
    assert len(shorten(list(range(10**6)))) <= 200
    assert len(shorten({str(k): [k] * 100 for k in range(1000)})) <= 200
    assert len(shorten(10**3000)) <= 200
    assert shorten(["a", 1, None]) == "['a', 1, None]"
    assert "\x1b" not in shorten("\x1b[2Jred")
    assert printable("a\x1b[31m\n\ud800ü ") == "a\\x1b[31m\\n\\ud800ü "


def test_there_is_a_cache_folder_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(nobody))
    assert cache_dir().is_absolute()


def test_merged_scalars_under_text_keys_are_text(tmp_path):
    (tmp_path / "file.yaml").write_text("base: &b {names: [no, yes]}\nmore: &m [*b, {nc: 2}]\n<<: *m\n")
    assert read_yaml(tmp_path / "file.yaml", text_keys=("names",))["names"] == ["no", "yes"]


@pytest.mark.parametrize("name", ["cat", "a b", "می\u200cروم", "犬\u3000猫", "\U0001f468\u200d\U0001f469", "a" * 1000])
def test_names_of_all_scripts_are_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", " ", "\u3000", "a\nb", "\x1b[2J", "\udce9", "a\u200bb", "a\u202eb", "a\u2028b", None, 7]
)
def test_what_nobody_sees_is_no_name(name):
    assert not is_name(name)
