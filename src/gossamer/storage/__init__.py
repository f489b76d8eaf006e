"""How zeros are kept: packed tensors, checkpoints whose every byte is checked, outputs that appear whole or not."""

from gossamer.storage.atomic import atomic_directory, atomic_file, write_json, write_text
from gossamer.storage.checkpoint import (
    CheckpointWriter,
    is_checkpoint,
    read_model_state,
    read_packed,
    read_tensor,
    size_report,
    verify,
)
from gossamer.storage.index import Index, TensorEntry, read_index
from gossamer.storage.masks import load_masks, save_masks
from gossamer.storage.models import export_dense, load_state, save
from gossamer.storage.packing import PackedTensor, encode

__all__ = [
    "CheckpointWriter",
    "Index",
    "PackedTensor",
    "TensorEntry",
    "atomic_directory",
    "atomic_file",
    "encode",
    "export_dense",
    "is_checkpoint",
    "load_masks",
    "load_state",
    "read_index",
    "read_model_state",
    "read_packed",
    "read_tensor",
    "save",
    "save_masks",
    "size_report",
    "verify",
    "write_json",
    "write_text",
]
