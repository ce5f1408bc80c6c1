"""The error budget of KERNELS section 3, for every operator of the registry, case and dtype."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbeta_kernels.checking import assert_deterministic, check, guarded, mutated, poisoned_empty, strided
from dbeta_kernels.registry import OPERATORS, specs

SPECS = specs()
CASES = [pytest.param(spec, case, id=f"{name}-{case}") for name, spec in SPECS.items() for case in spec.cases]
PAPER = [pytest.param(spec, case, id=f"{name}-{case}") for name, spec in SPECS.items() for case in spec.paper]
MUTANTS = [pytest.param(spec, name, id=f"{spec.name}-{name}") for spec in SPECS.values() for name in spec.mutants]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dtypes(spec, device):
    return [d for d in spec.dtypes if device == "cuda" or d in spec.interpreted]


def test_every_operator_is_registered():
    assert tuple(SPECS) == OPERATORS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_case(spec, case, dtype, device):
    if dtype not in dtypes(spec, device):
        pytest.skip(f"{dtype} is not {'computed' if device == 'cuda' else 'interpreted rightly'}")
    inputs = spec.make(dtype, device, 0, **spec.cases[case])
    with poisoned_empty():
        check(spec, inputs, dtype)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_any_strides(spec, case, device):
    dtype = spec.dtypes[0]
    check(spec, strided(spec.make(dtype, device, 3, **spec.cases[case])), dtype)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_two_runs_agree(spec, case, device):
    if not spec.deterministic:
        pytest.skip(f"{spec.name} is not declared deterministic")
    assert_deterministic(spec, spec.make(spec.dtypes[0], device, 4, **spec.cases[case]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), PAPER)
def test_paper_size(spec, case, dtype):
    check(spec, spec.make(dtype, "cuda", 0, **spec.paper[case]), dtype, paper=True, slack=spec.slack)


def check_drawn(spec, data, device, slack=0.0):
    options = {name: data.draw(st.integers(*bounds), label=name) for name, bounds in spec.ranges.items()}
    dtype = data.draw(st.sampled_from(dtypes(spec, device)), label="dtype")
    seed = data.draw(st.integers(0, 2**20), label="seed")
    with poisoned_empty():
        check(spec, spec.make(dtype, device, seed, **options), dtype, slack=slack)


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@settings(max_examples=12, derandomize=True, **QUIET)
@given(data=st.data())
def test_drawn_shapes(spec, device, data):
    check_drawn(spec, data, device)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@settings(max_examples=300, **QUIET)
@given(data=st.data())
def test_many_drawn_shapes(spec, device, data):
    check_drawn(spec, data, device, slack=3.0)


@pytest.mark.parametrize(
    ("name", "seed", "options"),
    [
        ("ets_loss", 52, {"rows": 55, "columns": 2, "width": 2, "offset": 0}),
        ("conv_stem", 4, {"records": 1, "leads": 1, "samples": 279, "width": 1, "layers": 3}),
    ],
)
def test_where_terms_cancel(name, seed, options, interpreter):
    """Drawn once: an element here is a small difference of large terms, each rounded to 11 bits by either side."""
    check(SPECS[name], SPECS[name].make(torch.float16, "cpu", seed, **options), torch.float16, slack=3.0)


@pytest.mark.parametrize(("spec", "name"), MUTANTS)
def test_mutant_fails(spec, name, interpreter):
    """A wrong kernel fails the test above: the test can see the line that was changed."""
    mutant = spec.mutants[name]
    dtype = spec.dtypes[0]
    inputs = spec.make(dtype, "cpu", 0, **spec.cases[mutant.case])
    fails = pytest.raises(AssertionError, match=r"^(out\d|grad |outside )")
    with mutated(spec, mutant), poisoned_empty(), fails, guarded():
        check(spec, inputs, dtype)
