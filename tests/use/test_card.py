"""The model card: data, settings, results, licence; never a report's text. And the hub."""

from pathlib import Path

import huggingface_hub
import pytest

from dbeta import DBeta
from dbeta.config import Config
from dbeta.data.corpus import Corpus
from dbeta.data.prepare import prepare
from dbeta.models.card import about_run


def test_card_of_a_run(model, tmp_path):
    prepare("synthetic", None, tmp_path / "secret-place", limit=40, workers=1)
    corpus = Corpus.open(tmp_path / "secret-place")
    config = Config.load("smoke", ["train.steps=7"])
    again = DBeta(model.config, about=about_run(config, corpus, 7, {"total": 3.25, "zero_shot_auc": 0.51}))
    again.about["evaluation"] = [
        {"task": "zero-shot", "title": "PTBXL-Form", "leads": "12", "metric": "macro AUC", "value": 0.5, "low": 0.4,
         "high": 0.6, "fraction": None, "seed": None, "records": 9},
        {"task": "zero-shot", "title": "CSN", "leads": "12", "metric": "macro AUC", "value": None},
    ]  # fmt: skip
    again.about["licence"] = "cc-by-4.0"
    again.save_pretrained(tmp_path / "model")
    again = DBeta.from_pretrained(tmp_path / "model")  # what is known of a model goes with it
    again.save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert card == (tmp_path / "model" / "README.md").read_text()
    for line in (
        "license: cc-by-4.0", "| name | synthetic |", "| records | 40 |", "| train.steps | 7 |", "| preset | smoke |",
        "| zero_shot_auc | 0.51 |", "| zero-shot | PTBXL-Form | 12 |  | macro AUC | 0.5000 | 0.4000-0.6000 | 9 |",
    ):  # fmt: skip
        assert line in card
    assert "CSN" not in card, "what was not measured is not shown"
    everything = card + (tmp_path / "again" / "config.json").read_text()
    assert "secret-place" not in everything and not any(report in everything for report in corpus.reports)


def test_card_without_origin(folder):
    card = (folder / "README.md").read_text()
    assert "license: other" in card and "nobody has stated a licence" in card and "None recorded." in card


def test_push_to_hub(model, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, private, exist_ok):
            calls["private"] = private
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls["files"] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("me/model") == "https://hub/me/model"
    assert calls["private"] and {"README.md", "config.json", "model.safetensors", "tokenizer"} <= calls["files"]
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("401 Unauthorized")))
    with pytest.raises(ValueError, match=r"401 Unauthorized.*hf auth login"):
        model.push_to_hub("me/model")
