"""Peers for sparse features, in a process and an environment of their own.

``pip install sae-lens dictionary-learning spams-bin`` into a fresh virtual environment, and give its
interpreter to a benchmark with ``--peer-python``. Run by that interpreter this file is the other end: it answers
requests, a line of JSON each, and imports nothing of gossamer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peer import Peer

LIBRARIES = ("sae-lens", "dictionary_learning")


def installed(python: Path | None) -> bool:
    """Whether an interpreter has the libraries; says so if it has not."""
    look = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    names = ("sae_lens", "dictionary_learning", "spams")
    if python is not None and subprocess.run([str(python), "-c", look, *names], check=False).returncode == 0:
        return True
    print("no --peer-python with sae-lens, dictionary-learning and spams-bin: they are left out")
    return False


class FeaturePeer(Peer):
    """Libraries of sparse features on the same numbers.

    Parameters
    ----------
    python
        Interpreter of the environment in which they are installed.
    threads
        That they may use.
    """

    def __init__(self, python: Path, threads: int):
        super().__init__(python, __file__, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)})
        self.versions: dict[str, str] = self.ask(threads=threads)["versions"]

    def autoencoder(
        self, library: str, size: int, features: int, k: int, batch: int, steps: int = 1000, rate: float = 3e-4
    ) -> None:
        """Make a TopK autoencoder with the trainer of a library."""
        shape = {"size": size, "features": features, "k": k}
        self.ask(do="autoencoder", library=library, batch=batch, steps=steps, rate=rate, **shape)

    def load(self, **files: Path) -> None:
        """Read arrays by name."""
        self.ask(do="load", files={name: str(file) for name, file in files.items()})

    def run(self, what: str, **options: Any) -> dict[str, Any]:
        """Do one thing and return what is known of it, with its ``seconds``."""
        return self.ask(do=what, **options)


def _sae_lens(request: dict[str, Any]) -> tuple[Callable[[Any], Any], Any]:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = TopKTrainingSAEConfig(
        d_in=request["size"], d_sae=request["features"], k=request["k"], dtype="float32", device="cpu"
    )
    sae = TopKTrainingSAE(config)
    samples = request["steps"] * request["batch"]
    settings = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=request["batch"],
        lr=request["rate"],
        lr_end=request["rate"] / 10,
        lr_warm_up_steps=request["steps"] // 100,
        lr_decay_steps=request["steps"] // 5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))

    def step(x: Any) -> float:
        trainer.n_training_samples += len(x)
        found = trainer._train_step(sae=sae, sae_in=x)
        trainer.n_training_steps += 1
        return float(found.loss)

    return step, sae


def _dictionary_learning(request: dict[str, Any]) -> tuple[Callable[[Any], Any], Any]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=max(request["steps"], 2000),
        activation_dim=request["size"],
        dict_size=request["features"],
        k=request["k"],
        layer=0,
        lm_name="none",
        device="cpu",
        seed=0,
    )
    numbers = iter(range(1, 1 << 30))  # at step 0 a geometric median is sought, which is no step like the others
    return lambda x: trainer.update(next(numbers), x), trainer.ae


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print to the standard output
    from importlib import metadata

    import numpy
    import torch

    torch.set_num_threads(json.loads(sys.stdin.readline())["threads"])
    names = ("sae-lens", "dictionary-learning", "spams-bin", "torch")
    versions = {name: metadata.version(name) for name in names}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    arrays: dict[str, Any] = {}
    made: dict[str, Any] = {}
    steps: dict[str, Any] = {}

    def autoencoder(request: dict[str, Any]) -> dict[str, Any]:
        make = {"sae-lens": _sae_lens, "dictionary_learning": _dictionary_learning}[request["library"]]
        steps[request["library"]], made[request["library"]] = make(request)
        return {}

    def load(request: dict[str, Any]) -> dict[str, Any]:
        arrays.update({name: torch.from_numpy(numpy.load(file)) for name, file in request["files"].items()})
        return {}

    def train(request: dict[str, Any]) -> dict[str, Any]:
        return {"loss": steps[request["library"]](arrays[request["x"]])}

    @torch.no_grad()
    def reconstruct(request: dict[str, Any]) -> dict[str, Any]:
        sae = made[request["library"]]
        sae.decode(sae.encode(arrays["x"]))
        return {}

    def fit(request: dict[str, Any]) -> dict[str, Any]:
        """Train on rows of the array x in a given order, batch after batch; then write what is made of `held`."""
        order, x = arrays["order"].long(), arrays["x"]
        for first in range(0, len(order), request["batch"]):
            steps[request["library"]](x[order[first : first + request["batch"]]])
        with torch.no_grad():
            sae = made[request["library"]].eval()
            found = torch.cat([sae(part) for part in arrays["held"].split(2048)])
        numpy.save(request["target"], found.numpy())
        if request["library"] == "sae-lens":
            sae.save_inference_model(request["save_to"])
        return {}

    @torch.no_grad()
    def pursue(request: dict[str, Any]) -> dict[str, Any]:
        from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

        x, dictionary, k = arrays["signals"], arrays["dictionary"], request["k"]
        codes = _encode_matching_pursuit(x, dictionary, 0.0, max_iterations=k, stop_on_duplicate_support=False)
        if request.get("target"):
            numpy.save(request["target"], (codes @ dictionary).numpy())
        return {}

    def orthogonal(request: dict[str, Any]) -> dict[str, Any]:
        import spams

        x = numpy.asfortranarray(arrays["signals"].numpy().T)
        dictionary = numpy.asfortranarray(arrays["dictionary"].numpy().T)
        codes = spams.omp(x, dictionary, L=request["k"], eps=0.0, numThreads=request["threads"])
        if request.get("target"):
            numpy.save(request["target"], (codes.T @ dictionary.T))
        return {}

    work = {
        "autoencoder": autoencoder,
        "load": load,
        "train": train,
        "reconstruct": reconstruct,
        "fit": fit,
        "pursue": pursue,
        "orthogonal": orthogonal,
    }
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        answer = work[request["do"]](request)
        print(json.dumps({**answer, "seconds": time.perf_counter() - begin}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
