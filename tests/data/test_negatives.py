"""N3S: exact farthest reports by either engine, fair ties, hubness and its remedies, the file in the corpus."""

import csv
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dbeta.data import farthest, negatives
from dbeta.data.embedding import encoder_embedding, hash_embedding, load_encoder, mean_token, unit
from dbeta.data.negatives import NegativeTable, build_negatives, hubness, load_negatives
from dbeta.data.reports import TokenTable, digest, normalise
from dbeta.data.tokenizer import train

ENGINES = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(farthest._faiss_lacks(False) != "", reason="no FAISS")),
]


def random_unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def ptb_xl(shared) -> list[str]:
    """The distinct cleaned reports of the 228 real records."""
    with open(shared / "data/ptbxl/ptbxl_database.csv", newline="") as file:
        return sorted({normalise(row["report"]) for row in csv.DictReader(file)})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["gauss", "clustered", "anisotropic", "exact_ties"])
def test_recorded_searches(shared, case, engine):
    recorded = np.load(shared / "parity/n3s_cases.npz")
    keys, queries = (unit(torch.from_numpy(recorded[f"{case}/{name}"])) for name in ("emb", "queries"))
    products, ids = farthest.smallest_products(queries, keys, 64, engine)
    expected = torch.from_numpy(recorded[f"{case}/top64_ids_ascending_L2"])
    exact = queries.double() @ keys.double().T
    torch.testing.assert_close(
        exact.gather(1, ids).sort().values, exact.gather(1, expected).sort().values, atol=3e-7, rtol=0
    )
    torch.testing.assert_close(products.double(), exact.gather(1, ids), atol=3e-7, rtol=0)
    if case != "exact_ties":
        assert [set(row) for row in ids.tolist()] == [set(row) for row in expected.tolist()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rows", "k"), [(3001, 8), (700, 64), (130, 128)])
def test_both_engines_find_the_farthest(rows, k, engine):
    vectors = random_unit(rows, 24)
    made = build_negatives(vectors, k, engine=engine)
    exact = vectors.double() @ vectors.double().T
    exact.fill_diagonal_(torch.inf)
    found = exact.gather(1, torch.from_numpy(made.table).long())
    torch.testing.assert_close(found, exact.sort().values[:, :k], atol=3e-7, rtol=0)
    np.testing.assert_allclose(made.similarity, found, atol=3e-7)
    assert made.table.dtype == np.int32 and made.similarity.dtype == np.float32
    assert all(len(set(row)) == k for row in made.table.tolist())
    assert not (made.table == np.arange(rows)[:, None]).any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["all cosines 0", "all cosines 1"])
def test_equal_cosines_do_not_go_to_the_same_reports(kind, engine):
    rows, k = 600, 16
    vectors = torch.eye(rows) if kind == "all cosines 0" else torch.ones(rows, 4) / 2
    made = build_negatives(vectors, k, engine=engine, seed=3)
    assert not (made.table == np.arange(rows)[:, None]).any()
    assert all(len(set(row)) == k for row in made.table.tolist())
    assert made.metadata["hubness"]["distinct"] == rows and made.metadata["hubness"]["most"] <= 3 * k
    assert np.array_equal(made.table, build_negatives(vectors, k, engine=engine, seed=3).table)
    assert not np.array_equal(made.table, build_negatives(vectors, k, engine=engine, seed=4).table)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_is_never_its_own_negative_whatever_the_offset(engine):
    """Local scaling may put a hub's own score below all others."""
    vectors, offset = random_unit(40, 8), torch.zeros(40)
    offset[::8] = -5
    scores, found = farthest.farthest_others(vectors, torch.arange(40), 8, engine, offset=offset)
    exact = (vectors.double() @ vectors.double().T + offset.double()).fill_diagonal_(torch.inf)
    assert not (found == torch.arange(40)[:, None]).any()
    torch.testing.assert_close(exact.gather(1, found), exact.sort().values[:, :8], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.double(), exact.gather(1, found), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rounding", [0, 6e-7, -6e-7])
def test_a_tie_at_the_last_place_keeps_all_that_are_strictly_farther(rounding, monkeypatch):
    """Also where the engine's products are rounded otherwise than those that break the tie."""

    def rounded(queries, keys, k):
        products, ids = farthest._torch_search(queries, keys, k)
        return products + rounding, ids

    monkeypatch.setitem(farthest.ENGINES, "torch", (rounded, farthest._torch_rows))
    far, tied = torch.tensor([[-1.0, 0.0]]).repeat(3, 1), torch.tensor([[0.0, 1.0]]).repeat(400, 1)
    vectors = torch.cat((torch.tensor([[1.0, 0.0]]).repeat(5, 1), tied, far))
    made = build_negatives(vectors, 8, engine="torch")
    assert all({405, 406, 407} <= set(row) for row in made.table[:5].tolist())
    assert len(np.unique(made.table[:5, 3:])) > 15 and (made.similarity[:5] == [-1] * 3 + [0] * 5).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("remedy", negatives.REMEDIES)
def test_only_candidates_are_negatives(engine, remedy):
    vectors, candidates = random_unit(500, 16), torch.arange(0, 500, 3)
    made = build_negatives(vectors, 8, candidates=candidates, engine=engine, remedy=remedy)
    assert made.table.shape == (500, 8) and (made.table % 3 == 0).all()
    assert not (made.table == np.arange(500)[:, None]).any() and made.metadata["hubness"]["distinct"] <= 167
    if remedy == "none":
        exact = vectors.double() @ vectors.double().T
        exact.fill_diagonal_(torch.inf)
        expected = exact[:, ::3].sort().values[:, :8]
        torch.testing.assert_close(exact.gather(1, torch.from_numpy(made.table).long()), expected, atol=3e-7, rtol=0)
    few = build_negatives(vectors[:9], 8, candidates=candidates[:3], engine=engine)
    assert few.table.shape == (9, 2) and [sorted(row) for row in few.table[[0, 3, 6]].tolist()] == [
        [3, 6],
        [0, 6],
        [0, 3],
    ]


def test_fewer_reports_than_k_uses_all_of_them(monkeypatch):
    said = []
    monkeypatch.setattr(negatives, "announce", said.append)
    made = build_negatives(random_unit(5, 8), 64)
    assert [sorted(row) for row in made.table.tolist()] == [[j for j in range(5) if j != i] for i in range(5)]
    assert "4 negatives instead of 64" in said[0]
    assert build_negatives(random_unit(2, 8)).table.tolist() == [[1], [0]]


def test_hubness_of_known_tables():
    even = hubness(np.array([[1, 2], [2, 3], [3, 0], [0, 1]]), np.arange(4))
    assert (even["distinct"], even["most"], even["skewness"]) == (4, 2, 0) and even["gini"] == pytest.approx(0)
    one = hubness(np.array([[9]] * 9 + [[0]]), np.arange(10))
    assert (one["distinct"], one["most"], one["most_share"]) == (2, 9, 0.9)
    assert one["gini"] == pytest.approx(0.88) and one["skewness"] > 2


def test_remedies_spread_the_table_of_an_anisotropic_embedding(ptb_xl):
    draw = np.random.default_rng(0)
    words = {word: draw.standard_normal(64) + 0.5 for text in ptb_xl for word in text.split()}  # a common direction
    bags = torch.tensor(
        np.array([np.mean([words[w] for w in text.split()], 0) for text in ptb_xl]), dtype=torch.float32
    )
    found = {remedy: build_negatives(bags, 16, remedy=remedy) for remedy in negatives.REMEDIES}
    gini = [found[remedy].metadata["hubness"]["gini"] for remedy in negatives.REMEDIES]
    assert gini[0] > gini[1] + 0.1 > gini[2] + 0.15, gini
    assert (
        found["none"].metadata["hubness"]["most_share"]
        > 0.9
        > 2 * found["local-scaling"].metadata["hubness"]["most_share"]
    )
    directions = unit(bags.clone())
    for made in found.values():  # the stored cosines are those of the embedding itself
        cosines = (directions @ directions.T).gather(1, torch.from_numpy(made.table).long())
        np.testing.assert_allclose(made.similarity, cosines, atol=1e-6)
        assert not (made.table == np.arange(len(bags))[:, None]).any()


def test_hash_embedding(ptb_xl):
    embedded = hash_embedding(ptb_xl)
    assert embedded.shape == (146, 512) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(146))
    assert torch.equal(embedded, hash_embedding(ptb_xl))
    texts = [
        "sinus rhythm normal ecg",
        "sinus rhythm otherwise normal ecg",
        "atrial flutter with block",
        "atrial flutter",
    ]
    cosine = (e := hash_embedding([*texts, ""])) @ e.T
    assert cosine.isfinite().all()
    assert cosine[0].argsort(descending=True)[1] == 1 and cosine[2].argsort(descending=True)[1] == 3


def t5_folder(shared, folder, keys=None):
    """The fixture's small T5 as a Hugging Face folder."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(shared / "parity/t5small_like_weights.safetensors", "pt") as file:
        config = json.loads(file.metadata()["t5"])
        names = [name for name in file.keys() if name != "encoder.embed_tokens.weight"]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names if keys is None or keys(name)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **config})
    )
    return folder


def test_encoder_embedding_is_the_recorded_unpadded_mean(shared, tmp_path):
    recorded = np.load(shared / "parity/t5small_like.npz")
    model = load_encoder(t5_folder(shared, tmp_path))
    rows = [ids[mask == 1] for ids, mask in zip(recorded["ids"], recorded["attention_mask"])]
    table = TokenTable(
        torch.tensor(np.concatenate(rows), dtype=torch.int32), torch.tensor([0, *np.cumsum([len(r) for r in rows])])
    )
    expected = unit(torch.from_numpy(recorded["single_embedding_unpadded"]))
    for tokens_per_batch in (1, 34, 4096):  # alone, by two, all in one padded batch
        torch.testing.assert_close(mean_token(model, table, tokens_per_batch), expected, atol=2e-6, rtol=0)


def test_encoder_embedding_of_texts_keeps_their_order(shared, tmp_path, ptb_xl):
    train(ptb_xl, size=100).save(t5_folder(shared, tmp_path))
    together = encoder_embedding(ptb_xl[:20], tmp_path)
    alone = torch.cat([encoder_embedding([text], tmp_path) for text in ptb_xl[:20:7]])
    torch.testing.assert_close(together[::7], alone, atol=2e-6, rtol=0)


def test_an_incomplete_or_missing_encoder_is_an_error(shared, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    t5_folder(shared, tmp_path, keys=lambda name: "block.1" not in name)
    for encoder, words in [
        (tmp_path, "lacks 9 tensors"),
        (tmp_path / "no", "cannot be downloaded"),
        ("google/none", "--encoder DIR"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            encoder_embedding(["sinus rhythm"], encoder)
        assert "\n" not in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_engines_that_are_not_there_and_bad_input(monkeypatch):
    vectors = random_unit(10, 4)
    monkeypatch.setattr(farthest, "_faiss_lacks", lambda cuda: "FAISS is not installed: pip install dbeta[faiss]")
    with pytest.raises(ValueError, match=r"pip install dbeta\[faiss\]; or use --engine torch"):
        build_negatives(vectors, 3, engine="faiss")
    said = []
    monkeypatch.setattr(farthest, "announce", said.append)
    assert build_negatives(vectors, 3).metadata["engine"] == "torch" and "pip install" in said[0]
    for bad, word in [({"engine": "annoy"}, "annoy"), ({"remedy": "pray"}, "local-scaling"), ({}, "2 different")]:
        with pytest.raises(ValueError, match=word):
            build_negatives(vectors if bad else vectors[:1], 3, **bad)
    with pytest.raises(ValueError, match="NaN"):
        build_negatives(vectors / 0, 3)


def test_auto_measures_both_engines(monkeypatch):
    said = []
    monkeypatch.setattr(farthest, "announce", said.append)
    monkeypatch.setattr(farthest, "_faiss_lacks", lambda cuda: "")

    def slow(queries, keys, k):
        time.sleep(0.05)
        return farthest._torch_search(queries, keys, k)

    monkeypatch.setitem(farthest.ENGINES, "faiss", (slow, lambda keys: 4096))
    keys = random_unit(70_000, 4)
    assert (
        farthest.resolve_engine("auto", keys, keys, 8) in ("faiss", "torch")
        and "the faster for 256 of 70000" in said[0]
    )
    few = random_unit(2000, 4)
    assert farthest.resolve_engine("auto", few, few, 8) == "torch" and len(said) == 1  # too short to be worth a line


def test_table_file(tmp_path, ptb_xl):
    corpus = SimpleNamespace(path=tmp_path, reports=ptb_xl)
    with pytest.raises(ValueError, match="no table of negatives; make it with: dbeta negatives"):
        load_negatives(corpus)
    made = build_negatives(hash_embedding(ptb_xl))
    made.metadata["digest"] = digest(ptb_xl)
    made.save(tmp_path / negatives.FILE)
    loaded = load_negatives(corpus)
    assert isinstance(loaded, NegativeTable) and loaded.metadata == made.metadata
    assert np.array_equal(loaded.table, made.table) and np.array_equal(loaded.similarity, made.similarity)
    corpus.reports = ptb_xl[:-1]
    with pytest.raises(ValueError, match="other reports"):
        load_negatives(corpus)
    (tmp_path / negatives.FILE).write_bytes(b"PK\x03\x04 not a table")
    with pytest.raises(ValueError, match="damaged"):
        load_negatives(corpus)


def test_the_command_on_a_prepared_corpus(tmp_path, monkeypatch, capsys):
    from dbeta.data.corpus import Corpus
    from dbeta.data.prepare import prepare

    monkeypatch.setattr(negatives, "cached_folder", lambda *_: None)
    prepare("synthetic", None, tmp_path / "corpus", workers=1, limit=120)
    summary = negatives.negatives(tmp_path / "corpus", k=16, device="cpu")
    said = capsys.readouterr()
    assert "x 16 by hashing" in said.out and "hashed n-grams (google/flan-t5-small is not in" in said.err
    corpus = Corpus.open(tmp_path / "corpus")
    made = load_negatives(corpus)
    train_reports = np.unique(corpus.column("report", corpus.split_ids("train")))
    assert len(train_reports) < len(corpus.reports) and np.isin(made.table, train_reports).all()
    assert summary["fallback"] and made.metadata["fallback"] and made.table.shape == (len(corpus.reports), 16)
    assert not negatives.negatives(tmp_path / "corpus", encoder="hashing", device="cpu")["fallback"]
    with pytest.raises(ValueError, match="dbeta prepare"):
        negatives.negatives(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_180_000_reports_in_a_quarter_of_an_hour_and_4_gb():
    from dbeta_bench.negatives import whole_table

    row = whole_table(180_000)
    assert row["embed_s"] + row["search_s"] <= 900 and row["peak_host_gb"] < 4, row
    assert row["distinct_share"] > 0.9, row


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_the_gpu_finds_the_same(engine):
    if engine == "faiss" and (lacking := farthest._faiss_lacks(True)):
        pytest.skip(lacking)
    vectors = hash_embedding([f"report {i} of {i % 7} kinds {i * i % 101}" for i in range(20_000)])
    torch.backends.cuda.matmul.allow_tf32 = True  # as a bf16 run sets it; the search must not use it
    made, on_gpu = (build_negatives(v, 64, engine=engine) for v in (vectors, vectors.cuda()))
    assert torch.backends.cuda.matmul.allow_tf32
    np.testing.assert_allclose(on_gpu.similarity, made.similarity, atol=3e-7)
    assert (on_gpu.table != np.arange(len(vectors))[:, None]).all()
    same = [len(set(a) & set(b)) for a, b in zip(on_gpu.table.tolist(), made.table.tolist())]
    assert np.mean(same) > 63  # the rest: cosines equal up to rounding


@pytest.mark.gpu
def test_gather_does_not_synchronise():
    table = TokenTable(torch.arange(10, dtype=torch.int32), torch.tensor([0, 4, 4, 10])).to("cuda")
    reports = torch.tensor([2, 1, 0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids, _ = table.gather(reports, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids[0].tolist() == [4, 5, 6, 7, 8]
