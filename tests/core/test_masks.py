from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.core.masks import MaskSet, pack_bits, unpack_bits
from gossamer.errors import CheckpointError, TargetError


def test_the_bit_order_is_least_significant_first():
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    assert pack_bits(mask).tolist() == [0b1101, 1]


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_packing_is_undone(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


def masks(seed, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) > 0.4 for name in ("0.weight", "1.weight")}


def test_the_algebra_is_that_of_the_tensors():
    a, b = masks(0), masks(1)
    one, other = MaskSet(a), MaskSet(b)
    for name in a:
        assert torch.equal((one & other)[name], a[name] & b[name])
        assert torch.equal((one | other)[name], a[name] | b[name])
        assert torch.equal((one ^ other)[name], a[name] ^ b[name])
        assert torch.equal((~one)[name], ~a[name])
    flat_a, flat_b = (torch.cat([m.flatten() for m in s.values()]).double() for s in (a, b))
    assert one.distance(other) == int((flat_a != flat_b).sum())
    assert one.jaccard(other) == pytest.approx(float((flat_a * flat_b).sum() / ((flat_a + flat_b) > 0).sum()))
    assert one.cosine(other) == pytest.approx(float(torch.cosine_similarity(flat_a, flat_b, dim=0)))
    assert one.kept == int(flat_a.sum())
    assert (~~one) == one


def test_masks_find_their_parameters_and_zero_them():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(7, 5))
    chosen = MaskSet(masks(0))
    assert chosen.violations(model)
    chosen.apply_(model)
    assert not chosen.violations(model)
    assert int((model[0].weight != 0).sum()) == int(chosen["0.weight"].sum())


def test_a_tied_parameter_takes_one_mask():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(7, 5))
    model[1].weight = model[0].weight
    chosen = MaskSet(masks(0))
    with pytest.raises(TargetError, match="one tied parameter"):
        chosen.apply_(model)
    MaskSet({"1.weight": chosen["1.weight"]}).apply_(model)
    assert torch.equal(model[0].weight != 0, chosen["1.weight"])


def test_masks_of_another_model_are_refused():
    with pytest.raises(TargetError, match="no parameter"):
        MaskSet(masks(0)).apply_(nn.Linear(7, 5))
    with pytest.raises(TargetError, match="shape"):
        MaskSet({"weight": torch.ones(2, 2, dtype=torch.bool)}).apply_(nn.Linear(7, 5))


def test_the_state_survives_and_a_broken_one_is_refused():
    chosen = MaskSet(masks(0))
    state = chosen.state_dict()
    assert MaskSet.from_state_dict(state) == chosen
    with pytest.raises(CheckpointError, match="complete"):
        MaskSet.from_state_dict({"0.weight:bits": state["0.weight:bits"]})
    with pytest.raises(CheckpointError, match="needs 5"):
        MaskSet.from_state_dict({**state, "0.weight:bits": state["0.weight:bits"][:-1]})
    beyond = state["0.weight:bits"].clone()
    beyond[-1] |= 128
    with pytest.raises(CheckpointError, match="beyond"):
        MaskSet.from_state_dict({**state, "0.weight:bits": beyond})
