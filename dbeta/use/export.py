"""The ECG encoder for other runtimes: ``torch.export`` (.pt2) and ONNX (.onnx), each checked against eager PyTorch."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dbeta.files import must_be_writable
from dbeta.models.dbeta import DBeta
from dbeta.models.ecg_encoder import ConvStem, EcgEncoder, PositionalConv
from dbeta.models.layers import Attention

TOLERANCE = 1e-4  # largest difference of a feature, which lies within (-1, 1)
KINDS = (".pt2", ".onnx")
RECORDS = ({0: torch.export.Dim("records", min=1, max=4096)},)  # the dimension that stays free


class EcgFeatures(nn.Module):
    """ECG float32 [B, C, L] mV -> features [B, D], of plain PyTorch operators; shares the weights of the model."""

    def __init__(self, model: DBeta):
        super().__init__()
        with torch.device("meta"):
            self.encoder = EcgEncoder(model.config)
        self.encoder.load_state_dict(model.ecg_encoder.state_dict(), assign=True)
        for module in self.encoder.modules():
            if isinstance(module, Attention):
                module.backend = "sdpa"
            elif isinstance(module, ConvStem | PositionalConv):
                module.backend = "reference"
        self.projection, self.pooler = model.ecg_projection, model.ecg_pooler
        self.eval()

    def forward(self, ecg: Tensor) -> Tensor:
        """The features that ``encode_ecg`` gives."""
        return self.pooler(self.projection(self.encoder(ecg)[:, 0]))


def export(model: DBeta, out: Path) -> float:
    """Write the ECG encoder, with any number of records in a batch; returns the largest difference from eager.

    Raises:
        ValueError: another ending, or no place to write to.
        ImportError: ``.onnx`` without the packages onnxscript and onnxruntime.
        ArithmeticError: the written file gives other features; it is removed.
    """
    must_be_writable(out, KINDS)
    model = model.cpu().float()
    plain = EcgFeatures(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = (_torch if out.suffix == ".pt2" else _onnx)(plain, _ecg(model, 2), out)
    worst = 0.0
    with torch.no_grad():
        for batch in (1, 3):
            ecg = _ecg(model, batch)
            worst = max(worst, (run(ecg) - model.encode_ecg(ecg)).abs().max().item())
    if not worst <= TOLERANCE:
        out.unlink()
        raise ArithmeticError(f"{out.name} differs from PyTorch by {worst:.1e}, more than {TOLERANCE:g}; not kept")
    return worst


def _ecg(model: DBeta, batch: int) -> Tensor:
    """Noise of the size of an ECG."""
    shape = (batch, model.config.leads, model.config.samples)
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(batch))


def _torch(plain: EcgFeatures, ecg: Tensor, out: Path):
    with torch.no_grad():
        program = torch.export.export(plain, (ecg,), dynamic_shapes=RECORDS)
    torch.export.save(program, out)
    return torch.export.load(out).module()


def _onnx(plain: EcgFeatures, ecg: Tensor, out: Path):
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ImportError(f"{out} needs {error.name}: pip install dbeta[onnx], or export to .pt2") from None
    with torch.no_grad():
        torch.onnx.export(
            plain, (ecg,), out, input_names=["ecg"], output_names=["features"], dynamic_shapes=RECORDS,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"ecg": batch.numpy()})[0])
