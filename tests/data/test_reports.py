"""Joining, cleaning and tokenising reports: real texts of MIMIC-IV-ECG and PTB-XL, and T5's genuine vocabulary."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dbeta.data.reports import TokenTable, join, normalise, token_table
from dbeta.data.tables import load_arrays
from dbeta.data.tokenizer import MAX_TOKENS, load_tokenizer, train


@pytest.fixture(scope="module")
def texts(shared) -> list[str]:
    """The distinct cleaned reports of 10,720 PTB-XL records: German, English, Swedish."""
    with open(shared / "data/ptbxl-text/ptbxl_metadata_union.csv", newline="") as file:
        return sorted({normalise(row["report"]) for row in csv.DictReader(file)})


@pytest.fixture(scope="module")
def t5(shared):
    return load_tokenizer(shared / "data/t5-tokenizer")


def test_join_of_a_mimic_row(shared):
    with open(shared / "data/mimic-iv-ecg/machine_measurements.csv", newline="") as file:
        row = next(csv.DictReader(file))
    cells = [row[f"report_{i}"] for i in range(18)]
    assert join(cells) == "Sinus rhythm Possible right atrial abnormality Borderline ECG"
    assert join([None, float("nan"), "  ", " a ", "b"]) == "a b"
    assert join([]) == ""


@pytest.mark.parametrize(
    ("text", "paper", "released"),
    [
        ("Sinus rhythm.  Normal EKG\n", "sinus rhythm normal ecg", "sinus rhythm. normal ecg"),
        ("*** Age not entered, 50 ***", "age not entered 50", "age not entered, 50"),
        ("--- WARNING: DATA QUALITY ---", "warning data quality", "warning: data quality"),
        ("ST-T in V4,5,6", "st t in v4 5 6", "st-t in v4,5,6"),
        ("contraction(s). PR 0.24 s", "contraction s pr 0.24 s", "contraction(s). pr 0.24 s"),
        ("QT-VerlÄngerung; fÖr_Ändring", "qt verlängerung för ändring", "qt-verlängerung; för_ändring"),
        ("1.Grades 4.46.", "1 grades 4.46", "1.grades 4.46."),
        ("gro\u0308\u00dfer > 5/min", "größer 5 min", "größer > 5/min"),  # o + combining dots composes
        ("Niederspannungs-EKG", "niederspannungs ecg", "niederspannungs-ecg"),
        ("= - =", "", "-"),  # only the ends, and not twice
        ("", "", ""),
    ],
)
def test_normalise(text, paper, released):
    assert normalise(text, "paper") == paper
    assert normalise(text, "released") == released


def test_normalise_is_idempotent_and_names_its_modes(texts):
    assert all(normalise(text) == text for text in texts)
    with pytest.raises(ValueError, match=r"'none'; accepted: paper, released"):
        normalise("x", "none")


def test_the_228_real_records_have_146_reports(shared):
    with open(shared / "data/ptbxl/ptbxl_database.csv", newline="") as file:
        raw = [row["report"] for row in csv.DictReader(file)]
    assert len(raw) == 228
    assert len({normalise(text, "paper") for text in raw}) == 146


def test_t5_tokenizer_is_transformers_and_sentencepieces(t5, texts, shared):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(shared / "data/t5-tokenizer/spiece.model"))
    rows = t5.encode_batch(texts)
    assert rows == [[*model.encode(text)[: MAX_TOKENS - 1], 1] for text in texts]
    assert (t5.pad, t5.eos, t5.unk, t5.mask, t5.vocab_size) == (0, 1, 2, 32099, 32100)
    assert set(t5.special_ids) == {0, 1, 2, *range(32000, 32100)}
    long = t5.encode_batch(["sinus rhythm " * 300])[0]
    assert len(long) == MAX_TOKENS and long[-1] == t5.eos


def test_sentencepiece_model_alone_gives_the_same_ids(t5, texts, shared, tmp_path):
    (tmp_path / "spiece.model").write_bytes((shared / "data/t5-tokenizer/spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert load_tokenizer(tmp_path).encode_batch(texts[::50]) == t5.encode_batch(texts[::50])


def test_gather_pads_as_transformers_does(t5, texts):
    table = TokenTable.build(texts, t5, chunk=1000)
    assert table.ids.dtype == torch.int32 and table.offsets.dtype == torch.int64 and len(table) == len(texts)
    reports = torch.tensor([5, len(texts) - 1, 0, 5])
    expected = t5.encode_batch([texts[i] for i in reports])
    longest = int(table.lengths[reports].max())
    ids, mask = table.gather(reports, longest + 3)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == (4, longest + 3)
    for row, real, tokens in zip(ids, mask, expected):
        assert row[real].tolist() == tokens and not row[~real].any() and real[: len(tokens)].all()
    assert table.gather(reports, 4)[0].tolist() == [(tokens + [0] * 4)[:4] for tokens in expected]


def test_gather_compiles_without_graph_breaks():
    table = TokenTable(torch.arange(10, dtype=torch.int32), torch.tensor([0, 4, 4, 10]), pad=77)
    compiled = torch.compile(table.gather, fullgraph=True, backend="aot_eager")
    ids, mask = compiled(torch.tensor([2, 1, 0]), 5)
    assert ids.tolist() == [[4, 5, 6, 7, 8], [77] * 5, [0, 1, 2, 3, 77]]
    assert mask.sum(1).tolist() == [5, 0, 4]


def test_token_table_is_kept_and_made_anew_for_other_reports(tmp_path):
    corpus = SimpleNamespace(path=tmp_path, reports=["sinus rhythm", "atrial flutter with block"])
    tokenizer = load_tokenizer("corpus", corpus)
    first = token_table(corpus, tokenizer)
    (kept,) = tmp_path.glob("tokens-*.npz")
    stamp = kept.stat().st_mtime_ns
    again = token_table(corpus, tokenizer)
    assert kept.stat().st_mtime_ns == stamp and torch.equal(first.ids, again.ids)
    corpus.reports = ["sinus rhythm"]
    assert len(token_table(corpus, tokenizer)) == 1 and kept.stat().st_mtime_ns != stamp
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match="delete it"):
        load_arrays(kept, ("ids",))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # no temporary file is left


def test_trained_tokenizer_round_trip(texts, tmp_path):
    tokenizer = train(texts)
    assert (tokenizer.pad, tokenizer.eos, tokenizer.unk, tokenizer.mask) == (0, 1, 2, 3)
    assert tokenizer.special_ids == (0, 1, 2, 3) and tokenizer.vocab_size <= 4096
    plain = [text for text in texts if text.isascii() or "ä" in text]
    rows = tokenizer.encode_batch(plain)
    assert len(plain) > 5000 and all(row[-1] == 1 and 2 not in row for row in rows)
    assert np.mean([tokenizer.decode(row) == text for row, text in zip(rows, plain)]) > 0.999
    assert len(tokenizer.encode_batch(["sinus rhythm " * 300])[0]) == MAX_TOKENS
    assert tokenizer.encode_batch(["zebra"])[0][-1] == 1 and 2 not in tokenizer.encode_batch(["Zebra"])[0]
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.fingerprint == tokenizer.fingerprint == train(texts).fingerprint
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert theirs(plain[:20])["input_ids"] == rows[:20] and theirs.mask_token_id == 3


def test_trained_tokenizer_is_kept_in_the_corpus_and_fits_the_model(texts, tmp_path, capsys):
    corpus = SimpleNamespace(path=tmp_path, reports=texts)
    small = load_tokenizer("corpus", corpus, max_vocabulary=1024)
    assert small.vocab_size == 1024 and "was trained on" in capsys.readouterr().err
    corpus.reports = ["something else"]  # read back, not trained again
    assert load_tokenizer("corpus", corpus, max_vocabulary=1024).fingerprint == small.fingerprint
    assert load_tokenizer("corpus", corpus).vocab_size < 1024  # another size is another tokenizer


def test_errors_are_one_line_and_name_the_option(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for spec, word in [
        ("google/no-such-tokenizer", "cannot be downloaded"),
        (tmp_path, "tokenizer.json"),
        ("bad///name", "Hugging Face cache"),
        ("corpus", "--data"),
    ]:
        with pytest.raises(ValueError, match=r"data\.tokenizer=DIR") as error:
            load_tokenizer(spec)
        assert word in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"32100 ids.*model.text_vocab=32128"):
        load_tokenizer(shared / "data/t5-tokenizer", max_vocabulary=1024)
