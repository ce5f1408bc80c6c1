"""``dbeta embed``, ``ask``, ``export`` and ``import-checkpoint`` as a user gives them."""

import csv
import json
import os
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dbeta import DBeta, read_ecg
from dbeta.cli import main
from dbeta.models import released
from dbeta.use import embed as embedding
from dbeta.use import export as exporting
from dbeta.use.find import find_records


def run(*arguments, code=0):
    outcome = CliRunner().invoke(main, [str(a) for a in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome.output


@pytest.fixture
def mixed(tmp_path, paths):
    """A folder of links to records of every format, two that fail, and what belongs to none."""
    folder = tmp_path / "records"
    (folder / "deep").mkdir(parents=True)
    for path in paths.values():
        for file in path.parent.glob(f"{path.stem}.*"):
            (folder / "deep" / file.name).symlink_to(file)
    (folder / "bad.mat").write_bytes(b"no matlab file")
    (folder / "lonely.hea").write_text("lonely 1 500 10\nlonely.dat 16 200 16 0 0 0 0 I\n")
    (folder / "notes.md").write_text("not a record")
    return folder


def test_embed_lists_failures_and_does_the_rest(mixed, folder, model, paths, tmp_path):
    out = tmp_path / "features.parquet"
    said = run("embed", folder, mixed, "--out", out, "--device", "cpu", "--batch", 2, code=1)
    assert "2 records could not be read; the rest is done" in said and "missing signal file: lonely.dat" in said
    table = pq.read_table(out).to_pydict()
    assert len(table["record"]) == 5 and not out.with_name(out.name + ".parts").exists()
    for path in paths.values():
        (row,) = [i for i, name in enumerate(table["record"]) if path.stem in name]
        expected = model.encode_ecg([read_ecg(path)], lengths="crop")[0]
        np.testing.assert_allclose(table["feature"][row], expected, atol=1e-5)
        assert table["leads"][row].split() == list(embedding.LEADS)
    with out.with_name("features.parquet.failures.csv").open() as file:
        assert [row["reason"].partition(":")[0] for row in csv.DictReader(file)] == [
            "not a MATLAB file", "missing signal file",
        ]  # fmt: skip
    assert "is already there" in run("embed", folder, mixed, "--out", out, code=2)
    assert "accepted endings: .parquet, .npz" in run("embed", folder, mixed, "--out", tmp_path / "f.txt", code=2)


def test_a_killed_embed_goes_on(mixed, model, tmp_path, monkeypatch):
    names = find_records([mixed / "deep"])
    monkeypatch.setattr(embedding, "PART", 2)
    read, original = [], embedding._read

    def killed(name):
        read.append(name)
        if len(read) > 4:
            raise KeyboardInterrupt
        return original(name)

    monkeypatch.setattr(embedding, "_read", killed)
    out = tmp_path / "features.npz"
    with pytest.raises(KeyboardInterrupt):
        embedding.embed(model, names, out, workers=1)
    assert not out.exists()
    read.clear()
    monkeypatch.setattr(embedding, "_read", lambda name: (read.append(name), original(name))[1])
    assert embedding.embed(model, names, out, workers=1) == [] and read == names[4:]
    with np.load(out, allow_pickle=False) as file:
        assert file["record"].tolist() == names
        expected = model.encode_ecg([read_ecg(name) for name in names], lengths="crop")
        np.testing.assert_allclose(file["feature"], expected, atol=1e-5)


def test_a_part_of_other_work_is_not_taken(model, shared, tmp_path, monkeypatch):
    """Killed before the end, and given again with another option."""
    name, out = str(shared / "data/ptb/s0010_re.hea"), tmp_path / "features.npz"  # 38 s

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(embedding, "_write_npz", killed)
        embedding.embed(model, [name], out, lengths="crop")
    assert embedding.embed(model, [name], out, lengths="mean") == []
    found = np.load(out)["feature"]
    crop, mean = (model.encode_ecg([read_ecg(name)], lengths=how) for how in ("crop", "mean"))
    assert not torch.allclose(crop, mean, atol=1e-4)
    np.testing.assert_allclose(found, mean, atol=1e-5)


def test_another_option_is_other_work(mixed):
    names = find_records([mixed / "deep"])
    keys = {embedding.part_key(f"model {lengths}", names) for lengths in ("crop", "mean")}
    assert len(keys | {embedding.part_key("model crop", names[1:])}) == 3
    signal = mixed / "lonely.dat"
    before = embedding.part_key("", [str(mixed / "lonely.hea")])
    signal.write_bytes(b"1234")
    assert embedding.part_key("", [str(mixed / "lonely.hea")]) != before


def test_finding(mixed, tmp_path):
    deep = find_records([mixed / "deep"])
    assert len(deep) == 5 and not any(name.endswith(".dat") for name in deep), "a record is named once, by its header"
    assert find_records([f"{mixed}/**/*"]) == find_records([mixed]) and len(find_records([mixed])) == 7
    (mixed / "table.csv").write_text("id,path\n1,deep/SPH00001.h5\n2,\n3,lonely.hea\n")
    assert find_records([mixed / "table.csv"]) == [str(mixed / "deep/SPH00001.h5"), str(mixed / "lonely.hea")]
    (mixed / "list.txt").write_text("deep/SPH00001.h5\n")
    assert len(find_records([mixed / "list.txt", mixed / "table.csv"])) == 2
    with pytest.raises(ValueError, match=r"has no column name; it has id, path; choose one with --column"):
        find_records([mixed / "table.csv"], "name")
    for name, content, words in (
        ("e.csv", b"", "it has none; choose"),
        ("b.txt", b"\xff\xfe\x00", "not a table of paths"),
    ):
        (mixed / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*{words}"):
            find_records([mixed / name])
    assert find_records([mixed / "lonely"]) == [str(mixed / "lonely")]
    with pytest.raises(ValueError, match="nowhere is not there"):
        find_records([mixed / "deep", mixed / "nowhere"])
    with pytest.raises(ValueError, match="a path is empty"):
        find_records([mixed / "deep", ""])
    with pytest.raises(ValueError, match="no record in"):
        find_records([f"{tmp_path}/*.hea"])


def test_ask(mixed, folder, model, tmp_path):
    prompts, out = tmp_path / "prompts.json", tmp_path / "scores.csv"
    prompts.write_text(json.dumps({"AF": "atrial fibrillation", "normal": ["normal ecg", "sinus rhythm"]}))
    run("ask", folder, mixed / "deep", "--prompts", prompts, "--out", out, "--device", "cpu")
    with out.open() as file:
        rows = list(csv.DictReader(file))
    ecgs = [read_ecg(row["record"]) for row in rows]
    normal = model.encode_text(["normal ecg", "sinus rhythm"]).mean(0)
    expected = (
        model.encode_ecg(ecgs, lengths="crop") @ torch.stack((model.encode_text(["atrial fibrillation"])[0], normal)).T
    )
    np.testing.assert_allclose([[float(r["AF"]), float(r["normal"])] for r in rows], expected, rtol=1e-4, atol=1e-4)
    shown = run("ask", folder, mixed / "deep", "--prompts", prompts)
    for row in rows:
        name = row["record"].rpartition("/")[2]
        assert any(line.split()[:2] == [name, f"{float(row['AF']):.3f}"] for line in shown.splitlines()), name
    for wrong in ('["a"]', '{"AF": ""}', '{"AF": 3}', "{"):
        prompts.write_text(wrong)
        assert "--prompts" in run("ask", folder, mixed / "deep", "--prompts", prompts, code=2)


@pytest.mark.parametrize("command", ["embed", "ask", "export"])
def test_out_is_checked_before_the_model_is_read(command, tmp_path, monkeypatch):
    monkeypatch.setattr(DBeta, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.json").write_text('{"AF": "atrial fibrillation"}')
    (tmp_path / "r1.hea").write_text("")
    kind = {"embed": "parquet", "ask": "csv", "export": "pt2"}[command]
    (tmp_path / f"folder.{kind}").mkdir()
    given = {"embed": ["r1.hea"], "ask": ["r1.hea", "--prompts", "prompts.json"], "export": []}[command]
    for out, said in (
        (f"folder.{kind}", f"--out folder.{kind} is a folder; give the name of a file in it"),
        (f"r1.hea/deep/out.{kind}", f"cannot be written: {tmp_path}/r1.hea is no folder"),
    ):
        outcome = run(command, "MODEL", *given, "--out", out, code=2)
        assert said in outcome and outcome.count("\n") == 1
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: mode != os.W_OK)
        outcome = run(command, "MODEL", *given, "--out", f"new/out.{kind}", code=2)
        assert f"{tmp_path} cannot be written to; choose another place" in outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"folder.{kind}", "prompts.json", "r1.hea"]


def test_a_description_named_as_the_column_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(DBeta, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "p.json").write_text('{"AF": "atrial fibrillation", "record": "a record"}')
    outcome = run("ask", "MODEL", tmp_path, "--prompts", tmp_path / "p.json", "--out", tmp_path / "s.csv", code=2)
    assert "p.json: record is the column of the records' names" in outcome and outcome.count("\n") == 1


def test_export_equals_eager(model, tmp_path, monkeypatch):
    assert exporting.export(model, tmp_path / "encoder.pt2") <= 1e-4
    ecg = 0.3 * torch.randn(5, 12, 5000, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = torch.export.load(tmp_path / "encoder.pt2").module()(ecg)
    torch.testing.assert_close(found, model.encode_ecg(ecg), rtol=0, atol=1e-4)
    monkeypatch.setattr(model.__class__, "encode_ecg", lambda self, ecg: self.ecg_features(ecg) + 2e-4)
    with pytest.raises(ArithmeticError, match="not kept"):
        exporting.export(model, tmp_path / "wrong.pt2")
    assert not (tmp_path / "wrong.pt2").exists()
    with pytest.raises(ValueError, match=r"accepted endings: \.pt2, \.onnx"):
        exporting.export(model, tmp_path / "encoder.pt")


def test_export_to_onnx(model, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install dbeta[onnx]")
    pytest.importorskip("onnxruntime", reason="pip install dbeta[onnx]")
    assert exporting.export(model, tmp_path / "encoder.onnx") <= 1e-4


NAME = "tiny_seedA_weights.safetensors"
SETTINGS = '{"encoder_attention_heads": 4, "num_heads": 4, "mem_layer": 2, "mem_decoder_num_heads": 2}'

# --- a released checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture
def parity(shared):
    return shared / "parity"


@pytest.fixture
def words(tmp_path):
    """A tokenizer that makes the text "t7 t9" the ids 7 9."""
    vocabulary = {f"t{i}": i for i in range(200)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t2"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    names = {"pad_token": "t0", "eos_token": "t1", "unk_token": "t2", "mask_token": "t3"}
    (tmp_path / "words" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    )
    return tmp_path / "words"


def test_imported_checkpoint_has_the_released_features(parity, words, tmp_path):
    """By command, with real text through the tokenizer: 5e-5 (issue 8)."""
    weights = parity / "tiny_seedA_weights.safetensors"
    said = run("import-checkpoint", weights, "--tokenizer", words, "--out", tmp_path / "model")
    assert "self-check: 331 tensors come back bit for bit" in said
    assert "class_embedding + ecg_encoder" in said and "-> etm_head" in said
    model = DBeta.from_pretrained(tmp_path / "model")
    with np.load(parity / "tiny_seedA.npz") as tiny:
        ecg, ids, lengths = (tiny[f"in/{name}"] for name in ("ecg", "text_ids", "text_lens"))
        expected = {name: torch.tensor(tiny[f"f32/{name}"]) for name in ("ecg_feats", "text_feats_single")}
    texts = [" ".join(f"t{i}" for i in row[:n]) for row, n in zip(ids, lengths)]
    torch.testing.assert_close(model.encode_ecg(ecg), expected["ecg_feats"], rtol=0, atol=5e-5)
    torch.testing.assert_close(model.encode_text(texts), expected["text_feats_single"], rtol=0, atol=5e-5)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "authors' release" in card


def test_new_weight_norm_names_and_dropped_embedding(parity, tmp_path):
    weights = load_file(parity / "tiny_seedA_weights.safetensors")
    conv = "ecg_encoder.conv_pos.pos_conv.0."
    for new, old in released._NEW_NORM.items():
        weights[conv + new] = weights.pop(conv + old)
    weights["ecg_encoder.mask_emb"] = torch.zeros(48)
    (tmp_path / "m.json").write_text(SETTINGS)
    save_file(weights, tmp_path / "m.safetensors")
    arguments = (tmp_path / "m.safetensors", "--config", tmp_path / "m.json", "--lead-order", "mimic")
    assert "dropped: no output reads it" in run("import-checkpoint", *arguments, "--out", tmp_path / "out")


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


HTML = b"<!DOCTYPE html><html><body>Log in to Hugging Face</body></html>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("page.pt", HTML, "is a web page, not a checkpoint"),
        ("page.safetensors", b"\n " + HTML, "is a web page, not a checkpoint"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("empty.pt", b"", "is an empty file"),
        ("notes.txt", b"hello world\n", "is a text file, not a checkpoint; give"),
        ("umlauts.pt", "# Läufe\n".encode() * 200, "is a text file, not a checkpoint; give"),
        ("config.safetensors", b'{"model": {"width": 768}}', "is a text file, not a checkpoint; give"),
        ("packed.pt", b"\x1f\x8b\x08\x00\xff", "is a gzip archive, not a checkpoint; give"),
        ("image.pt", b"\x89PNG\r\n\x1a\n\x00", r"its first bytes are b'\x89PNG\r\n\x1a\n'; give the released"),
        ("code.pt", pickle.dumps({"model": Payload()}), "holds more than tensors and is not read"),
        ("old.pt", pickle.dumps({"model": Payload()}, protocol=0), "holds more than tensors and is not read"),
        ("absent.pt", None, "cannot be read"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, capfd, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = run("import-checkpoint", tmp_path / name, "--out", tmp_path / "out", code=2)
    assert message in said and name in said and said.count("\n") == 1 and "code ran" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a list; an object"),
        ("{", "cannot be read as JSON"),
        ('{"num_heads": "4"}', "num_heads = '4'; a number"),
        ('{"mem_prob": null}', "mem_prob = None; a number"),
        ('{"encoder_attention_heads": 0}', "model.width = 48 is not a multiple of model.ecg_heads = 0"),
        ('{"conv_feature_layers": [16, 2]}', "conv_feature_layers = [16, 2] does not describe"),
        (None, "m.json cannot be read: No such file"),
    ],
)
def test_configurations_that_do_not_fit(parity, tmp_path, content, message):
    """Beside the checkpoint, and in it."""
    if content is not None:
        (tmp_path / "m.json").write_text(content)
        save_file(load_file(parity / NAME), tmp_path / "m.safetensors", metadata={"cfg": content})
        said = run("import-checkpoint", tmp_path / "m.safetensors", "--out", tmp_path / "out", code=2)
        assert message in said and said.count("\n") == 1
    said = run("import-checkpoint", parity / NAME, "--config", tmp_path / "m.json", "--out", tmp_path / "out", code=2)
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_fit(parity, words, folder, tmp_path, shared, mixed, paths):
    """What is said is about this command, not about pre-training."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"AF": "t7"}')
    run("import-checkpoint", parity / NAME, "--out", tmp_path / "model")
    for command in (
        ("import-checkpoint", parity / NAME, "--tokenizer", shared / "data/t5-tokenizer", "--out", tmp_path / "out"),
        ("ask", tmp_path / "model", paths["SPH .h5"], "--prompts", prompts),
        ("ask", tmp_path / "model", paths["SPH .h5"], "--prompts", prompts, "--tokenizer", folder),
    ):
        said = run(*command, code=2)
        assert "--tokenizer DIR" in said and "--set" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("itm_head.fc.bias"), "1 missing: itm_head.fc.bias"),
        (lambda w: w.update(more=torch.zeros(1)), "1 unexpected: more"),
        (lambda w: w.update({"itm_head.fc.bias": torch.zeros(5)}), "itm_head.fc.bias is [5], the model has [2]"),
    ],
)
def test_tensors_that_do_not_fit(parity, tmp_path, change, message):
    weights = load_file(parity / "tiny_seedA_weights.safetensors")
    change(weights)
    save_file(weights, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_text(SETTINGS)
    arguments = (tmp_path / "m.safetensors", "--config", tmp_path / "m.json", "--out", tmp_path / "out")
    said = run("import-checkpoint", *arguments, code=2)
    assert message in said and said.count("\n") == 1


def test_a_page_in_place_of_a_models_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(HTML)
    with pytest.raises(ValueError, match="is a web page, not a checkpoint"):
        DBeta.from_pretrained(tmp_path)
