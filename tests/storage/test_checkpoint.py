"""A checkpoint comes back bit for bit, and whatever was done to its bytes is noticed before it is decoded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError, OutputError, UnknownNameError
from gossamer.storage import (
    CheckpointWriter,
    atomic_directory,
    is_checkpoint,
    read_index,
    read_model_state,
    read_packed,
    read_tensor,
    size_report,
    verify,
)
from gossamer.storage import shards as shards_module


def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(24, 32, generator=generator).bfloat16()
    half[torch.rand(half.shape, generator=generator) < 0.5] = 0
    grouped = torch.randn(16, 32, generator=generator)
    grouped[~NM(2, 4).select(grouped.abs())] = 0
    return {
        "half.weight": half,
        "grouped.weight": grouped,
        "norm.weight": torch.ones(32),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def write(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1100) -> Path:
    with atomic_directory(directory) as part:
        writer = CheckpointWriter(part, max_shard_bytes)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.add_alias("head.weight", of="half.weight")
        writer.finish({"method": "wanda", "sparsity": 0.5})
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model", example())


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def change_index(directory: Path, change) -> None:
    """Edit the index and give it a valid checksum, as a careful forger would."""
    path = directory / "gossamer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    content["checksum"] = "0" * 64
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("0" * 64, digest, 1), encoding="utf-8")


def change_shard(directory: Path, name: str, change) -> None:
    """Edit the tensors of the shard of `name`, and make sizes and checksums valid again."""
    shard = read_index(directory).tensors[name].shard
    tensors = {key: tensor.clone() for key, tensor in load_file(directory / shard).items()}
    change(tensors)
    save_file(tensors, directory / shard)
    data = (directory / shard).read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_index(directory, lambda content: content["shards"].__setitem__(shard, entry))


def assert_refused(directory: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        verify(directory)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=words):
        list(read_model_state(directory))


# ------------------------------------------------------------------------------------------- what is right
def test_every_tensor_comes_back_bit_for_bit(original):
    expected = example()
    state = dict(read_model_state(original))
    assert set(state) == {*expected, "head.weight"}
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
        assert torch.equal(read_tensor(original, name), tensor)
    assert state["head.weight"] is state["half.weight"]
    assert torch.equal(read_tensor(original, "head.weight"), expected["half.weight"])


def test_kinds_follow_the_zeros(original):
    entries = verify(original).tensors
    kinds = {name: (entry.kind, entry.pattern) for name, entry in entries.items()}
    assert kinds == {
        "half.weight": ("bitmask", None),
        "grouped.weight": ("nm", NM(2, 4)),
        "norm.weight": ("dense", None),
        "steps": ("dense", None),
        "empty": ("dense", None),
    }
    assert read_packed(original, "grouped.weight").parts["codes"].numel() == 16 * 8 * 3 // 8


def test_shards_are_named_by_their_final_number(original):
    names = sorted(path.name for path in original.iterdir())
    assert names == [
        "gossamer.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_settings_and_totals_are_kept(original):
    index = read_index(original)
    expected = example().values()
    assert index.settings == {"method": "wanda", "sparsity": 0.5}
    assert index.totals["elements"] == sum(t.numel() for t in expected)
    assert index.totals["nonzeros"] == sum(int(t.count_nonzero()) for t in expected)
    assert index.totals["dense_bytes"] == sum(t.numel() * t.element_size() for t in expected)


def test_the_size_report_counts_the_bytes_on_disk(original):
    report = size_report(original)
    for name, size in report.tensors.items():
        assert size.packed_bytes == read_packed(original, name).nbytes
    assert report.packed_bytes == sum(size.packed_bytes for size in report.tensors.values())
    assert report.file_bytes == sum(path.stat().st_size for path in original.iterdir())
    assert report.tensors["grouped.weight"].sparsity == 0.5


def test_dense_tensors_keep_their_plain_names_for_other_readers(original):
    shard = original / read_index(original).tensors["norm.weight"].shard
    with safe_open(shard, framework="pt") as file:
        assert torch.equal(file.get_tensor("norm.weight"), torch.ones(32))


def test_what_was_read_does_not_depend_on_the_files_any_more(checkpoint):
    state = dict(read_model_state(checkpoint))
    for path in checkpoint.glob("*.safetensors"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(state[name], tensor) for name, tensor in example().items())


def test_the_writer_never_holds_more_than_one_shard(tmp_path, monkeypatch):
    sizes = []
    save = shards_module.save_file
    monkeypatch.setattr(
        shards_module,
        "save_file",
        lambda t, *a, **k: (sizes.append(sum(x.nbytes for x in t.values())), save(t, *a, **k)),
    )
    writer = CheckpointWriter(tmp_path, max_shard_bytes=1000)
    for number in range(40):
        writer.add(f"layer.{number}", torch.ones(30))
        assert writer.pending_bytes <= 1000
        assert len(sizes) == number // 8
    index = writer.finish()
    assert sizes == [960] * 5
    assert len(index.shards) == 5
    assert len(dict(read_model_state(tmp_path))) == 40


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    writer = CheckpointWriter(tmp_path, max_shard_bytes=100)
    for name, size in (("small", 4), ("large", 1000), ("last", 4)):
        writer.add(name, torch.ones(size))
    assert len(writer.finish().shards) == 3


def test_a_model_without_tensors_is_a_checkpoint_too(tmp_path):
    CheckpointWriter(tmp_path).finish()
    assert verify(tmp_path).names == []
    assert size_report(tmp_path).ratio == 1


def test_it_is_no_checkpoint_before_it_is_finished(tmp_path):
    writer = CheckpointWriter(tmp_path, max_shard_bytes=8)
    writer.add("a", torch.ones(4))
    writer.add("b", torch.ones(4))
    assert not is_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_index(tmp_path)
    writer.finish()
    assert is_checkpoint(tmp_path)
    with pytest.raises(ConfigurationError, match="already holds"):
        CheckpointWriter(tmp_path)


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "model") as part:  # noqa: PT012
        writer = CheckpointWriter(part, max_shard_bytes=8)
        writer.add("a", torch.ones(4))
        writer.add("b", torch.ones(4))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_the_second_shard_leaves_nothing(tmp_path, monkeypatch):
    save, calls = shards_module.save_file, []

    def fill_up(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(shards_module, "save_file", fill_up)
    with pytest.raises(OutputError, match=r"disk is full \([\d,]+ bytes are needed, [\d,]+ are free\)"):
        write(tmp_path / "model", example())
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_names_are_used_once(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.add("a", torch.zeros(64), kind="bitmask")
    for add in (lambda: writer.add("a", torch.ones(1)), lambda: writer.add_alias("a", "a")):
        with pytest.raises(ConfigurationError, match="'a' was added before"):
            add()
    with pytest.raises(ConfigurationError, match="'a:bits' is stored twice"):
        writer.add("a:bits", torch.ones(1))
    with pytest.raises(UnknownNameError, match="'b'"):
        writer.add_alias("c", "b")
    with pytest.raises(ConfigurationError, match="x: dtype"):
        writer.add("x", torch.zeros(1, dtype=torch.complex128))


def test_settings_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="settings"):
        CheckpointWriter(tmp_path).finish({"x": float("nan")})


def test_an_unknown_tensor_gets_the_nearest_name(original):
    with pytest.raises(UnknownNameError, match=r"did you mean 'half\.weight'"):
        read_tensor(original, "half.weigth")


# ------------------------------------------------------------------------------------------- what is damaged
@pytest.mark.parametrize("fraction", [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("number", range(4))
def test_a_truncated_file_is_refused(checkpoint, number, fraction):
    path = sorted(checkpoint.iterdir())[number]
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    assert_refused(checkpoint, path.name)


@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_in_any_file_is_refused(checkpoint, number, place, bit):
    path = sorted(checkpoint.iterdir())[number]
    before = path.read_bytes()
    changed = bytearray(before)
    changed[int(place * len(changed))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        with pytest.raises(CheckpointError):
            verify(checkpoint)
        with pytest.raises(CheckpointError):
            next(read_model_state(checkpoint))
    finally:
        path.write_bytes(before)


def test_appended_bytes_are_refused(checkpoint):
    path = checkpoint / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert_refused(checkpoint, "bytes instead of")


def test_swapped_shards_are_refused(checkpoint):
    first, second = (checkpoint / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert_refused(checkpoint, first.name)


def test_shards_swapped_together_with_their_checksums_are_refused(checkpoint):
    first, second = (checkpoint / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])

    def swap(content):
        shards = content["shards"]
        shards[first.name], shards[second.name] = shards[second.name], shards[first.name]

    change_index(checkpoint, swap)
    assert_refused(checkpoint, "does not hold what")


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    assert_refused(checkpoint, r"model-00002-of-00003\.safetensors is missing")


def test_a_missing_index_is_named(tmp_path):
    assert_refused(tmp_path, r"gossamer\.json cannot be read")


def test_a_later_version_asks_for_an_upgrade(checkpoint):
    change_index(checkpoint, lambda content: content.update(version=2))
    assert_refused(checkpoint, "version 2 .* upgrade gossamer")


def _tensor(name, **fields):
    return lambda content: content["tensors"][name].update(fields)


def _escape(content):
    content["shards"]["../../secret.safetensors"] = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format="zip"), "format"),
        (lambda content: content.update(version="1"), "version is '1'"),
        (lambda content: content.pop("settings"), "settings is None"),
        (lambda content: content.update(shards=[]), "shards"),
        (lambda content: content["totals"].update(nonzeros=1), r"totals\.nonzeros is 1"),
        (_escape, "shard name '../../secret.safetensors'"),
        (_tensor("norm.weight", shard="../x"), "not listed"),
        (_tensor("norm.weight", kind="zip"), "kind is 'zip'"),
        (_tensor("norm.weight", dtype="float17"), "dtype is 'float17'"),
        (_tensor("norm.weight", shape=[-1]), "shape is"),
        (_tensor("norm.weight", shape=[True]), "shape is"),
        (_tensor("norm.weight", nonzeros=33), "allowed are 0 to 32"),
        (_tensor("grouped.weight", m=1), "1 <= n <= m"),
        (_tensor("grouped.weight", dim=2), "dimension 2"),
        (_tensor("grouped.weight", n=None), "n is None"),
        (_tensor("head.weight", of="nothing"), "'nothing', which is not stored"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(checkpoint, change, words):
    change_index(checkpoint, change)
    assert_refused(checkpoint, words)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_an_index_that_is_no_json_object_is_refused(checkpoint, data):
    (checkpoint / "gossamer.json").write_bytes(data)
    assert_refused(checkpoint, "broken")


def _set(key, index, value):
    return lambda tensors: tensors[key].__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("half.weight", _set("half.weight:bits", 0, 255), "'half.weight' .* the mask keeps"),
        ("half.weight", _set("half.weight:values", 0, 0), "non-zeros"),
        ("half.weight", lambda t: t.update({"half.weight:values": t["half.weight:values"][:-1]}), "values are stored"),
        ("half.weight", lambda t: t.update({"half.weight:values": t["half.weight:values"].float()}), "float32"),
        ("grouped.weight", _set("grouped.weight:codes", 0, 0b111), "code 7 is out of range"),
        ("grouped.weight", lambda t: t.update({"grouped.weight:codes": t["grouped.weight:codes"][:-1]}), "code bytes"),
        ("norm.weight", lambda t: t.update({"norm.weight": torch.ones(2, 16)}), "shape"),
        ("norm.weight", lambda t: t.update({"more": torch.ones(1)}), "first difference: 'more'"),
        ("norm.weight", lambda t: t.pop("norm.weight"), r"first difference: 'norm\.weight'"),
    ],
)
def test_parts_that_contradict_the_index_are_refused_even_with_valid_checksums(checkpoint, name, change, words):
    change_shard(checkpoint, name, change)
    assert_refused(checkpoint, words)


def test_counts_are_checked_without_checksums_too(checkpoint):
    change_shard(checkpoint, "half.weight", _set("half.weight:bits", 0, 255))
    with pytest.raises(CheckpointError, match="the mask keeps"):
        list(read_model_state(checkpoint, verify=False))
    with pytest.raises(CheckpointError, match="the mask keeps"):
        read_tensor(checkpoint, "half.weight", verify=False)


def test_one_tensor_needs_only_its_own_shard(checkpoint):
    shard = read_index(checkpoint).tensors["half.weight"].shard
    for path in checkpoint.glob("*.safetensors"):
        if path.name != shard:
            path.unlink()
    assert torch.equal(read_tensor(checkpoint, "half.weight"), example()["half.weight"])
