"""GGUF files, turned once into an ordinary Hugging Face directory in the cache.

transformers reads a GGUF file by unpacking every quantised block, which takes from seconds to minutes. The
unpacked weights, the tokenizer and the configuration are therefore kept as safetensors under the checksum of
the file.
"""

from __future__ import annotations

import contextlib
import io
import logging as standard_logging
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn
from transformers.utils import logging

from gossamer.errors import CheckpointError, GossamerError, ModelError
from gossamer.models.packages import cache_directory, cached_folder, file_digest, scratch_folder

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$")
_LAYOUT = "v1"  # of the cached directories; a change of it makes all of them anew


def from_gguf(file: Path) -> Path:
    """Return the directory with the converted content of a GGUF file, converting it the first time.

    Raises
    ------
    CheckpointError
        If it is no GGUF file, or is broken.
    ModelError
        If transformers cannot read this architecture from GGUF.
    OutputError
        If the cache cannot be written.
    """
    if _PART.search(file.name):
        raise ModelError(f"{file} is one of several parts; join them first with 'llama-gguf-split --merge'")
    with open(file, "rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{file} is not a GGUF file (it does not start with 'GGUF'); check the path")
    return converted(file_digest(file), file.name, lambda _: file)


def converted(sha256: str, title: str, provide: Callable[[Path], Path]) -> Path:
    """Return the converted directory of the GGUF file with a known checksum.

    Parameters
    ----------
    sha256
        Checksum of the file, under which the result is kept.
    title
        What to call it in messages.
    provide
        Gives the path of the file; called with a temporary folder only if there is no result yet.
    """
    target = cache_directory() / "models" / f"{sha256[:24]}-{_LAYOUT}"
    if not target.is_dir():
        with cached_folder(target) as folder, scratch_folder(target.parent) as scratch:
            _convert(provide(Path(scratch)), title, folder)
    return target


def clear_quantised_mark(model: Any) -> None:
    """Let a model that was read from GGUF be saved.

    transformers marks it as quantised, although its weights are plain floating-point numbers by now, and then
    refuses ``save_pretrained`` and ``half()``. Marks of real quantisation stay.
    """
    method = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) != "gguf":
        return
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars and notes of transformers and accelerate off the screen; ours say what happens."""
    accelerate = standard_logging.getLogger("accelerate")
    level, bars, accelerate_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), accelerate.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    accelerate.setLevel(standard_logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        accelerate.setLevel(accelerate_level)
        if bars:
            logging.enable_progress_bar()


def _convert(gguf: Path, title: str, folder: Path) -> None:
    # bound to today's standard error, which is hidden from transformers below
    console = Console(file=sys.stderr)
    message = f"converting {title} to safetensors (once, up to a minute or two)"
    if not console.is_terminal:
        console.print(f"{message} …", highlight=False)
    # the unpacking loop of transformers draws a bar of its own straight on standard error
    with console.status(message), contextlib.redirect_stderr(io.StringIO()), quiet_transformers():
        model, tokenizer = _read(gguf, title)
        if _fits_bfloat16(model):
            model.to(torch.bfloat16)
        clear_quantised_mark(model)
        model.config._name_or_path = title
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _read(gguf: Path, title: str) -> tuple[Any, Any]:
    options: dict[str, Any] = {"gguf_file": gguf.name}
    # newer versions of transformers could otherwise leave the weights in their quantised blocks
    unpack = getattr(transformers, "GgufConfig", None)
    plain = {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    try:
        tokenizer = None
        if _has_tokenizer(gguf):
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options, **plain)
    except GossamerError:
        raise
    except Exception as error:  # whatever the readers of many formats raise on a file that they do not understand
        reason = " ".join(str(error).split()) or type(error).__name__
        if "not supported" in reason:
            raise ModelError(f"{title}: transformers cannot read it from GGUF ({reason}); use safetensors") from error
        raise CheckpointError(f"{title} cannot be read ({reason}); it may be truncated, fetch it again") from error
    return model, tokenizer


def _has_tokenizer(gguf: Path) -> bool:
    # the name of the field stands in the header as it is; a parser takes seconds to walk a large vocabulary
    with open(gguf, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"tokenizer.ggml.tokens") >= 0


def _fits_bfloat16(model: nn.Module) -> bool:
    """Whether bfloat16 holds every weight exactly; dequantised blocks usually need more digits."""
    return all(torch.equal(p, p.to(torch.bfloat16).to(p.dtype)) for p in model.parameters())
