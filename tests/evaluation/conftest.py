"""A synthetic corpus and an untrained model of smoke size."""

import pytest
import torch


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    from dbeta.data.corpus import Corpus
    from dbeta.data.prepare import prepare

    folder = tmp_path_factory.mktemp("evaluation") / "synthetic"
    prepare("synthetic", None, folder, limit=240, workers=1)
    return Corpus.open(folder)


@pytest.fixture(scope="session")
def model(synthetic):
    from dbeta.config import Config
    from dbeta.data.tokenizer import load_tokenizer
    from dbeta.models.dbeta import DBeta

    config = Config.load("smoke", ["runtime.device=cpu"])
    torch.manual_seed(0)
    tokenizer = load_tokenizer("corpus", synthetic, max_vocabulary=config.model.text_vocab)
    return DBeta(config.model, config.runtime, tokenizer=tokenizer).eval()
