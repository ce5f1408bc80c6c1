"""Training the whole encoder: the ArcFace loss, who is told apart, resuming, and the choice of epoch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import FakeCorpus
from torch import nn

from dbeta.evaluation import finetune, identify
from dbeta.evaluation.datasets import Dataset, Rows
from dbeta.evaluation.fitting import FitConfig, TokenMean, fit
from dbeta.evaluation.identify import Identities, arcface_loss, identities, top_1
from dbeta.evaluation.label_sets import label_set


def test_arcface_by_hand():
    generator = torch.Generator().manual_seed(0)
    embedding, weight = torch.randn(5, 8, generator=generator), torch.randn(4, 8, generator=generator)
    embedding[0] = -weight[2]  # an angle of pi: no room for the margin
    patient = torch.tensor([2, 0, 1, 3, 3])
    total = 0.0
    for x, own in zip(embedding, patient.tolist()):
        logits = []
        for j, w in enumerate(weight):
            angle = math.acos(max(-1 + 1e-6, min(1 - 1e-6, float(F.cosine_similarity(x, w, 0)))))
            if j != own:
                logits.append(192 * float(F.cosine_similarity(x, w, 0)))
            elif angle + 1 < math.pi:
                logits.append(192 * math.cos(angle + 1))
            else:
                logits.append(192 * (math.cos(angle) - math.sin(1)))
        total += math.log(sum(math.exp(v - max(logits)) for v in logits)) + max(logits) - logits[own]
    assert float(arcface_loss(embedding, weight, patient)) == pytest.approx(total / 5, rel=1e-4)


def test_arcface_gradient_is_finite_at_the_poles():
    embedding = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    arcface_loss(embedding, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])).backward()
    assert embedding.grad.isfinite().all()


def test_top_1_by_cosine():
    gallery = torch.tensor([[1.0, 0], [0, 5.0], [-1, 0]])
    assert top_1(gallery, torch.tensor([[0.9, 0.1], [0.1, 9], [0.5, 0.5]])).tolist() == [True, True, False]
    assert not top_1(torch.ones(3, 2), torch.ones(3, 2)).any()  # all alike: nobody is identified


def test_paper_protocol_tests_patients_with_several_records():
    subjects = [f"p{i}" for i in range(20)] + ["q0", "q0", "q1", "q1", "q1"]
    names = [f"r{i:02d}" for i in range(25)]
    people = identities(FakeCorpus("cinc2021", names, [[]] * 25, subjects=subjects))
    assert people.origin.startswith("paper") and people.test == [(20, 21), (22, 23)]
    validated = {subjects[first] for first, _ in people.validation}
    assert len(validated) == 2 and all(first == second for first, second in people.validation)
    assert set(people.train.values()) | validated == set(subjects[:20]) and not validated & set(people.train.values())


def test_where_most_have_several_records_no_patient_crosses():
    subjects = [f"p{i // 2}" for i in range(40)]
    people = identities(FakeCorpus("ptb", range(40), [[]] * 40, subjects=subjects))
    groups = [
        set(people.train.values()),
        *({subjects[a] for a, _ in part} for part in (people.validation, people.test)),
    ]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    with pytest.raises(ValueError, match="needs two or more"):
        identities(FakeCorpus("csn", range(6), [[]] * 6))


def test_patients_of_the_challenges_ptbxl_records(shared):
    names = ["a/HR00001", "a/HR00002", "b/JS00001", *(f"a/E{i:05d}" for i in range(9))]
    table = shared / "data/ptbxl/ptbxl_database.rows1-500.csv"
    rows = table.read_text().splitlines()[1:]
    twice = {}
    for row in rows:
        ecg, patient = row.split(",")[:2]
        twice.setdefault(patient, []).append(int(ecg))
    patient, ecgs = next((p, e) for p, e in twice.items() if len(e) > 1)
    names += [f"a/HR{ecg:05d}" for ecg in ecgs[:2]]
    second = next((p, e) for p, e in twice.items() if len(e) > 1 and p != patient)
    names += [f"a/HR{ecg:05d}" for ecg in second[1][:2]]
    people = identities(FakeCorpus("cinc2021", names, [[]] * len(names)), table)
    assert {tuple(sorted(pair)) for pair in people.test} == {(12, 13), (14, 15)}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.drop = nn.Linear(4, 1), nn.Dropout(0.5)


def _fit(folder, *, stop_after=None, epochs=6, scores=None):
    network, x = Line(), torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    calls = []

    def validate():
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(None)
        return scores[len(calls) - 1] if scores else -float((network.layer(x) - x.sum(1, True)).square().mean())

    config = FitConfig(lr=0.05, epochs=epochs, batch=16)
    loss_of = lambda rows: (network.layer(network.drop(x[rows])) - x[rows].sum(1, True)).square().mean()  # noqa: E731
    best = fit(network, loss_of, validate, rows=50, config=config, folder=folder, what="a line")
    return best, network.state_dict()


def test_a_killed_fit_goes_on_bit_for_bit(tmp_path):
    whole, weights = _fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "killed", stop_after=3)
    again, resumed = _fit(tmp_path / "killed")
    assert again == whole and all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert not (tmp_path / "killed").exists()


def test_weights_of_the_best_validation_epoch_are_kept(tmp_path):
    best, weights = _fit(tmp_path / "a", epochs=4, scores=[0.1, 0.9, 0.3, 0.9])
    assert best == {"epoch": 2, "score": 0.9}
    _, two = _fit(tmp_path / "b", epochs=2, scores=[0.1, 0.9])
    assert all(torch.equal(weights[name], two[name]) for name in weights)


def test_token_mean_leaves_the_model_alone(model):
    body = TokenMean(model)
    ecg = torch.randn(2, 12, 2500)
    states = model.ecg_projection(model.ecg_encoder(ecg))
    torch.testing.assert_close(body(ecg), states[:, 1:].mean(1))
    with torch.no_grad():
        next(body.parameters()).add_(1)
    torch.testing.assert_close(model.ecg_projection(model.ecg_encoder(ecg)), states)


def test_divergence_is_an_error(tmp_path):
    network = Line()
    with pytest.raises(ArithmeticError, match="lower learning rate"):
        fit(network, lambda rows: network.layer.weight.sum() * float("nan"), lambda: 0.0, rows=4,
            config=FitConfig(lr=1e-3, epochs=1), folder=tmp_path / "run", what="x")  # fmt: skip
    network, x = Line(), torch.ones(4, 4)
    with pytest.raises(ArithmeticError, match="weights of epoch 1 overflow; use a lower"):  # only its last step did it
        fit(network, lambda rows: network.layer(x[rows]).square().mean(), lambda: 0.0, rows=4,
            config=FitConfig(lr=1e30, epochs=1), folder=tmp_path / "last", what="x")  # fmt: skip


class Store:
    """Segments that remember who read them; ``record`` as in a SegmentStore."""

    def __init__(self, name, record, log):
        self.name, self.record, self.log = name, np.array(record), log

    def __len__(self):
        return len(self.record)

    def read(self, rows):
        self.log.append((self.name, list(rows)))
        return torch.randn(len(rows), 12, 2500)


@pytest.fixture
def shown(monkeypatch):
    """The signals that the encoder was shown."""
    shown, forward = [], TokenMean.forward
    monkeypatch.setattr(TokenMean, "forward", lambda self, ecg: shown.append(ecg) or forward(self, ecg))
    return shown


def once(log, calls):
    """In place of ``fit``: one loss and one validation."""

    def fit(network, loss_of, validate, **_):
        loss_of(np.arange(2))
        calls.append(len(log))
        with torch.no_grad():
            validate()
        calls.append(len(log))
        return {"epoch": 1, "score": 0.0}

    return fit


def test_fine_tuning_validates_on_validation_and_sees_only_its_leads(model, shown, monkeypatch):
    targets = np.array([[True], [False]])
    rows = {
        split: Rows(names=["a", "b"], groups=["a", "b"], targets=targets, records=np.array([i, i + 1]))
        for i, split in ((0, "train"), (2, "validation"), (4, "test"))
    }
    log, calls = [], []
    stores = {split: Store(split, part.records, log) for split, part in rows.items()}
    monkeypatch.setattr(finetune, "fit", once(log, calls))
    said = []
    monkeypatch.setattr(finetune, "sigmoid", lambda _: np.array([[0.49], [0.51]]))

    def score(truth, guess, weights, sinus, groups=None, **_):
        said.append((guess.tolist(), groups))
        return 0.0, None

    monkeypatch.setattr(finetune, "challenge_score", score)
    labels = label_set("cpsc2018")
    labels = replace(labels, names={"AFIB": "x"}, codes={"AFIB": ("x",)})
    dataset, weights = Dataset(labels=labels, splits=rows, origin=""), np.eye(1)
    finetune.finetune(model, dataset, stores, None, leads="P-2", weights=weights, sinus=0, bootstrap=0)
    guess = [[False], [True]]  # the threshold is one half; patients are resampled whole
    assert said == [(guess, None), (guess, ["a", "b"])]
    parts = np.split([name for name, _ in log], calls)
    assert [set(part) for part in parts] == [{"train"}, {"validation"}, {"test"}]
    assert shown and all(ecg[:, :2].any() and not ecg[:, 2:].any() for ecg in shown)


def test_identification_compares_two_records_and_sees_only_its_leads(model, shown, monkeypatch):
    people = Identities(train={0: "p", 1: "q"}, validation=[(2, 2)], test=[(3, 4), (5, 6)], origin="")
    log, calls = [], []
    store = Store("all", [0, 1, 2, 2, 3, 3, 4, 5, 6, 6], log)
    monkeypatch.setattr(identify, "fit", once(log, calls))
    identify.identify(model, people, store, None, leads="P-1", bootstrap=0)
    read = [rows for _, rows in log]
    assert read == [[0, 1], [2], [3], [4, 7], [6, 8]]  # validation: two segments of a record; test: gallery and probe
    assert shown and all(ecg[:, :1].any() and not ecg[:, 1:].any() for ecg in shown)
