import json
import random

import pytest

from detkit.data.formats import json_stream
from detkit.data.formats.json_stream import read_records
from detkit.errors import DetkitError


def random_value(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(4))}
    return [None, rng.random() * 10 ** rng.randrange(-5, 9), rng.randrange(10**9), 'text "} ]\n ü\\', True][kind]


@pytest.mark.parametrize("chunk", [1, 7, 100, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_are_those_of_the_whole_file(tmp_path, monkeypatch, chunk, indent):
    """Wherever the windows of text end, within numbers and strings too."""
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    rng = random.Random(chunk)
    content = {
        "info": random_value(rng),
        "images": [random_value(rng) for _ in range(20)],
        "n": 12,
        "annotations": [random_value(rng) for _ in range(20)],
    }
    file = tmp_path / "a.json"
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    file.write_text(text)
    seen = {"images": [], "annotations": []}
    for key, position, line, record in read_records(file, ("images", "annotations")):
        if position >= 0:
            assert position == len(seen[key])
            assert indent is None or line <= len(text.splitlines())
            seen[key].append(record)
    assert seen == {key: content[key] for key in seen}


def test_a_record_s_line_is_where_it_begins(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"images": [\n\n {"a":\n 1},\n {"a": 2}, {"a": 3}\n]}')
    assert [line for _, position, line, _ in read_records(file, ("images",)) if position >= 0] == [3, 5, 5]


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_file_cut_off_anywhere_is_one_error_message(tmp_path, cut):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": [{"a": 1, "b": "text"}, {"a": [1, 2.5]}], "c": {"d": None}, "z": 1})[:cut])
    with pytest.raises(DetkitError, match=r"a\.json is (malformed json, line 1 column \d+|not a COCO)"):
        list(read_records(file, ("images",)))
