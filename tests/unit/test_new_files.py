"""What is written replaces nothing, whoever else writes at the same moment."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hydit_core.errors import ConfigError
from hydit_core.new_files import check_name, remove_folder, replacing, unfinished, write_new


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["links", "no links", "no such call"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with hard links and without; platforms that do not know them."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)
    elif request.param == "no such call":
        monkeypatch.delattr(os, "link")


@pytest.mark.usefixtures("links")
def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    written = [write_new(tmp_path / "new" / "a.png", bytes([number])) for number in range(3)]
    assert [path.name for path in written] == ["a.png", "a-2.png", "a-3.png"]
    assert [path.read_bytes() for path in written] == [b"\0", b"\1", b"\2"]
    assert names(tmp_path / "new") == {"a.png", "a-2.png", "a-3.png"}


@pytest.mark.usefixtures("links")
def test_at_the_same_moment(tmp_path: Path) -> None:
    contents = [f"picture {number}".encode() for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda c: write_new(tmp_path / "a.png", c, {".txt": c + b"!"}), contents))
    assert len(set(written)) == 24
    for path, content in zip(written, contents, strict=True):
        assert path.read_bytes() == content and path.with_suffix(".txt").read_bytes() == content + b"!"
    assert len(names(tmp_path)) == 48


@pytest.mark.usefixtures("links")
def test_what_lies_beside_a_file_is_not_replaced_either(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "a-2.png").symlink_to(tmp_path / "nothing")
    assert write_new(tmp_path / "a.png", b"picture", {".txt": b"caption"}).name == "a-3.png"
    assert (tmp_path / "a.txt").read_text() == "mine" and (tmp_path / "a-3.txt").read_bytes() == b"caption"
    assert names(tmp_path) == {"a.txt", "a-2.png", "a-3.png", "a-3.txt"}


def test_only_when_asked(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_text("old")
    assert write_new(tmp_path / "a.png", b"new", {".txt": b"also"}, overwrite=True) == tmp_path / "a.png"
    assert (tmp_path / "a.png").read_bytes() == b"new" and (tmp_path / "a.txt").read_bytes() == b"also"
    assert names(tmp_path) == {"a.png", "a.txt"}


def test_the_same_again_is_left(tmp_path: Path) -> None:
    first = write_new(tmp_path / "a.png", b"same")
    before = first.stat().st_mtime_ns
    assert write_new(tmp_path / "a.png", b"same", keep_same=True) == first
    assert first.stat().st_mtime_ns == before
    assert write_new(tmp_path / "a.png", b"other", keep_same=True).name == "a-2.png"
    assert write_new(tmp_path / "a.png", b"other", keep_same=True).name == "a-2.png"


def test_a_new_file_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    written = write_new(tmp_path / "a.png", b"x")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    longest = "n" * 251 + ".png"
    check_name(tmp_path / longest)
    assert write_new(tmp_path / longest, b"x").name == longest
    for name in ("n" * 252 + ".png", "图" * 85 + ".png"):
        with pytest.raises(ConfigError, match=r"cannot write .*: File name too long"):
            check_name(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot write"):
        write_new(tmp_path / ("n" * 252 + ".png"), b"x")
    assert names(tmp_path) == {longest}


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*a\.png"):
        write_new(tmp_path / "file" / "a.png", b"x")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        check_name(tmp_path / "a\0.png")


# -- folders that take the place of older ones --------------------------------------------------------------


def fill(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "a").write_text(text)


def test_a_folder_is_replaced_only_when_that_is_meant(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replacing(tmp_path / "out", folder=True) as temporary:
            fill(temporary, text)
            assert text == "old" or (tmp_path / "out" / "a").read_text() == "old"
    assert (tmp_path / "out" / "a").read_text() == "new" and names(tmp_path) == {"out"}
    with pytest.raises(OSError, match="not empty"), replacing(tmp_path / "out") as temporary:
        fill(temporary, "newer")
    assert (tmp_path / "out" / "a").read_text() == "new" and names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), KeyboardInterrupt()], ids=["denied", "Ctrl-C"]
)
def test_a_folder_that_cannot_be_replaced_comes_back(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two renames fails."""
    fill(tmp_path / "out", "old")
    original, calls = os.replace, []

    def fails_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise error
        original(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(type(error)), replacing(tmp_path / "out", folder=True) as temporary:
        fill(temporary, "new")
    assert (tmp_path / "out" / "a").read_text() == "old" and names(tmp_path) == {"out"}


def test_a_folder_is_removed_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)  # killed meanwhile
        remove_folder(tmp_path / "out")
    (left,) = unfinished(tmp_path, "out")
    assert names(tmp_path) == {left.name} and not unfinished(tmp_path, "other")
    remove_folder(left)
    remove_folder(tmp_path / "absent")
    assert not names(tmp_path)
