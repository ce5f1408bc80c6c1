"""Hostile input ends in one clear error, within bounded memory and time, and nothing is written elsewhere."""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dbeta import checkpoint, shards
from dbeta.config import Config
from dbeta.data import corpus as corpus_module
from dbeta.data import formats
from dbeta.data.corpus import Corpus
from dbeta.data.prepare import prepare
from dbeta.data.records import read_record
from dbeta.data.sources import read_csv
from dbeta.data.tables import load_arrays
from dbeta.evaluation.prompts import read_prompts
from dbeta.models.dbeta import DBeta
from dbeta.models.pretrained import load_text_weights
from dbeta.models.released import import_checkpoint
from dbeta.use.find import find_records
from tests.fuzz import LEADS
from tests.models.small import SMALL

ROOT = Path(__file__).parents[1]
ADC = np.random.default_rng(0).integers(-500, 500, (100, 12)).astype("<i2")


@pytest.fixture
def record(tmp_path):
    """Writes a record whose header is made of parts, some of them replaced; returns its path."""

    def write(
        line: str = "r 12 500 100", signal: str = "{file} 16 200(0)/mV 16 0 0 {sum} 0 {lead}", file: str = "r.dat"
    ):
        sums = ADC.sum(0) % 65536
        signals = "".join(signal.format(file=file, sum=sums[i], lead=lead) + "\n" for i, lead in enumerate(LEADS))
        (tmp_path / "r.hea").write_bytes(f"{line}\n{signals}".encode("utf-8", "surrogateescape"))
        (tmp_path / "r.dat").write_bytes(ADC.tobytes())
        return tmp_path / "r"

    return write


def test_the_record_is_good(record):
    assert read_record(record()).adc.shape == (12, 100)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"line": "r"}, "unreadable header: record line 'r'"),
        ({"line": "r 12 500 ten"}, "unreadable header: record line"),
        ({"line": "r 99999999999 500 100"}, "unreadable header: 99999999999 signals"),
        ({"line": "r 65 500 100"}, "unreadable header: 65 signals"),
        ({"line": "r 13 500 100"}, "13 signals announced, 12 described"),
        ({"line": "r 12 500 99999999999"}, "unreadable header: 12 signals of 99999999999 samples"),
        ({"line": "r 12 500 40000000"}, "truncated signal file: r.dat has 2400 bytes, its header needs 960000000"),
        ({"line": "r 12 500 99"}, "signal file does not fit: r.dat has 2400 bytes, its header describes 2376"),
        ({"line": "r 12 -500 100"}, "unreadable header"),
        ({"line": "r 12 1e9 100"}, "unreadable header"),
        ({"line": "r/3 12 500 100"}, "multi-segment record"),
        ({"line": "r 12 500 100", "signal": "{file} 16 -200(0)/mV 16 0 0 {sum} 0 {lead}"}, "bad gain"),
        ({"signal": "{file} 16 1e-300(0)/mV 16 0 0 {sum} 0 {lead}"}, "bad gain"),
        ({"signal": "{file} 16 nan(0)/mV 16 0 0 {sum} 0 {lead}"}, "bad gain"),
        ({"signal": "{file} 16 200(99999999999)/mV 16 0 0 {sum} 0 {lead}"}, "unreadable header: baseline"),
        ({"signal": "{file} 16x500 200(0)/mV 16 0 0 {sum} 0 {lead}"}, "several samples per frame"),
        ({"signal": "{file} 16:99999999 200(0)/mV 16 0 0 {sum} 0 {lead}"}, "unreadable header: skew"),
        ({"line": "r 12 500 9999", "signal": "{file} 212 200(0)/mV 12 0 0 {sum} 0 {lead}"}, "2400 bytes, .* at least"),
        ({"line": "r 12 500 40000000", "signal": "{file} 516 200(0)/mV 16 0 0 {sum} 0 {lead}"}, "too large: 480,000"),
        ({"file": "../../etc/passwd"}, "is not in the record's own folder"),
        ({"file": "/etc/passwd"}, "is not in the record's own folder"),
        ({"file": "..\\r.dat"}, "is not in the record's own folder"),
        ({"file": "r\0.dat"}, "is not in the record's own folder|unreadable header"),
        ({"file": "r" * 300}, "has a name too long"),
        ({"file": "\udcff\udcfe.dat"}, "missing signal file"),
        ({"signal": "{file} 16 200(0)/mV 16 0 0 {sum} 0 V1\0"}, "duplicate lead|missing leads|unreadable header"),
    ],
)
def test_headers(record, parts, message):
    with pytest.raises(ValueError, match=message):
        read_record(record(**parts))


def test_a_header_without_end(record):
    path = record()
    with path.with_suffix(".hea").open("ab") as file:
        file.write(b"#" + b"x" * (2 << 20))
    with pytest.raises(ValueError, match="unreadable header: longer than 1,048,576 bytes"):
        read_record(path)


def test_a_header_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "r.hea")
    with pytest.raises(ValueError, match=r"no header: r.hea is no file"):
        read_record(tmp_path / "r.hea")


def test_a_link_out_of_the_records_folder(record, tmp_path):
    path = record()
    (tmp_path / "elsewhere").mkdir()
    moved = path.with_suffix(".dat").rename(tmp_path / "elsewhere" / "secret")
    path.with_suffix(".dat").symlink_to(moved)
    with pytest.raises(ValueError, match=r"link out of the record's folder: r.dat"):
        read_record(path)


# --- archives and arrays -------------------------------------------------------------------------------------------


def mat_bomb(path: Path, megabytes: int) -> None:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()
    text = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    path.write_bytes(text + struct.pack("<II", 15, len(packed)) + packed)


def test_a_mat_bomb(tmp_path):
    """Ten times the limit (a smaller one, for the test's time) in a file of a thousandth."""
    mat_bomb(tmp_path / "A1.mat", 320)
    assert (tmp_path / "A1.mat").stat().st_size < 1 << 20
    code = "import sys; from dbeta.data import formats, records; formats.MAX_BYTES = 1 << 25; "
    code += "records.read_record(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "A1.mat")], cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 28, 1 << 28)), timeout=60,
    )  # fmt: skip
    assert "too large: A1.mat unpacks to more than" in done.stderr.splitlines()[-1], done.stderr


def test_hdf5_that_lies(tmp_path):
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("ecg", (12, 1 << 32), "f2", chunks=(12, 1 << 10), compression="gzip")
    with pytest.raises(ValueError, match="too large: ecg is"):
        read_record(tmp_path / "huge.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["ecg"] = np.zeros((12, 9))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["ecg"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "ecg")
    with pytest.raises(ValueError, match="not in the file: ecg is missing, or a link"):
        read_record(tmp_path / "link.h5")
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["ecg"] = "no numbers"
    with pytest.raises(ValueError, match="not numbers: ecg"):
        read_record(tmp_path / "text.h5")
    (tmp_path / "exams.hdf5").write_bytes((tmp_path / "link.h5").read_bytes())
    with pytest.raises(ValueError, match="not in the file: tracings"):
        next(formats.read_tracings(tmp_path / "exams.hdf5", [0], units_per_mv=1.0))


def test_exams_that_are_not_there(tmp_path):
    """A few kilobytes that claim billions of exams, unpack to gigabytes at the first, or lie in another file."""
    path, other, shape = tmp_path / "exams.hdf5", str(tmp_path / "other"), (9999, 4096, 12)
    os.mkfifo(other)  # whoever opens it waits for ever
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource(other, "tracings", shape)
    for make, message in (
        (lambda file: file.create_dataset("tracings", (1 << 34, *shape[1:]), "f4", chunks=(1, *shape[1:])), "17,179,8"),
        (
            lambda file: file.create_dataset("tracings", shape, "f4", chunks=shape),
            "too large",
        ),
        (lambda file: file.create_virtual_dataset("tracings", layout), "lies in another one"),
        (lambda file: file.__setitem__("tracings", h5py.ExternalLink(other, "tracings")), "a link to somewhere else"),
        (lambda file: file.__setitem__("tracings", 3.0), "not numbers"),
    ):
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(ValueError, match=message):
            formats.count_exams(path)


def test_tables_of_paths(tmp_path):
    for name, content in (("a.csv", b"path," + b"x" * 200_000), ("b.csv", b"path\n\xff\n"), ("c.txt", b"\xff\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a table of paths in UTF-8"):
            find_records([tmp_path / name])
    (tmp_path / "record_list.csv").write_bytes(b"x" * 200_000)
    with pytest.raises(ValueError, match=r"record_list.csv is not a CSV table: field larger"):
        read_csv(tmp_path / "record_list.csv", "path")


def test_npz_bombs_and_lies(tmp_path):
    path = tmp_path / "negatives.npz"
    np.savez_compressed(path, table=np.zeros(50_000_000, np.int8), metadata=np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="is compressed, which we do not do"):
        load_arrays(path, ("table",))
    with zipfile.ZipFile(path, "w") as archive:
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 80)
        shape = b"{'descr': '<i4', 'fortran_order': False, 'shape': (900000000000, 64), }"
        archive.writestr("table.npy", header + shape.ljust(79) + b"\n")
    with pytest.raises(ValueError, match="is not as long as its header says"):
        load_arrays(path, ("table",))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside.npy", b"")
    with pytest.raises(ValueError, match="is damaged or of another kind"):
        load_arrays(path, ("table",))
    np.savez(path, table=np.array([{"a": 1}], dtype=object), metadata=np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="is damaged or of another kind"):
        load_arrays(path, ("table",))


# --- corpora -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    prepare("synthetic", None, folder, limit=4, workers=1)
    return folder


@pytest.fixture
def corpus(whole_corpus, tmp_path) -> Path:
    return Path(shutil.copytree(whole_corpus, tmp_path / "corpus"))


def test_links_out_of_a_corpus(corpus, tmp_path):
    for name in ("shards/00000.tar", "records.parquet"):
        moved = (corpus / name).rename(tmp_path / "moved")
        (corpus / name).symlink_to(moved)
        with pytest.raises(ValueError, match=f"{name} is a link out of the corpus; copy what it points to"):
            Corpus.open(corpus)
        (corpus / name).unlink()
        moved.rename(corpus / name)
    Corpus.open(corpus)


def test_names_that_leave_a_corpus(corpus, tmp_path):
    described = json.loads((corpus / "corpus.json").read_text())
    described["shards"][0]["name"] = "../../secret.tar"
    (tmp_path / "secret.tar").write_bytes((corpus / "shards" / "00000.tar").read_bytes())
    (corpus / "corpus.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"is damaged: shards/../../secret.tar is not there"):
        Corpus.open(corpus)


def test_member_names_of_a_tar_are_never_followed(corpus, tmp_path):
    """A tar whose members would unpack elsewhere, or to a hundred times its size: nothing is unpacked, ever."""
    shard = corpus / "shards" / "00000.tar"
    size = shard.stat().st_size
    with tarfile.open(shard, "w") as archive:
        member = tarfile.TarInfo("../../../outside")
        archive.addfile(member)
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
        sparse = tarfile.TarInfo("00000000.adc")
        sparse.size = 1 << 40
        archive.addfile(sparse, None)
    os.truncate(shard, size)
    before = sorted(path for path in tmp_path.rglob("*"))
    opened = Corpus.open(corpus)
    for record in range(len(opened)):
        assert opened.read_adc(record).shape == (12, 5000)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert "shards/00000.tar" in opened.damage()


def test_a_table_that_lies_about_lengths(corpus):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(corpus / "records.parquet")
    for name, value in (("samples", 2**31 - 1), ("offset", 2**62), ("offset", -1), ("shard", 99)):
        place = table.column_names.index(name)
        values = pa.array([value] * len(table), table.field(place).type)
        pq.write_table(table.set_column(place, table.field(place), values), corpus / "records.parquet")
        with pytest.raises(ValueError, match=r"record 0 of .* ends inside it"):
            Corpus.open(corpus).read_adc(0)


def test_parquet_bombs(corpus, monkeypatch):
    """Rows beyond number, or texts beyond size, in a table of kilobytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(corpus / "records.parquet").slice(0, 1).take(pa.array([0] * 100_000))
    pq.write_table(table, corpus / "records.parquet")
    described = json.loads((corpus / "corpus.json").read_text())
    (corpus / "corpus.json").write_text(json.dumps(described | {"records": 100_000}))
    with pytest.raises(ValueError, match="its shards cannot hold 100000 records"):
        Corpus.open(corpus)
    monkeypatch.setattr(corpus_module, "COLUMN_BYTES", 1 << 20)  # a smaller one, for the test's time
    opened = Corpus(corpus, described | {"reports": 100})
    table = pq.read_table(corpus / "reports.parquet").slice(0, 1).take(pa.array([0] * 100))
    pq.write_table(table.set_column(1, "text", pa.array(["x" * 100_000] * 100)), corpus / "reports.parquet")
    assert (corpus / "reports.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match="text unpacks to more than 1,048,576 bytes"):
        opened.reports  # noqa: B018


def test_text_that_is_no_text(tmp_path):
    for name, content, message in (
        ("nul.toml", b"[train]\nsteps = 3\0\n", "not valid TOML"),
        ("latin.toml", "# é".encode("latin-1"), "is not UTF-8 text"),
        ("deep.toml", b"a = " + b"[" * 100_000, "not valid TOML"),
        ("long.toml", b"#" * (2 << 20), "is longer than 1,048,576 bytes"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Config.load(str(tmp_path / name))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"--prompts .*deep.json: maximum recursion"):
        read_prompts(tmp_path / "deep.json")
    with pytest.raises(ValueError, match=r"deep.json cannot be read as JSON"):
        torch.save({}, tmp_path / "empty.pt")
        import_checkpoint(tmp_path / "empty.pt", tmp_path / "deep.json")
    (tmp_path / "record_list.csv").write_bytes(b"subject_id,study_id,path\n1,2,\xff\xfe\n")
    (tmp_path / "machine_measurements.csv").write_bytes(b"subject_id,study_id,report_0\n1,2,\x00sinus\n")
    with pytest.raises(ValueError, match=r"record_list.csv is not a CSV table"):
        prepare("mimic-iv-ecg", tmp_path, tmp_path / "out", workers=1)


# --- checkpoints ---------------------------------------------------------------------------------------------------


class Harmful:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_pickles_are_not_run(tmp_path):
    harmful = Harmful(tmp_path / "pickle-was-run")
    torch.save({"model": harmful}, tmp_path / "released.pt")
    with pytest.raises(ValueError, match="holds more than tensors and is not read, since that could run code"):
        import_checkpoint(tmp_path / "released.pt")
    torch.save({"shared.weight": harmful}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="hold more than tensors and are not read, since that could run code"):
        load_text_weights(DBeta(SMALL), str(tmp_path))
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "state.json", "manifest.json"):
        (folder / name).write_bytes(pickle.dumps(harmful))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        checkpoint.latest(folder.parent)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(folder, DBeta(SMALL))
    with pytest.raises(ValueError, match="cannot be read"):
        shards.load(folder, DBeta(SMALL), None)
    with pytest.raises(ValueError, match="cannot be read"):
        DBeta.from_pretrained(_model_of(folder))
    assert not harmful.trace.exists()


def test_released_checkpoints_that_claim_more_than_they_hold(tmp_path):
    path, packed = tmp_path / "released.pt", tmp_path / "packed.pt"
    torch.save({"class_embedding": torch.zeros(1, dtype=torch.half).expand(1 << 40)}, path)
    with pytest.raises(ValueError, match="class_embedding claims more values than are stored"):
        import_checkpoint(path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"is a compressed archive, which torch.save never writes"):
        import_checkpoint(packed)
    packed.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a compressed archive"):
        load_text_weights(DBeta(SMALL), str(tmp_path))


def _model_of(folder: Path) -> Path:
    (folder / "config.json").write_bytes((folder / "state.json").read_bytes())
    return folder


def test_safetensors_that_lie(tmp_path):
    for content in (b"\xff" * 8 + b"{}", struct.pack("<Q", 1 << 40), b"", struct.pack("<Q", 9) + b'{"a":[[[['):
        (tmp_path / "model.safetensors").write_bytes(content)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"cannot be read|is an empty file"):
            DBeta.from_pretrained(tmp_path)


def test_a_model_folder_never_asks_the_hub(tmp_path):
    DBeta(SMALL).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["model"]["text_encoder"] = "somebody/something"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="has no folder text_encoder"):
        DBeta.from_pretrained(tmp_path)
