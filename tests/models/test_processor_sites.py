"""Transformers as diffusers writes them: steps and branches of a guidance, and masks."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from gossamer.attention.adaspa import AdaSpa
from gossamer.attention.re_ttention import Rettention
from gossamer.attention.sparsed import SparseD
from gossamer.models.processor_sites import ProcessorSite

STEPS = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.processor, self.qkv = object(), nn.Linear(16, 48)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    def __init__(self, named=True):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.named = nn.ModuleList(Attention() for _ in range(2)), []
        for weight in self.parameters():
            weight.data.mul_(2)
        if named:
            self.cache_context = self._cache_context

    @contextmanager
    def _cache_context(self, name):
        self.named.append(name)
        yield

    def forward(self, x, timestep, mask=None):
        for block in self.blocks:
            x = x + block(x, mask)
        return x


class Named(Transformer):
    """One whose contexts are a method of the class, as in diffusers."""

    def __init__(self):
        super().__init__(named=False)

    cache_context = Transformer._cache_context


METHODS = {
    "re-ttention": lambda: Rettention(keep=0.25, dense_steps=2, refresh_every=3),
    "adaspa": lambda: AdaSpa(sparsity=0.5, block_size=8, search_steps=(2,)),
    "sparsed": lambda: SparseD(skip=0.0, select=0.2, block_size=4, generation_length=16),
}


def inputs():
    return torch.randn(2, 2, 32, 16, generator=torch.Generator().manual_seed(1)).unbind(0)


def sampled(model, method, calls):
    """Outputs of every step for both branches, each ``(2, tokens, size)``."""
    first, second = inputs()
    found = []
    with torch.no_grad(), method.active(model):
        method.begin(STEPS)
        for index in range(STEPS):
            branches = [x + 0.02 * index for x in (first[:1], second[:1])]
            found.append(calls(model, branches, torch.tensor([1000.0 - index])))
    return torch.stack(found)


def together(model, branches, time):
    return model(torch.cat(branches), timestep=time)


def apart(model, branches, time):
    return torch.cat([model(x, timestep=time) for x in branches])


def in_contexts(model, branches, time):
    found = []
    for name, x in zip(("cond", "uncond"), branches):
        with model.cache_context(name):
            found.append(model(x, timestep=time))
    return torch.cat(found)


def in_contexts_asked_twice(model, branches, time):
    """As a solver of second order does, in whatever order."""
    in_contexts(model, branches, time)
    return in_contexts(model, branches, time)


def asked_twice_from_the_second_step_on(model, branches, time):
    if time < 1000:
        apart(model, branches, time)
    return apart(model, branches, time)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda: Transformer(named=False), apart),
        (lambda: Transformer(named=False), asked_twice_from_the_second_step_on),
        (Transformer, in_contexts),
        (Named, in_contexts),
        (Named, in_contexts_asked_twice),
    ],
)
def test_branches_that_are_calls_of_their_own_do_not_mix(name, make, calls):
    expected = sampled(make(), METHODS[name](), together)
    torch.testing.assert_close(sampled(make(), METHODS[name](), calls), expected, rtol=1e-4, atol=1e-4)


def test_contexts_are_those_of_the_model_and_given_back():
    for model in (Transformer(), Named()):
        before, method = model.cache_context, METHODS["adaspa"]()
        sampled(model, method, in_contexts)
        assert model.named == ["cond", "uncond"] * STEPS
        assert {branch for _, branch in method.cache.named("pattern")} == {"cond", "uncond"}
        assert model.cache_context == before


def test_tokens_that_are_given_have_no_time():
    told = []

    class Listener:
        def step(self, index, branch=""):
            told.append((index, branch))

    model = Transformer(named=False)
    site = ProcessorSite(model, lambda call: None, Listener())
    for time in (9.0, 5.0, 2.0):
        model(inputs()[0], timestep=torch.tensor([[0.0, time, time]]))
    site.remove()
    assert told == [(0, ""), (1, ""), (2, "")]


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_of_padding_is_read_as_one(rows, added, batch):
    model, x, calls = Transformer(), inputs()[0], []
    mask = (torch.arange(32) < torch.tensor([[32], [20]])[-batch:])[:, None, None, :].expand(-1, -1, rows, -1)
    given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if added else mask
    with torch.no_grad():
        expected = model(x, 1.0, mask)
        site = ProcessorSite(model, lambda call: calls.append(call) or call.dense(), StepsIgnored())
        found = model(x, timestep=1.0, mask=given)
        model(x, timestep=1.0, mask=torch.ones(1, 1, 1, 32, dtype=torch.bool))
        site.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [call.key_mask is None for call in calls] == [False, False, True, True]
    assert torch.equal(calls[0].key_mask, mask[:, 0, 0].expand(2, -1))


class StepsIgnored:
    def step(self, index, branch=""):
        pass


def test_a_model_that_always_masks_is_made_sparse_and_other_masks_are_counted_and_told():
    model, method = Transformer(), METHODS["adaspa"]()
    with torch.no_grad(), method.active(model) as installed:
        method.begin(STEPS)
        for index in range(STEPS):
            model(inputs()[0], timestep=float(-index), mask=torch.ones(1, 1, 1, 32, dtype=torch.bool))
        sparse = installed.report()
        installed.reset()
        method.begin(1)
        with pytest.warns(UserWarning, match="AdaSpa leaves such calls dense"):
            model(inputs()[0], timestep=1.0, mask=torch.ones(32, 32, dtype=torch.bool).tril()[None, None])
        dense = installed.report()
    assert sparse.density("prefill") == pytest.approx((2 + 6 * 0.5) / 8, abs=0.05)
    assert dense.density("prefill") == 1
    assert {tally.masked_calls for tally in dense.tallies.values()} == {1}
