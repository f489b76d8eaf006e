"""Outputs appear whole or not at all, and refusals say why."""

from __future__ import annotations

import errno
import json
import os

import pytest

from gossamer.errors import OutputError
from gossamer.storage.atomic import atomic_directory, atomic_file, write_json, write_text


class Interrupted(BaseException):
    """Stands for Ctrl-C, which is no Exception either."""


def content(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_with_its_content_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "grüße")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "grüße"
    assert content(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, RuntimeError])
def test_an_interrupted_file_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "a.txt") as part:  # noqa: PT012
        part.write_text("new")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert content(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, RuntimeError])
def test_an_interrupted_directory_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "out") as part:  # noqa: PT012
        (part / "deep").mkdir()
        (part / "deep" / "a").write_text("x")
        raise error
    assert content(tmp_path) == []


def test_a_directory_is_not_there_until_it_is_finished(tmp_path):
    with atomic_directory(tmp_path / "out") as part:
        (part / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert content(tmp_path / "out") == ["a"]
    assert content(tmp_path) == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as part:
        (part / "a").write_text("x")
    assert content(tmp_path / "out") == ["a"]


def test_a_directory_in_use_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="in use"), atomic_directory(tmp_path / "out"):
        pytest.fail("the body must not run")
    assert content(tmp_path / "out") == ["mine"]


def test_a_directory_filled_by_another_meanwhile_is_kept(tmp_path):
    with pytest.raises(OutputError, match="meanwhile"), atomic_directory(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert content(tmp_path / "out") == ["theirs"]
    assert content(tmp_path) == ["out"]


def test_overwriting_replaces_everything(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with atomic_directory(tmp_path / "out", overwrite=True) as part:
        (part / "new").write_text("x")
    assert content(tmp_path / "out") == ["new"]
    assert content(tmp_path) == ["out"]


def test_failing_while_overwriting_keeps_the_old_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert content(tmp_path / "out") == ["old"]
    assert content(tmp_path) == ["out"]


def test_failing_in_the_last_rename_brings_the_old_directory_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    replace = os.replace

    def refuse_the_new_one(source, target):
        if str(source).endswith(".partial") and not os.path.exists(target):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new_one)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(tmp_path / "out", overwrite=True) as part:
        (part / "new").write_text("x")
    assert content(tmp_path / "out") == ["old"]
    assert content(tmp_path) == ["out"]


def test_a_working_directory_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "out" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "below")
    with pytest.raises(OutputError, match="working"), atomic_directory(tmp_path / "out", overwrite=True):
        pytest.fail("the body must not run")


def test_a_link_keeps_pointing_to_the_directory_it_names(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link") as part:
        (part / "a").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == ["a"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_missing_parent_is_named(tmp_path, writer):
    with pytest.raises(OutputError, match="nowhere does not exist"), writer(tmp_path / "nowhere" / "out"):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_parent_without_permission_is_named(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"), writer(tmp_path / "out"):
        pytest.fail("the body must not run")


def test_a_file_does_not_replace_a_directory_nor_the_reverse(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("x")
    with pytest.raises(OutputError, match="is a directory"), atomic_file(tmp_path / "d"):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match="is a file"), atomic_directory(tmp_path / "f", overwrite=True):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_more_than_the_disk_has_is_refused_at_once(tmp_path, writer):
    with pytest.raises(OutputError, match=r"disk is full \(1,000,\S+ bytes are needed, [\d,]+ are free\)"):  # noqa: SIM117
        with writer(tmp_path / "out", needed=10**18):
            pytest.fail("the body must not run")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, writer, error):
    with pytest.raises(OutputError, match="disk is full"), writer(tmp_path / "out"):
        raise error
    assert content(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_device_that_is_really_full_is_reported(tmp_path):
    with pytest.raises(OutputError, match="disk is full"), atomic_file(tmp_path / "out") as part:  # noqa: PT012
        os.symlink("/dev/full", part)
        part.write_text("x")
    assert content(tmp_path) == []


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path / "input that is missing").read_text()


def test_json_is_written_readable_and_refuses_what_json_lacks(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}
    with pytest.raises(OutputError, match="null"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}
