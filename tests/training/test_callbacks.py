"""The Trainer of transformers and Lightning train sparse models, and go on from their own checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gossamer.errors import CheckpointError
from gossamer.training.callbacks import STATE_FILE, lightning_callback, transformers_callback
from gossamer.training.rigl import RigL

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def language_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES))


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 30, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **more):
    return TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def train(folder, sequences, resume=None):
    model = language_model()
    callback = transformers_callback(RigL(sparsity=0.8, every=2, end=11))
    Trainer(model, arguments(folder), train_dataset=sequences, callbacks=[callback]).train(resume)
    return model, callback


def test_the_trainer_of_transformers_trains_a_sparse_model_and_resumes_it(tmp_path, sequences):
    whole, callback = train(tmp_path, sequences)
    assert callback.training is None
    assert callback.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert callback.masks.violations(whole) == {}
    assert (tmp_path / "checkpoint-6" / STATE_FILE).exists()
    resumed, again = train(tmp_path, sequences, str(tmp_path / "checkpoint-6"))
    assert again.masks == callback.masks
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_without_masks_is_refused(tmp_path, sequences):
    train(tmp_path, sequences)
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="made without sparse training"):
        train(tmp_path, sequences, str(tmp_path / "checkpoint-6"))


def test_lightning_trains_a_sparse_model_and_resumes_it(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def fit(epochs, checkpoint=None):
        net, callback = Net(), lightning_callback(RigL(sparsity=0.7, every=3, end=30))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[callback],
        )
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        if checkpoint is None:
            trainer.fit(net, loader)
        else:
            trainer.fit(net, loader, ckpt_path=checkpoint)
        return net, callback, trainer

    whole, callback, _ = fit(4)
    assert callback.masks.violations(whole) == {}
    assert callback.masks.sparsity == pytest.approx(0.7, abs=1e-2)

    class Save(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    net, half = Net(), lightning_callback(RigL(sparsity=0.7, every=3, end=30))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[half, Save()],
    )
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=8))
    resumed, again, _ = fit(4, tmp_path / "half.ckpt")
    assert again.masks == callback.masks
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
