"""Models with an edit in one place, and what an autoencoder there costs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError, ModelError, UnknownNameError
from gossamer.features.activation_rules import GradientTopK, ReLU, TopK
from gossamer.features.sae import SAE
from gossamer.features.splicing import edited, evaluate_splice, evaluate_splices


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 97, (length,), generator=generator) for length in (20, 33, 2)]


class Through(SAE):
    """Explains every activation perfectly: each number and its negative is a feature."""

    def __init__(self, size):
        super().__init__(size, 2 * size, ReLU())
        with torch.no_grad():
            both = torch.cat([torch.eye(size), -torch.eye(size)])
            self.encoder.copy_(both)
            self.decoder.copy_(both)


def test_an_edit_acts_inside_only_and_from_its_token_on(tiny_llama):
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tiny_llama(ids).logits
        with edited(tiny_llama, 1, lambda x: x + 1, skip_first=4):
            inside = tiny_llama(ids).logits
        assert inside[:, :4].allclose(before[:, :4], atol=1e-5)
        assert not inside[:, 4:].allclose(before[:, 4:], atol=1e-3)
        assert tiny_llama(ids).logits.equal(before)


def test_a_perfect_autoencoder_loses_nothing(tiny_llama, documents):
    report = evaluate_splice(tiny_llama, 1, Through(48).eval(), documents, progress=False)
    assert report.spliced == pytest.approx(report.dense, abs=1e-5)
    assert report.divergence == pytest.approx(0, abs=1e-6)
    assert report.unexplained == pytest.approx(0, abs=1e-9)
    assert report.recovered == pytest.approx(1, abs=1e-3)
    assert report.active == pytest.approx(48, abs=1)
    assert report.tokens == 19 + 32


def test_losses_are_those_of_the_model_with_the_reconstruction_in_it(tiny_llama, documents):
    sae = SAE(48, 96, TopK(3)).eval()
    report = evaluate_splice(tiny_llama, 1, sae, documents, progress=False)
    losses, errors, centred = [], [], []
    layer = tiny_llama.model.layers[1]
    for text in documents[:2]:
        kept = []

        def replace(module, args, output, kept=kept):
            x = output[0] if isinstance(output, tuple) else output
            kept.append(x)
            return torch.cat([x[:, :1], sae(x).output[:, 1:]], 1)

        handle = layer.register_forward_hook(replace)
        with torch.no_grad():
            logits = tiny_llama(text[None]).logits[0, :-1]
        handle.remove()
        losses.append(nn.functional.cross_entropy(logits, text[1:], reduction="none"))
        x = kept[0][0, 1:]
        errors.append((sae(x).output - x).square().sum())
        centred.append(x)
    torch.testing.assert_close(torch.tensor(report.spliced), torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)
    rows = torch.cat(centred)
    expected = sum(errors) / (rows - rows.mean(0)).square().sum()
    torch.testing.assert_close(torch.tensor(report.unexplained), expected.detach(), rtol=1e-4, atol=1e-6)
    assert report.to_dict()["recovered"] == report.recovered
    assert report.active <= 3


def test_a_reconstruction_is_compared_with_the_mean_or_with_nothing(tiny_llama, documents):
    sae = SAE(48, 96, TopK(3)).eval()
    by_mean, by_zero = (
        evaluate_splice(tiny_llama, 1, sae, documents[:1], progress=False, ablation=kind) for kind in ("mean", "zero")
    )
    assert by_mean.spliced == by_zero.spliced
    with torch.no_grad(), edited(tiny_llama, 1, torch.zeros_like, skip_first=1):
        logits = tiny_llama(documents[0][None]).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits, documents[0][1:])
    assert by_zero.ablated == pytest.approx(float(expected), rel=1e-4)
    assert by_mean.ablated != by_zero.ablated
    with pytest.raises(ConfigurationError, match="mean or zero"):
        evaluate_splice(tiny_llama, 1, sae, documents, progress=False, ablation="noise")


def test_several_are_spliced_as_each_alone_and_told_the_gradient(tiny_llama, documents):
    saes = {"a": SAE(48, 96, TopK(3)).eval(), "b": SAE(48, 96, GradientTopK(3, beta=100.0), seed=1).eval()}
    both = evaluate_splices(tiny_llama, 1, saes, documents, progress=False)
    for name, sae in saes.items():
        assert both[name] == evaluate_splice(tiny_llama, 1, sae, documents, progress=False)
    told = evaluate_splices(tiny_llama, 1, saes, documents, progress=False, with_gradients=True)
    assert told["a"] == both["a"]
    assert told["b"].spliced != both["b"].spliced


def test_what_does_not_fit_is_refused(tiny_llama, documents):
    with pytest.raises(ModelError, match="for 12"):
        evaluate_splice(tiny_llama, 1, SAE(12, 20, TopK(2)).eval(), documents, progress=False)
    with pytest.raises(CalibrationError, match="longer"):
        evaluate_splice(tiny_llama, 1, SAE(48, 96, TopK(2)), documents[2:], progress=False)
    with pytest.raises(UnknownNameError), edited(tiny_llama, "model.layers.9", lambda x: x):
        pass
    with pytest.raises(ModelError, match="keep the shape"), edited(tiny_llama, 0, lambda x: x[:, :1]), torch.no_grad():
        tiny_llama(documents[0][None])


def test_only_labelled_predictions_count(tiny_llama, documents):
    sae = SAE(48, 96, TopK(3)).eval()
    text = documents[1]
    labels = torch.full_like(text, -100)
    labels[5:9] = text[5:9]  # predicted from what comes before them
    report = evaluate_splice(tiny_llama, 1, sae, [text], progress=False, labels=[labels])
    whole = evaluate_splice(tiny_llama, 1, sae, [text], progress=False)
    with torch.no_grad():
        log = tiny_llama(text[None]).logits[0].log_softmax(-1)
    assert report.dense == pytest.approx(-float(log[torch.arange(4, 8), text[5:9]].mean()), rel=1e-5)
    assert (report.tokens, whole.tokens) == (4, 32)
    assert (report.unexplained, report.active) == (whole.unexplained, whole.active)
    everything = evaluate_splice(tiny_llama, 1, sae, [text], progress=False, labels=[text])
    assert everything == whole


def test_labels_belong_to_documents(tiny_llama, documents):
    sae = SAE(48, 96, TopK(3)).eval()
    for labels in (documents[:1], [text[:-1] for text in documents]):
        with pytest.raises(CalibrationError, match="one for each"):
            evaluate_splice(tiny_llama, 1, sae, documents, progress=False, labels=labels)
    nothing = [torch.full_like(text, -100) for text in documents]
    with pytest.raises(CalibrationError, match="one to predict"):
        evaluate_splice(tiny_llama, 1, sae, documents, progress=False, labels=nothing)
