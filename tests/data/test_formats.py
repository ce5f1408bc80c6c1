"""Raw records of every form, with the traps that real data sets hold, against wfdb and scipy."""

import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from dbeta.data.formats import from_float, load_mat, narrowed, read_sph
from dbeta.data.records import LEADS, canonical, einthoven_residual, limb_problem, read_ecg, read_record
from dbeta.data.wfdb_files import read_header, read_wfdb

wfdb = pytest.importorskip("wfdb", reason="not on a machine that is lent with its GPU only")


@pytest.fixture(scope="module")
def data(shared) -> Path:
    return shared / "data"


def written(folder: Path, codes: np.ndarray, form: str, name: str = "r1", **more) -> Path:
    """A record of [L, S] integers in a WFDB format."""
    signals = codes.shape[1]
    names = more.pop("names", [*LEADS, "vx", "vy", "vz"][:signals])
    wfdb.wrsamp(
        name, fs=more.pop("fs", 500), units=["mV"] * signals, sig_name=names, d_signal=codes, fmt=[form] * signals,
        adc_gain=[200.0] * signals, baseline=[0] * signals, write_dir=str(folder), **more,
    )  # fmt: skip
    return folder / f"{name}.hea"


@pytest.mark.parametrize(("form", "bits"), [("16", 16), ("61", 16), ("160", 16), ("80", 8), ("212", 12), ("24", 24),
                                            ("32", 32), ("310", 10), ("311", 10)])  # fmt: skip
def test_integer_formats_bit_for_bit(form, bits, tmp_path):
    """Every sample as wfdb decodes it; "no sample" of the format becomes ours; the type is the narrowest."""
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (301, 3))  # an odd total: the last group of a packed format is cut
    codes[7, 1] = -top - 1
    if form in ("61", "160", "310", "311"):  # wfdb does not write them: a file of our own, read back by wfdb
        codes = packed(tmp_path, codes.astype(np.int64), form)
    else:
        written(tmp_path, codes, form)
    raw = read_wfdb(tmp_path / "r1")
    expected = wfdb.rdrecord(str(tmp_path / "r1"), physical=False).d_signal.T
    assert raw.adc.dtype == (np.int16 if bits <= 16 else np.int32) and raw.adc[1, 7] == np.iinfo(raw.adc.dtype).min
    valid = np.ones(expected.shape, bool)
    valid[1, 7] = False
    np.testing.assert_array_equal(raw.adc[valid], expected[valid])
    np.testing.assert_array_equal(expected.T, codes)


def packed(folder: Path, codes: np.ndarray, form: str) -> np.ndarray:
    stream = codes.reshape(-1)
    if form in ("61", "160"):
        content = (stream.astype(">i2") if form == "61" else (stream + 2**15).astype("<u2")).tobytes()
    else:
        stream = np.concatenate([stream, np.zeros(-len(stream) % 3, np.int64)])
        a, b, c = (stream.reshape(-1, 3) & 0x3FF).T
        if form == "310":
            words = np.stack([a << 1 | (c & 0x1F) << 11, b << 1 | (c >> 5) << 11], 1)
            content = words.astype("<u2").tobytes()
        else:
            content = (a | b << 10 | c << 20).astype("<u4").tobytes()
    (folder / "r1.dat").write_bytes(content)
    lines = [f"r1.dat {form} 200(0)/mV 16 0 {lead[0]} {lead.sum() & 0xFFFF} 0 {name}"
             for name, lead in zip(LEADS, codes.T)]  # fmt: skip
    (folder / "r1.hea").write_text("\n".join([f"r1 {codes.shape[1]} 500 {len(codes)}", *lines]) + "\n")
    return codes


def test_wide_samples_stay_exact(tmp_path):
    small = narrowed(np.array([[-32767, 32767]]), np.zeros((1, 2), bool))
    large = narrowed(np.array([[-32768, 32767]]), np.zeros((1, 2), bool))
    assert small.dtype == np.int16 and large.dtype == np.int32 and large[0, 0] == -32768


def test_every_real_header(data):
    """Each of the 400 real WFDB records reads as wfdb reads it, where wfdb can."""
    seen = 0
    for path in sorted(data.rglob("*.hea")):
        header = read_header(path)
        if any(not (path.parent / signal.file).is_file() for signal in header.signals):
            with pytest.raises(ValueError, match=r"^missing signal file: "):
                read_wfdb(path)
            continue
        raw = read_wfdb(path)
        record = canonical(raw, name=path.stem, subject="", limb_leads="reject", all_leads=True)
        assert not limb_problem(record) and einthoven_residual(record) < 0.1
        if seen % 9 == 0 and header.name == path.stem:  # wfdb is slow
            expected = wfdb.rdrecord(str(path.with_suffix("")))
            order = [[name.upper() for name in expected.sig_name].index(lead.upper()) for lead in LEADS]
            np.testing.assert_allclose(record.to_mv(), expected.p_signal.T[order], atol=2e-6)
        seen += 1
    assert seen >= 400


def test_record_line_that_names_its_mat(data):
    folder = data / "cinc2021" / "quirks" / "record-line-with-.mat"
    for path in sorted(folder.glob("*.hea")):
        with pytest.raises(wfdb.io.header.HeaderSyntaxError):
            wfdb.rdheader(str(path.with_suffix("")))
        raw = read_wfdb(path)
        np.testing.assert_array_equal(raw.adc, scipy.io.loadmat(path.with_suffix(".mat"))["val"])
        assert raw.notes[0][0] == "record line"


def test_units_and_dx_spellings(data):
    lower = read_header(data / "cinc2021" / "ptb-xl" / "HR00001.hea")
    assert lower.signals[0].gain == 1000 and lower.comment("Dx") == "251146004,426783006"
    empty = read_header(data / "cinc2021" / "quirks" / "st_petersburg-headers-only" / "I0001.hea")
    assert empty.rate_hz == 257 and empty.comment("dx") == "" and empty.signals[0].gain == 306000
    assert any("16x1+24" in p.read_text() for p in (data / "cinc2021" / "georgia").glob("*.hea"))


def test_units_scale(tmp_path):
    path = written(tmp_path, np.arange(200).reshape(100, 2), "16")
    text = path.read_text()
    for units, per_mv in (("uV", 1000), ("V", 1e-3), ("mv", 1)):
        path.write_text(text.replace("/mV", f"/{units}"))
        assert read_wfdb(path).gain == pytest.approx([200 * per_mv] * 2)
    path.write_text(text.replace("200.0(0)/mV", "200.0(-5)/mV"))
    assert (read_wfdb(path).baseline == -5).all()


def test_fifteen_leads_of_two_files(data):
    record = read_record(data / "ptb" / "s0010_re.hea")
    assert record.adc.shape == (12, 38400) and record.rate_hz == 1000 and (record.gain == 2000).all()
    raw = read_wfdb(data / "ptb" / "s0010_re")
    assert raw.names[-3:] == ("vx", "vy", "vz") and raw.adc.shape[0] == 15
    frank = np.fromfile(data / "ptb" / "s0010_re.xyz", "<i2").reshape(-1, 3).T
    np.testing.assert_array_equal(raw.adc[12:], frank)
    assert read_ecg(data / "ptb" / "s0010_re.hea").shape == (12, 19200)


def test_float_sources_round_to_half_a_microvolt(data):
    cpsc = data / "cpsc2018-native" / "A1981.mat"
    exact = scipy.io.loadmat(cpsc)["ECG"]["data"][0, 0]
    code = data / "code15-sample" / "code_15_795649.mat"
    with h5py.File(data / "sph" / "SPH00003.h5") as file:
        float16 = file["ecg"][:]
    for path, signal, rate in (
        (cpsc, exact, 500), (code, scipy.io.loadmat(code)["feats"], 400), (data / "sph" / "SPH00003.h5", float16, 500)
    ):  # fmt: skip
        record = read_record(path)
        assert record.rate_hz == rate and record.adc.dtype == np.int16
        assert np.abs(record.to_mv() - signal).max() <= 0.0005001


def test_zero_padding_is_trimmed(tmp_path):
    feats = np.zeros((12, 4096), np.float32)
    feats[:, 581:3515] = np.random.default_rng(0).standard_normal((12, 2934)) * 0.1
    content = {"feats": feats, "curr_sample_rate": 400}
    scipy.io.savemat(tmp_path / "code_15_1.mat", content)
    assert read_record(tmp_path / "code_15_1.mat").adc.shape == (12, 2934)


def test_float_extremes(tmp_path):
    signal = np.zeros((12, 100), np.float32)
    signal[:, 50] = np.linspace(1, 12, 12)
    signal[3, 7], signal[4, 8] = np.nan, 40.0  # beyond int16 at 1 uV
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["ecg"] = signal
    raw = read_sph(tmp_path / "x.h5")
    assert raw.adc.dtype == np.int32 and raw.adc[3, 7] == -(2**31) and raw.adc[4, 8] == 40_000
    record = canonical(raw, name="x", subject="")
    assert record.to_mv()[3, 7] == 0 and record.notes[0] == ("invalid samples", "1 (NaN) are 0 mV")
    signal[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"^amplitude: "):
        from_float(signal, 500.0)


def test_slips_in_lead_names_are_found(data):
    record = read_record(data / "ptbxl" / "records500" / "00000" / "00001_hr.hea")
    for swap in ([0, 1, 2, 3, 5, 4], [1, 0, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5], [0, 1, 2, 5, 4, 3]):
        wrong = replace(record, adc=record.adc[[*swap, *range(6, 12)]])
        assert "would fit" in limb_problem(wrong), swap
    noise = np.random.default_rng(0).integers(-500, 500, record.adc.shape).astype(np.int16)
    assert "in any order" in limb_problem(replace(record, adc=noise))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h.replace("r1.dat", "../r1.dat"), "unreadable header: signal file"),
        (lambda h: h.replace("r1.dat", "/etc/passwd"), "unreadable header: signal file"),
        (lambda h: h.replace("r1.dat", "..\\r1.dat"), "unreadable header: signal file"),
        (lambda h: h.replace(" 100\n", " 99999999999\n"), "unreadable header: 2 signals"),
        (lambda h: h.replace("r1 2", "r1 1000000"), "unreadable header"),
        (lambda h: h.replace("r1 2 500", "r1/3 2 500"), "multi-segment record"),
        (lambda h: h.replace("r1 2 500", "r1 2 0"), "unreadable header: 2 signals"),
        (lambda h: h.replace("r1 2", "r1 3"), "unreadable header: 3 signals announced, 2 described"),
        (lambda h: h.replace("200.0(0)/mV", "nan(0)/mV"), "bad gain"),
        (lambda h: h.replace("200.0(0)/mV", "-200(0)/mV"), "bad gain"),
        (lambda h: h.replace(" 16 200.0(0)/mV", " 16"), "checksum|bad gain|unreadable header"),
        (lambda h: h.replace("/mV", "/mmHg"), "bad units"),
        (lambda h: h.replace(".dat 16 ", ".dat 16x4 "), "several samples per frame"),
        (lambda h: h.replace(" 100\n", " 101\n"), "truncated signal file"),
        (lambda h: h.replace(" 100\n", " 50\n"), "signal file does not fit"),
        (lambda h: "\0\x01\x02" * 50, "unreadable header: record line"),
        (lambda h: "", "unreadable header: it is empty"),
    ],
)
def test_damaged_headers(change, reason, tmp_path):
    path = written(tmp_path, np.arange(200).reshape(100, 2), "16")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"^({reason})"):
        read_wfdb(path)


def test_one_flipped_bit_is_noticed(tmp_path):
    path = written(tmp_path, np.arange(200).reshape(100, 2), "16")
    content = bytearray((tmp_path / "r1.dat").read_bytes())
    content[77] ^= 4
    (tmp_path / "r1.dat").write_bytes(content)
    with pytest.raises(ValueError, match=r"^checksum: "):
        read_wfdb(path)


@pytest.mark.parametrize("packed", [False, True])
def test_cells_in_cells_do_not_end_the_process(tmp_path, packed):
    """scipy reads them by recursion in C: 20,000 were a segmentation fault."""
    cell = struct.pack("<10I", 6, 8, 1, 0, 5, 8, 1, 1, 1, 0)  # flags, size 1 x 1, no name
    body = b"".join(struct.pack("<II", 14, 48 * left) + cell for left in range(20_000, 0, -1))
    if packed:
        body = zlib.compress(body)
        body = struct.pack("<II", 15, len(body)) + body
    (tmp_path / "A1.mat").write_bytes(b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 0x100, b"IM") + body)
    with pytest.raises(ValueError, match=r"too large: A1.mat has more than 4,000 elements"):
        read_record(tmp_path / "A1.mat")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "'' is no path of a record"), (None, "None is no path of a record"), (b"r1.hea", "b'r1.hea' is no path"),
        (Path(""), ".: no record: a folder"), ("/", "/: no record: a folder"), ("{}", "no record: a folder"),
        ("{}/folder.mat", "no record: a folder"), ("{}/folder.h5#0", "folder.h5#0: no record: a folder"),
        ("{}/none", "none: no record: no such file"), ("{}/none.hea", "none.hea: no record: no such file"),
        ("{}/none.mat", "none.mat: no record: no such file"), ("{}/none.hdf5#3", "none.hdf5#3: no record: no such"),
        ("{}/notes.txt", "unknown format: .txt without a .hea"),
    ],
)  # fmt: skip
def test_paths_of_no_record(tmp_path, path, said):
    for name in ("folder.mat", "folder.h5"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("no record")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_ecg(path.format(tmp_path) if isinstance(path, str) else path)
    assert "accepted: WFDB" in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_cannot_be_looked_at():
    with pytest.raises(ValueError, match=r"xxx: cannot be read: File name too long"):
        read_ecg("x" * 300)


def test_a_lost_signal_is_not_a_lost_record(tmp_path):
    written(tmp_path, np.arange(200).reshape(100, 2), "16")
    (tmp_path / "r1.dat").unlink()
    for name in ("r1", "r1.hea", "r1.dat"):
        with pytest.raises(ValueError, match=f"{name}: missing signal file: r1.dat"):
            read_ecg(tmp_path / name)


def packed_mat(path: Path, *elements: bytes) -> Path:
    """A MATLAB 5 file of compressed elements."""
    body = b"".join(struct.pack("<II", 15, len(e)) + e for e in map(zlib.compress, elements))
    path.write_bytes(b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 0x100, b"IM") + body)
    return path


def matrix(path: Path, **arrays: np.ndarray) -> bytes:
    """One MATLAB 5 element per array, as scipy writes it."""
    scipy.io.savemat(path, arrays)
    return path.read_bytes()[128:]


def test_a_mat_file_is_unpacked_once(data, tmp_path, monkeypatch):
    """scipy gets what was checked, without compression, and finds in it what it finds in the file."""
    given, exact = [], scipy.io.loadmat
    monkeypatch.setattr(scipy.io, "loadmat", lambda source: given.append(source) or exact(source))
    big = tmp_path / "big.mat"
    elements = [matrix(tmp_path / "m.mat", **{name: np.random.default_rng(0).normal(size=(12, n))}) for name, n in
                (("a", 5000), ("b", 1))]  # fmt: skip
    paths = [*sorted(data.rglob("*.mat"))[::7], *(data / "cpsc2018-native").glob("*.mat"), packed_mat(big, *elements)]
    for path in paths:
        given.clear()
        found, expected = load_mat(path), exact(path)
        kept, same = ({name: a for name, a in arrays.items() if name[0] != "_"} for arrays in (found, expected))
        assert matrix(tmp_path / "m.mat", **kept) == matrix(tmp_path / "m.mat", **same)
        (source,) = given
        if path.read_bytes()[126:128] == b"IM":
            at, content = 128, source.getvalue()
            while at < len(content):
                kind, size = struct.unpack_from("<II", content, at)
                assert kind == 14
                at += 8 + size
    assert len(source.getvalue()) == 128 + sum(map(len, elements)), "the packed one was read last"
    given.clear()
    read_ecg(data / "cpsc2018-native" / "A1980.mat")
    assert len(given) == 1


def test_what_was_not_measured_is_not_read(tmp_path):
    """An element packed twice, or behind another in one packing, would be unpacked by scipy alone."""
    good = matrix(tmp_path / "m.mat", ECG=np.zeros((1, 1)))
    twice = struct.pack("<II", 15, len(zlib.compress(good))) + zlib.compress(good)
    short = struct.pack("<II", 14, 8) + good[8:]
    for element in (twice, good + twice, short, good[:7], b""):
        with pytest.raises(ValueError, match="a compressed element is cut, or is no matrix"):
            load_mat(packed_mat(tmp_path / "A1.mat", element))
    whole = packed_mat(tmp_path / "A1.mat", good).read_bytes()
    assert load_mat(tmp_path / "A1.mat")["ECG"].shape == (1, 1)
    (tmp_path / "A1.mat").write_bytes(whole[:-4])  # of the checksum
    with pytest.raises(ValueError, match="a compressed element is cut"):
        load_mat(tmp_path / "A1.mat")
