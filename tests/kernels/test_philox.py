"""Philox4x32-10 against the published known answers (Random123), and what the draws promise."""

import pytest
import torch

from dbeta_kernels import philox

ONES = 0xFFFFFFFF


def test_known_answers():
    zero = torch.zeros(1, dtype=torch.int64)
    answers = {
        (0, (zero, 0, 0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (2**64 - 1, (zero + ONES, ONES, ONES, ONES)): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x299F31D0A4093822, (zero + 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)): (
            0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
        ),
    }  # fmt: skip
    for (seed, counter), expected in answers.items():
        assert tuple(int(word) for word in philox.philox(seed, *counter)) == expected


def test_a_draw_depends_on_its_row_alone():
    rows = torch.arange(10)
    whole = philox.words(7, philox.LEAD_MASK, 3, rows, 12)
    assert torch.equal(whole[4:7], philox.words(7, philox.LEAD_MASK, 3, rows[4:7], 12))
    assert torch.equal(whole[:, :5], philox.words(7, philox.LEAD_MASK, 3, rows, 5))
    assert torch.equal(whole, philox.words(7, philox.LEAD_MASK, torch.tensor(3), rows, 12))


@pytest.mark.parametrize("seed", [0, 7, (1 << 40) + 17])
@pytest.mark.parametrize(("step", "count"), [(0, 1), (3, 312), (2**32 - 1, 1030)])
def test_the_kernel_draws_the_same(seed, step, count, device):
    for rows in (torch.arange(3) * 5 + 2, torch.tensor(9), torch.arange(8)[::2], torch.arange(0)):
        for stream in (philox.ECG_MASK, philox.MLM_REPLACE):
            drawn = philox.launched(seed, stream, step, rows.to(device), count)
            assert torch.equal(drawn.cpu(), philox.words(seed, stream, step, rows, count))


def test_streams_steps_and_seeds_differ():
    rows = torch.arange(64)
    drawn = [philox.words(*key, rows, 4) for key in ((7, 0, 3), (7, 1, 3), (7, 0, 4), (8, 0, 3))]
    assert len({tuple(words.flatten().tolist()) for words in drawn}) == 4


def test_uniform_is_uniform():
    drawn = philox.uniform(1, philox.ECG_MASK, 0, torch.arange(1000), 312)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.002 and abs(drawn.var() - 1 / 12) < 0.001
