"""A small network and a ragged batch, for tests of the step."""

import torch

from dbeta.config import ModelConfig, RuntimeConfig
from dbeta.data.batch import Batch
from dbeta.models.dbeta import DBeta

SMALL = ModelConfig(
    samples=640, width=32, stem_width=16, ecg_layers=2, ecg_heads=4, ecg_ffn=48, pos_kernel=8, pos_groups=4,
    text_vocab=90, text_width=24, text_layers=2, text_heads=2, text_head_width=8, text_ffn=40,
    fusion_layers=3, fusion_heads=4, fusion_ffn=48, mem_tap=1, mem_width=12, mem_layers=2, mem_heads=2, mem_ffn=40,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LENGTHS = (17, 1, 254, 60)
TOKENS = sum(LENGTHS)


def batch_of(config: ModelConfig, lengths=LENGTHS, text_tokens: int | None = None, spare: int = 3) -> Batch:
    """A ragged float64 batch; ``spare`` MLM slots are unused."""
    generator = torch.Generator().manual_seed(1)
    rows, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    hidden = mask & (torch.rand(mask.shape, generator=generator) < 0.25)
    hidden[0, 0] = True  # the cell that unused slots point to
    positions = hidden.flatten().nonzero()[:, 0]
    ids = torch.randint(3, config.text_vocab, mask.shape, generator=generator) * mask
    labels = torch.randint(3, config.text_vocab, positions.shape, generator=generator)
    ecg = torch.randn(rows, config.leads, config.samples, generator=generator, dtype=torch.float64)
    reports = torch.tensor([5, 9, 5, 2])[:rows]
    return Batch(
        records=torch.arange(rows), ecg=ecg, signal=ecg.roll(1, 1), gain=None, baseline=None,
        mean=ecg.mean(-1) + 0.1, rstd=1 / ecg.std(-1), reports=reports, text_reports=reports,
        aligned=torch.tensor([True, False, True, True])[:rows], text_ids=ids, text_mask=mask,
        mlm_positions=torch.nn.functional.pad(positions, (0, spare)),
        mlm_labels=torch.nn.functional.pad(labels, (0, spare), value=-100),
        noise=torch.rand(rows, config.ecg_tokens, generator=generator), text_tokens=text_tokens,
    )  # fmt: skip


def network(config: ModelConfig, runtime: RuntimeConfig) -> DBeta:
    torch.manual_seed(0)
    model = DBeta(config, runtime).double()
    with torch.no_grad():  # zero biases and unit gains would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
    return model
