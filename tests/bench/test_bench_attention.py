"""The attention benchmark: a row for every shape, back-end and dropout, behind a check."""

import itertools

import pytest
import torch

from dbeta.models.attention import attend
from dbeta_bench import attention, results

SHAPES = {"ecg 5": (5, 5, False), "ecg 5 x text 4": (5, 4, True)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attention, "SHAPES", SHAPES)


def test_rows(monkeypatch):
    seen = set()

    def recording(*args, backend, dropout, **options):
        seen.add((backend, str(dropout)))
        return attend(*args, backend=backend, dropout=dropout, **options)

    monkeypatch.setattr(attention, "attend", recording)
    said = []
    rows = attention.run(batch=2, repeats=2, say=said.append)
    timed = {(row["backend"], row["dropout"]) for row in rows}
    assert timed == seen == set(itertools.product(("sdpa-flash", "sdpa", "reference"), ("0.0", "0.1")))
    assert len(rows) == len(SHAPES) * len(timed)
    assert all(row["ms"] > 0 for row in rows)
    assert "flash-attn: not run" in said[0]
    document = results.document("cpu", {"attention": rows})
    assert all("ms" in line for line in results.compare(document, document))
    assert len({results._identity(row) for row in rows}) == len(rows)


def test_no_time_for_a_wrong_backend(monkeypatch):
    monkeypatch.setattr(attention, "TOLERANCE", dict.fromkeys(attention.TOLERANCE, -1.0))
    with pytest.raises(ArithmeticError, match="no time is given"):
        attention.run(batch=1, repeats=1)


def test_the_check_admits_bf16():
    """Short texts make large gradients of v, of which bf16 keeps 8 bits."""
    inputs = attention._inputs(24, 79, 40, True, torch.bfloat16, torch.device("cpu"))
    found, truth = (attention._step(inputs, name) for name in ("sdpa", "reference"))
    assert attention._error(found, truth) < attention.TOLERANCE[torch.bfloat16] / 2
    assert max((a - b).abs().max() for a, b in zip(found, truth)) > 0.05
