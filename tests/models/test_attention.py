"""The attention facade: layouts of packed text, the choice of a back-end, the relative bias."""

import sys
import types

import pytest
import torch

from dbeta import runtime
from dbeta.models import attention
from dbeta.models.attention import BACKENDS, Rows, attend, resolve_backend


def mask_of(*lengths: int, longest: int) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("capacity", [10, 13, 24])
def test_packed_rows(capacity):
    mask = mask_of(3, 1, 6, longest=8)
    rows = Rows.packed(mask, capacity)
    grid = torch.arange(24.0).view(3, 8, 1)
    packed = rows.pack(grid)
    assert packed.shape == (capacity, 1)
    assert torch.equal(packed[:10], grid[mask])  # the tokens in order, then filler
    assert torch.equal(rows.unpack(packed)[mask], grid[mask])
    cells = torch.tensor([0, 8, 16, 18])
    assert torch.equal(rows.take(packed, cells), grid.flatten(0, 1)[cells])
    chosen = rows.select(torch.tensor([18, 0, 0]))
    assert torch.equal(chosen.unpack(chosen.pack(grid)).flatten()[[0, 18]], torch.tensor([0.0, 18.0]))


def test_too_small_a_capacity_is_loud():
    """The host said fewer tokens than there are: an error, not a text that silently loses its end."""
    mask = mask_of(3, 4, longest=4)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        Rows.packed(mask, 6).pack(torch.zeros(2, 4, 1))


def test_resolve_on_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("auto") == "sdpa"
    for name in ("sdpa-flash", "sdpa", "reference"):
        assert resolve_backend(name) == name
    with pytest.raises(ValueError, match=r"flash-attn needs (the flash-attn package|a CUDA GPU)"):
        resolve_backend("flash-attn")
    with pytest.raises(ValueError, match="'xformers'; accepted: auto, flash-attn"):
        resolve_backend("xformers")


def test_missing_package_is_announced_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(runtime, "_announced", set())
    assert [resolve_backend("auto"), resolve_backend("auto")] == ["sdpa-flash"] * 2
    said = capsys.readouterr().err
    assert said.count("sdpa-flash") == 1 and "flash-attn is not installed" in said
    assert resolve_backend("auto", "cpu") == "sdpa"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flash-attn"])
def test_back_ends_agree_and_skip_masked_keys(backend):
    torch.manual_seed(0)
    mask = mask_of(5, 1, 9, longest=9)
    rows = Rows.packed(mask, 17)
    q = torch.randn(3, 4, 2, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 9, 2, 8, dtype=torch.float64)
    expected = torch.stack([
        torch.stack([(q[b, :, h] @ k[b, : int(n), h].T / 8**0.5).softmax(-1) @ v[b, : int(n), h] for h in range(2)], 1)
        for b, n in enumerate(mask.sum(1))
    ])  # fmt: skip
    grid = attend(q, k, v, key_rows=Rows(mask), backend=backend)
    packed = attend(q, rows.pack(k), rows.pack(v), key_rows=rows, backend=backend)
    torch.testing.assert_close(grid, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-12)
    poisoned = k.masked_fill(~mask[..., None, None], 1e9), v.masked_fill(~mask[..., None, None], 1e9)
    assert torch.equal(attend(q, *poisoned, key_rows=Rows(mask), backend=backend), grid)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_dropout_drops_weights_and_keeps_the_mean(backend):
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, 60, 4, 8)
    v = torch.ones_like(k)
    out = attend(q, k, v, dropout=0.25, backend=backend)
    assert out.std() > 0.02
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)


def plain(q, k, v, *, dropout_p, softmax_scale, deterministic):
    return attend(q, k, v, scale=softmax_scale, backend="reference")


def varlen(q, k, v, q_ends, k_ends, q_longest, k_longest, *, dropout_p, softmax_scale, deterministic):
    """What flash_attn documents: sequences between the ends; rows beyond the longest, or outside, are not written."""
    assert len(q_ends) == len(k_ends) and q_ends.dtype == k_ends.dtype == torch.int32
    out = torch.full_like(q, float("nan"))
    for (q0, q1), (k0, k1) in zip(q_ends.unfold(0, 2, 1).tolist(), k_ends.unfold(0, 2, 1).tolist()):
        assert 0 <= q0 <= q1 <= min(len(q), q0 + q_longest) and 0 <= k0 <= k1 <= min(len(k), k0 + k_longest)
        scores = torch.einsum("qhe,khe->hqk", q[q0:q1], k[k0:k1]) * softmax_scale
        part = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[k0:k1])  # no keys: 0
        out = torch.cat((out[:q0], part, out[q1:]))
    return out


@pytest.mark.parametrize("layout", ["grid", "packed", "filler", "selected"])
def test_flash_attn_is_given_every_row_once(monkeypatch, layout):
    """The package's interface on a stand-in that leaves what it is not told to compute NaN, as the package may."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = varlen
    stand_in.flash_attn_func = plain
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    torch.manual_seed(0)
    mask = mask_of(5, 1, 8, longest=9)
    keys = Rows(mask) if layout == "grid" else Rows.packed(mask, 27 if layout == "filler" else 14)
    queries = keys.select(torch.tensor([0, 9, 18, 3, 20, 0, 0])) if layout == "selected" else keys
    results = []
    for call in (
        lambda q, k, v, a, b: attend(q, k, v, rows=a, key_rows=b, backend="reference"),
        lambda q, k, v, a, b: attention._flash_package(q, k, v, a, b, 8**-0.5, 0.0),
    ):
        q, k, v, ecg = (
            torch.randn(3, t, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(t)).requires_grad_()
            for t in (9, 9, 9, 4)
        )
        own = call(queries.pack(q), keys.pack(k), keys.pack(v), queries, keys)
        cross = call(ecg, keys.pack(k), keys.pack(v), None, keys)
        reverse = call(queries.pack(q), ecg, ecg, queries, None)
        assert own.isfinite().all() and reverse.isfinite().all()
        if layout == "selected":
            out = torch.cat((own, reverse, cross.flatten(0, 1)))
        else:
            out = torch.cat((keys.unpack(own)[mask], keys.unpack(reverse)[mask], cross.flatten(0, 1)))
        (out * torch.linspace(-1, 1, len(out), dtype=out.dtype)[:, None, None]).sum().backward()
        results.append((out, q.grad, k.grad, v.grad, ecg.grad))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_never_cudnn(backend, biased, deterministic, monkeypatch):
    """PyTorch's first choice on Hopper: it refuses a bias that wants a gradient, and some masks give it NaN."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with attention._pinned(backend, True, biased):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled() or not biased


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash-attn", "sdpa-flash", "sdpa"])
@pytest.mark.parametrize("capacity", [None, 15, 40])
def test_gpu_back_ends(backend, capacity):
    """bf16 on the device against float64, forward and gradients, packed with filler too."""
    try:
        resolve_backend(backend)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    mask = mask_of(5, 1, 9, longest=16)
    grids = [torch.randn(3, 16, 2, 64, dtype=torch.float64) for _ in range(4)]
    results = []
    for dtype, device, name in ((torch.float64, "cpu", "reference"), (torch.bfloat16, "cuda", backend)):
        here = mask.to(device)
        rows = Rows(here) if capacity is None else Rows.packed(here, capacity)
        q, k, v = (g.to(device, dtype).detach().requires_grad_() for g in grids[:3])
        ecg = torch.ones(3, 7, 2, 64, dtype=dtype, device=device, requires_grad=True)
        own = attend(rows.pack(q), rows.pack(k), rows.pack(v), rows=rows, key_rows=rows, backend=name)
        cross = attend(ecg, rows.pack(k), rows.pack(v), key_rows=rows, backend=name)
        reverse = attend(rows.pack(q), ecg, ecg, rows=rows, backend=name)
        out = torch.cat([rows.unpack(x)[here].flatten() for x in (own, reverse)] + [cross.flatten()])
        (out * torch.linspace(-1, 1, len(out), dtype=dtype, device=device)).sum().backward()
        results.append([x.double().cpu() for x in (out, q.grad, k.grad, v.grad, ecg.grad)])
    for truth, found in zip(*results):
        torch.testing.assert_close(found, truth, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [16, 64])
def test_a_bias_on_the_gpu(longest):
    """T5's: learned, unscaled, with the key mask in it; bf16 on the device against float64, all gradients."""
    mask = mask_of(longest, 1, 9, longest=longest)
    generator = torch.Generator().manual_seed(0)
    grids = [torch.randn(3, longest, 2, 64, dtype=torch.float64, generator=generator) / 4 for _ in range(4)]
    learned = torch.randn(1, 2, longest, longest, dtype=torch.float64, generator=generator)
    results = []
    for dtype, device, name in ((torch.float64, "cpu", "reference"), (torch.bfloat16, "cuda", "sdpa-flash")):
        q, k, v, upstream, bias = (x.to(device, dtype).detach().requires_grad_() for x in (*grids, learned))
        masked = bias.masked_fill(~mask.to(device)[:, None, None, :], -torch.inf)
        out = attend(q, k, v, bias=masked, scale=1.0, backend=name)
        results.append([x.double().cpu() for x in (out, *torch.autograd.grad(out, (q, k, v, bias), upstream))])
    for truth, found in zip(*results):
        torch.testing.assert_close(found, truth, rtol=3e-2, atol=3e-2)
