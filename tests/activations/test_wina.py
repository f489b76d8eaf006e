import itertools

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from gossamer.activations.wina import Wina, error_bound, output_error
from gossamer.core.channel_rules import ChannelRule, TopK, column_norms
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.models.rotation import orthogonalise


def orthogonal_columns(generator, outputs=12, inputs=8):
    basis = torch.linalg.qr(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)).Q
    return basis * torch.exp(torch.randn(inputs, generator=generator, dtype=torch.float64))


def best_error(weight, x, keep):
    n = len(x)
    subsets = torch.zeros(0, n, dtype=torch.bool)
    rows = [torch.isin(torch.arange(n), torch.tensor(c)) for c in itertools.combinations(range(n), keep)]
    subsets = torch.stack(rows)
    return ((x * ~subsets) @ weight.T).norm(dim=1).min()


def test_norms_find_the_best_subset_of_orthogonal_columns_and_magnitude_does_not():
    generator = torch.Generator().manual_seed(0)
    weight = orthogonal_columns(generator)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    best = torch.stack([best_error(weight, row, 4) for row in x])
    by_norm = output_error(weight, x, ChannelRule(TopK(4), column_norms(weight)))
    assert torch.allclose(by_norm, best, rtol=1e-9)
    assert (output_error(weight, x, ChannelRule(TopK(4))) > best * 1.001).any()


def test_the_bound_holds_and_is_attained_by_orthogonal_columns():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    loose = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    rule = ChannelRule(TopK(3), column_norms(loose))
    assert (output_error(loose, x, rule) <= error_bound(loose, x, rule) * (1 + 1e-12)).all()
    tight = orthogonal_columns(generator)
    rule = ChannelRule(TopK(3), column_norms(tight))
    assert torch.allclose(output_error(tight, x, rule), error_bound(tight, x, rule))


def test_the_same_number_of_channels_counts_for_every_token(tiny_llama, batches):
    wina = Wina(sparsity=0.5, dense_prefill=0.0)
    wina.calibrate(tiny_llama, batches, progress=False)
    with wina.active(tiny_llama) as installed, torch.no_grad():
        tiny_llama(batches[0])
        assert all(share == 0.5 for share in installed.realised.values())


def test_norms_count_everywhere_or_after_rotating_for_keys_and_gates_only(tiny_llama, batches):
    def weighted(rules):
        return {name.rpartition(".")[2] for name, rule in rules.inputs.items() if rule.scale is not None}

    everything = weighted(Wina().calibrate(tiny_llama, batches, progress=False))
    assert len(everything) == 7
    orthogonalise(tiny_llama)
    assert weighted(Wina().calibrate(tiny_llama, batches, progress=False)) == {"k_proj", "gate_proj"}
    assert weighted(Wina(norm_sites=["q"]).calibrate(tiny_llama, batches, progress=False)) == {"q_proj"}


def test_fused_keys_and_gates_are_scored_by_norm_after_rotating(batches):
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 97}
    model = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()
    orthogonalise(model)
    rules = Wina().calibrate(model, batches, progress=False)
    normed = {name.rpartition(".")[2] for name, rule in rules.inputs.items() if rule.scale is not None}
    assert normed == {"qkv_proj", "gate_up_proj"}


def test_rotation_is_part_of_what_a_token_reads(tiny_llama, batches):
    wina = Wina(sparsity=0.5, dense_prefill=0.0)

    def read():
        wina.calibrate(tiny_llama, batches, progress=False)
        with wina.active(tiny_llama) as installed, torch.no_grad():
            tiny_llama(batches[0])
            return installed.weights_read.read

    plain = read()
    orthogonalise(tiny_llama)
    assert read() == pytest.approx(plain + 6 * 48 * 48)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match="gate is 'best'"):
        Wina(gate="best")
    with pytest.raises(UnknownNameError, match="role"):
        Wina(norm_sites=["key"])
