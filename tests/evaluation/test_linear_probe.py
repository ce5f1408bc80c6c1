"""The probe finds what is there, finds nothing where nothing is, and takes the steps of the plain protocol."""

import numpy as np
import pytest
import torch

from dbeta.evaluation.linear_probe import ProbeConfig, mean_auc, measure, train_probes
from dbeta.evaluation.metrics import macro_auc

NAMES = ["a", "b", "c"]


def planted(records, seed, width=32, noise=False):
    generator = np.random.default_rng(seed)
    features = np.tanh(generator.normal(size=(records, width))).astype(np.float32)
    plane = np.random.default_rng(99).normal(size=(width, 3))
    if noise:
        return features, generator.random((records, 3)) < 0.3
    margin = features @ plane
    keep = (np.abs(margin - 1) > 0.25).all(1)
    return features[keep], margin[keep] > 1


def test_planted_linear_signal_reaches_one():
    train, validation, test = (planted(n, i) for i, n in enumerate((3000, 600, 600)))
    probes = train_probes(train, validation, seeds=(42, 43), config=ProbeConfig(lr=1e-2))
    tables = measure(probes, *test, NAMES, bootstrap=0)
    assert all(table.macro > 0.9995 for table in tables)
    assert all(probe.validation_auc > 0.9995 for probe in probes)


def test_random_features_stay_at_one_half():
    train, validation, test = (planted(n, i, noise=True) for i, n in enumerate((1000, 300, 1000)))
    tables = measure(train_probes(train, validation, config=ProbeConfig(epochs=50)), *test, NAMES, bootstrap=300)
    assert any(table.interval[0] <= 0.5 <= table.interval[1] for table in tables)
    assert all(abs(table.macro - 0.5) < 0.06 for table in tables)


def test_steps_equal_those_of_autograd():
    """The gradient written out, all seeds side by side, against nn.Linear and autograd, one seed at a time."""
    features, targets = planted(300, 0)
    config = ProbeConfig(epochs=3, batch=64)
    for probe in train_probes((features, targets), (features, targets), fraction=0.5, seeds=(1, 2), config=config):
        generator, bound = torch.Generator().manual_seed(probe.seed), 32**-0.5
        layer = torch.nn.Linear(32, 3)
        with torch.no_grad():
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        subset = np.random.default_rng(probe.seed).permutation(len(features))[: probe.records]
        for epoch in range(1, probe.epoch + 1):
            order = subset[np.random.default_rng((probe.seed, epoch)).permutation(len(subset))]
            for rows in np.split(order, range(64, len(order), 64)):
                optimizer.zero_grad()
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    layer(torch.from_numpy(features[rows])), torch.from_numpy(targets[rows]).float()
                )
                loss.backward()
                optimizer.step()
        assert probe.records == round(len(features) / 2)
        np.testing.assert_allclose(probe.weight, layer.weight.detach().numpy(), atol=2e-5)
        np.testing.assert_allclose(probe.bias, layer.bias.detach().numpy(), atol=2e-5)


def test_epoch_is_chosen_on_validation():
    train, validation = planted(400, 0, noise=True), planted(200, 1, noise=True)
    (probe,) = train_probes(train, validation, seeds=(5,), config=ProbeConfig(epochs=30))
    assert probe.validation_auc == pytest.approx(
        macro_auc(probe.scores(validation[0]), validation[1], NAMES).macro, abs=1e-6
    )
    one = train_probes(train, validation, seeds=(5,), config=ProbeConfig(epochs=1))[0]
    assert probe.validation_auc >= one.validation_auc


def test_subset_names_classes_it_never_saw():
    features, targets = planted(200, 0, noise=True)
    targets[:, 2] = False
    targets[0, 2] = True
    probes = train_probes(
        (features, targets), (features, targets), fraction=0.01, seeds=range(5), config=ProbeConfig(epochs=1)
    )
    assert all(probe.records == 2 for probe in probes) and any(2 in probe.unseen for probe in probes)


def test_quick_auc_equals_the_exact_one():
    generator = np.random.default_rng(0)
    scores, targets = generator.normal(size=(2, 3, 200)).astype(np.float32), generator.random((3, 200)) < 0.3
    targets[1] = False
    quick = mean_auc(torch.from_numpy(scores), torch.from_numpy(targets))
    exact = [macro_auc(part.T, targets.T, NAMES, bootstrap=0).macro for part in scores]
    assert quick.tolist() == pytest.approx(exact, abs=1e-6)


def test_user_mistakes_are_named():
    features, targets = planted(50, 0)
    with pytest.raises(ValueError, match="fraction 0"):
        train_probes((features, targets), (features, targets), fraction=0)
    with pytest.raises(ValueError, match="0 validation records"):
        train_probes((features, targets), (features[:0], targets[:0]))
