import json
import os

import pytest

from deadband.files import replacing, write_json
from deadband.running.text import python_documentation, read_text, token_windows


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "a file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a file"]


def test_a_folder_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert os.listdir(path) == [content]
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert os.listdir(path) == ["second"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_folder_is_never_lost(tmp_path, monkeypatch, error):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "precious").write_text("precious")
    replace = os.replace

    def failing(source, target):
        if str(target) == str(path) and "replaced" not in str(source):
            raise error
        replace(source, target)

    if error is None:  # the block wrote nothing
        with pytest.raises(FileNotFoundError, match="nothing was written"), replacing(path):
            pass
    else:
        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(error), replacing(path) as temporary:
            temporary.mkdir()
    assert os.listdir(path) == ["precious"]
    assert os.listdir(tmp_path) == ["folder"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5, {"b": float("inf")}], 3: (1, None)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5, {"b": None}], "3": [1, None]}


def test_reading_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no text file"):
        read_text(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-16-LE text: it begins with the mark of UTF-16-LE, but .*offset 2"):
        read_text(tmp_path / "binary")
    (tmp_path / "latin").write_bytes("\ufeffcaf".encode() + b"\xe9 noir")
    with pytest.raises(ValueError, match="latin' is not UTF-8 text: .*byte 0xe9 at offset 6: .*iconv"):
        read_text(tmp_path / "latin")
    with pytest.raises(IsADirectoryError, match="is a folder; expected a text file"):
        read_text(tmp_path)
    (tmp_path / "only a mark").write_text("\ufeff", encoding="utf-8")
    with pytest.raises(ValueError, match="is empty"):
        read_text(tmp_path / "only a mark")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    text = "naïve ∂ 𝄞\n\ufeffinside\n"
    (tmp_path / "text").write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode(encoding))
    assert read_text(tmp_path / "text") == text


def characters(text, **options):
    return {"input_ids": [ord(character) for character in text]}


def test_windows():
    text = "abcdefghij" * 30
    batches = token_windows(characters, text, tokens=25, window=10)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[ord(c) for c in "abcdefghij"]]] * 2
    assert all(batch["attention_mask"].all() for batch in batches)
    assert len(token_windows(characters, text, tokens=10**6, window=7)) == 300 // 7
    assert len(token_windows(characters, text, tokens=1, window=10)) == 1
    with pytest.raises(ValueError, match="has 300 tokens, fewer than one window of 301"):
        token_windows(characters, text, tokens=10, window=301)
    with pytest.raises(ValueError, match="window of 2 or more"):
        token_windows(characters, text, tokens=10, window=1)


def test_long_texts_are_tokenised_in_parts_and_only_as_far_as_needed():
    seen = []

    def counting(text, **options):
        seen.append(len(text))
        return characters(text)

    text = "x" * 350_000
    assert len(token_windows(counting, text, tokens=150_000, window=1000)) == 150
    assert sum(seen) == 200_000


def test_the_halves_of_pythons_documentation_are_alike_and_disjoint():
    first, second = python_documentation()
    assert 0.5 < len(first) / len(second) < 2
    assert len(first) > 100_000
    assert first[:2000] not in second
