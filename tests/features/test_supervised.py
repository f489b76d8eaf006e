import warnings

import pytest
import torch
from sklearn.base import clone

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.features.supervised import SupervisedDictionary


def planted(count=2000, width=12, noise=0.0, seed=0):
    """Sums of a vector for each of two independent variables, and a constant."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {"a": torch.randn(4, width, generator=generator), "b": torch.randn(3, width, generator=generator)}
    labels = {name: torch.randint(len(part), (count,), generator=generator) for name, part in vectors.items()}
    x = 1.5 + sum(part[labels[name]] for name, part in vectors.items())
    return x + noise * torch.randn(x.shape, generator=generator), labels, vectors


def test_least_squares_finds_what_was_planted_exactly():
    x, labels, vectors = planted()
    found = SupervisedDictionary(["a", "b"]).fit(x, labels)
    assert torch.allclose(found.reconstruct(labels), x, atol=1e-4)
    # vectors are only known up to a constant, so differences are compared
    for name, part in vectors.items():
        assert torch.allclose(found.vectors_[name][1] - found.vectors_[name][0], part[1] - part[0], atol=1e-4)


def test_mean_vectors_are_means():
    x, labels, _ = planted(noise=0.5)
    found = SupervisedDictionary(["a", "b"], "mean").fit(x, labels)
    for value in range(4):
        assert torch.allclose(found.vectors_["a"][value], x[labels["a"] == value].mean(0) - x.mean(0), atol=1e-5)


def test_least_squares_agrees_with_the_pseudo_inverse_where_values_determine_each_other():
    x, labels, _ = planted(count=200, noise=0.3)
    labels["copy"] = labels["a"].clone()
    found = SupervisedDictionary(["a", "copy"]).fit(x, labels)
    marks = torch.nn.functional.one_hot(labels["a"]).double()
    solution = torch.linalg.pinv(torch.cat([marks, marks], 1)) @ (x - x.mean(0)).double()
    assert torch.allclose(found.vectors_["a"], solution[:4].float(), atol=1e-4)
    assert torch.allclose(found.vectors_["a"], found.vectors_["copy"], atol=1e-5)


def test_confounded_variables_mislead_means_but_not_least_squares():
    x, labels, vectors = planted(count=6000)
    kept = (labels["a"] != 0) | (labels["b"] == 0)
    x, labels = x[kept], {name: value[kept] for name, value in labels.items()}
    by_mean, by_squares = (SupervisedDictionary(["a", "b"], method).fit(x, labels) for method in ("mean", "mse"))
    wanted = vectors["a"][0] - vectors["a"][1]
    errors = [
        float((found.vectors_["a"][0] - found.vectors_["a"][1] - wanted).norm()) for found in (by_mean, by_squares)
    ]
    assert errors[1] < 1e-3 < 0.3 < errors[0]


def test_coupled_variables_have_a_vector_for_each_combination():
    _, labels, _ = planted()
    table = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    x = table[labels["a"] * 3 + labels["b"]]
    coupled = SupervisedDictionary([("a", "b")]).fit(x, labels)
    apart = SupervisedDictionary(["a", "b"]).fit(x, labels)
    assert coupled.vectors_["a", "b"].shape == (12, 5)
    assert torch.allclose(coupled.reconstruct(labels), x, atol=1e-4)
    assert (apart.reconstruct(labels) - x).square().mean() > 0.1


def test_shared_vectors_serve_several_variables():
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(5, 6, generator=generator)
    labels = {role: torch.randint(5, (500,), generator=generator) for role in ("io", "s")}
    x = names[labels["io"]] + names[labels["s"]]
    attribute = frozenset({"io", "s"})
    found = SupervisedDictionary([attribute]).fit(x, labels)
    assert found.vectors_[attribute].shape == (5, 6)
    assert torch.allclose(found.reconstruct(labels), x, atol=1e-4)


@pytest.mark.parametrize("mode", ["arithmetic", "zero", "mean"])
def test_edits_give_what_the_new_labels_would(mode):
    # variables in coordinates of their own, so that every way of editing is exact
    generator = torch.Generator().manual_seed(0)
    vectors = {"a": torch.zeros(4, 8), "b": torch.zeros(3, 8)}
    vectors["a"][:, :4] = torch.randn(4, 4, generator=generator)
    vectors["b"][:, 4:] = torch.randn(3, 4, generator=generator)
    labels = {name: torch.arange(1200) // step % len(part) for step, (name, part) in zip((1, 4), vectors.items())}
    x = sum(part[labels[name]] for name, part in vectors.items())
    x = x - x.mean(0)
    found = SupervisedDictionary(["a", "b"]).fit(x, labels)
    new = {**labels, "a": (labels["a"] + 1) % 4}
    wanted = x - vectors["a"][labels["a"]] + vectors["a"][new["a"]]
    assert torch.allclose(found.edit(x, labels, new, mode), wanted, atol=1e-4)


def test_attributes_that_stay_are_left_alone():
    x, labels, _ = planted(noise=0.5)
    found = SupervisedDictionary(["a", "b"]).fit(x, labels)
    new = {**labels, "a": labels["a"].clone()}
    new["a"][0] = (new["a"][0] + 1) % 4
    for mode in ("arithmetic", "zero", "mean"):
        edited = found.edit(x, labels, new, mode)
        assert torch.equal(edited[1:], x[1:])
        assert not torch.allclose(edited[0], x[0])


def test_shuffled_labels_explain_nothing():
    x, labels, _ = planted(noise=0.1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    found = SupervisedDictionary(["a", "b"]).fit(x, {name: value[order] for name, value in labels.items()})
    left = (x - found.reconstruct(labels)).square().sum() / (x - x.mean(0)).square().sum()
    assert left > 0.98


def test_rare_values_are_warned_of():
    x, labels, _ = planted(count=40)
    with pytest.warns(UserWarning, match="fewer than 20"):
        SupervisedDictionary(["a"]).fit(x, labels)


def test_it_is_an_estimator():
    first = SupervisedDictionary(["a"], "mean")
    assert clone(first).get_params() == first.get_params()


def test_bad_input_is_named():
    x, labels, _ = planted(count=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = SupervisedDictionary(["a", "b"]).fit(x, labels)
    with pytest.raises(ConfigurationError, match="method 'median'"):
        SupervisedDictionary(["a"], "median").fit(x, labels)
    with pytest.raises(ConfigurationError, match="no labels of 'c'"):
        SupervisedDictionary(["c"]).fit(x, labels)
    with pytest.raises(CalibrationError, match="labels of 'a'"):
        SupervisedDictionary(["a"]).fit(x[1:], labels)
    with pytest.raises(NonFiniteError, match="activations hold"):
        SupervisedDictionary(["a"]).fit(x.log(), labels)
    with pytest.raises(ConfigurationError, match="value of 9"):
        found.reconstruct({**labels, "a": torch.full((200,), 9)})
    with pytest.raises(ConfigurationError, match="mode is 'swap'"):
        found.edit(x, labels, labels, "swap")
