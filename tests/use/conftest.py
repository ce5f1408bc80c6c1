"""A model of the paper's width and input that is small in everything else, with a tokenizer; as a folder."""

import pytest
import torch

from dbeta import DBeta
from dbeta.config import ModelConfig
from dbeta.data.tokenizer import train

WIDE = ModelConfig(
    stem_width=32, ecg_layers=1, ecg_ffn=64, pos_kernel=16, text_vocab=90, text_width=24, text_layers=1, text_heads=2,
    text_head_width=8, text_ffn=40, fusion_layers=1, fusion_ffn=64, mem_tap=0, mem_width=24, mem_layers=1, mem_heads=2,
    mem_ffn=40,
)  # fmt: skip
TEXTS = ["sinus rhythm normal ecg", "atrial fibrillation", "left bundle branch block"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    DBeta(WIDE, tokenizer=train(TEXTS, 90)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model(folder):
    return DBeta.from_pretrained(folder)


@pytest.fixture(scope="session")
def paths(shared):
    """A real record of each format."""
    data = shared / "data"
    return {
        "WFDB .dat": data / "ptbxl/records500/00000/00001_hr.dat",
        "WFDB .mat": data / "cinc2021/georgia/E00001.mat",
        "CPSC .mat": data / "cpsc2018-native/A1980.mat",
        "CODE-15 .mat": next((data / "code15-sample").glob("*.mat")),
        "SPH .h5": data / "sph/SPH00001.h5",
    }
