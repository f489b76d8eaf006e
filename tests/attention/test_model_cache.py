"""Methods that see the cache: each thread its own, whatever the model calls it, and none of it goes into a copy."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from functools import partial

import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from gossamer.attention.ada_snap_kv import AdaSnapKV
from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.attention.eviction import EvictedLayer
from gossamer.attention.offloaded_decoding import OffloadedDoubleSparsity
from gossamer.attention.page_cache import PagedLayer
from gossamer.attention.quest import Quest
from gossamer.attention.snap_kv import SnapKV

THREADS = 3
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FACTORIES = {
    "quest": lambda: Quest(token_budget=8, page_size=4),
    "double-sparsity": lambda: DoubleSparsity(tokens=8, channels=4, dense_layers=()),
    "offloaded": lambda: OffloadedDoubleSparsity(tokens=8, channels=4, dense_layers=(), dense_last=False),
    "snap-kv": lambda: SnapKV(token_capacity=20, approximation=8, local_window=8),
    "ada-snap-kv": lambda: AdaSnapKV(token_capacity=20, approximation=8, local_window=8),
}


def ids(*shape, seed=0):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FACTORIES)
def method(request, tiny_llama):
    made = FACTORIES[request.param]()
    if isinstance(made, DoubleSparsity):
        made.calibrate(tiny_llama, [ids(2, 40, seed=9)], progress=False)
    return made


@pytest.fixture
def neox():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, **sizes)).eval()


def together(method, *runs):
    """What runs find that go on in threads, each of which waits for the others before it attends."""
    barrier, found, attend = threading.Barrier(len(runs)), [None] * len(runs), method.attend

    def wait(call):
        barrier.wait(60)
        return attend(call)

    def work(place):
        try:
            found[place] = runs[place]()
        except BaseException as problem:
            found[place] = problem
            barrier.abort()

    method.attend = wait
    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    method.attend = attend
    return found


def test_threads_that_use_one_model_at_once_find_what_each_finds_alone(tiny_llama, method):
    def run(seed):
        options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
        return torch.cat(tiny_llama.generate(ids(1, 40, seed=seed), **options).logits)

    runs = [partial(run, seed) for seed in range(THREADS)]
    with method.active(tiny_llama) as installed:
        alone = [run() for run in runs]
        counted = installed.report()
        installed.reset()
        found = together(method, *runs)
        report = installed.report()
    for ours, expected in zip(found, alone):
        assert isinstance(ours, torch.Tensor), ours
        torch.testing.assert_close(ours, expected)
    for where, tally in counted.tallies.items():
        assert report.tallies[where].calls == tally.calls
        assert report.tallies[where].computed == pytest.approx(tally.computed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_that_is_made_at_work_works_by_itself(tiny_llama, method, copied):
    with method.active(tiny_llama):
        expected = tiny_llama.generate(ids(1, 40), **GREEDY)
        other = copied(method)
        assert tiny_llama.generate(ids(1, 40), **GREEDY).equal(expected)
    assert other.cache is None
    with other.active(tiny_llama):
        assert tiny_llama.generate(ids(1, 40), **GREEDY).equal(expected)


@pytest.mark.parametrize(("name", "kind"), [("quest", PagedLayer), ("snap-kv", EvictedLayer)])
def test_a_cache_is_seen_by_whatever_name_a_model_calls_it(neox, name, kind):
    cache = DynamicCache(config=neox.config)
    with FACTORIES[name]().active(neox) as installed:
        neox.generate(ids(1, 40), past_key_values=cache, **GREEDY)
        assert installed.report().density("decode") < 1
    assert [type(layer) for layer in cache.layers] == [kind, kind]


@pytest.mark.parametrize("name", ["snap-kv", "ada-snap-kv"])
def test_that_nothing_is_evicted_from_a_static_cache_is_told_once(tiny_llama, name):
    options = {**GREEDY, "cache_implementation": "static"}
    expected = tiny_llama.generate(ids(1, 40), **options)
    with FACTORIES[name]().active(tiny_llama) as installed:
        with pytest.warns(
            UserWarning, match=r"SnapKV evicts nothing: the cache of layer 0 is of type StaticLayer, and"
        ) as told:
            found = tiny_llama.generate(ids(1, 40), **options)
        assert len([one for one in told if "evicts nothing" in str(one.message)]) == 1
        assert installed.report().density("decode") == 1
    assert found.equal(expected)


def test_a_prompt_that_is_kept_whole_or_read_without_a_cache_is_no_reason_to_warn(tiny_llama):
    with warnings.catch_warnings(), SnapKV(token_capacity=20, approximation=8, local_window=8).active(tiny_llama):
        warnings.simplefilter("error")
        tiny_llama.generate(ids(1, 12), cache_implementation="static", **GREEDY)
        tiny_llama(ids(1, 40), use_cache=False)
