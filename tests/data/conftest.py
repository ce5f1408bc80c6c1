"""Small corpora of given records."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from dbeta.data.corpus import Corpus
from dbeta.data.corpus_writer import Options, Plan, write_corpus
from dbeta.data.records import Record, Rejection


@pytest.fixture(scope="module")
def corpus_of(tmp_path_factory) -> Callable[..., Corpus]:
    """``corpus_of(records, **options)``: written in this process, in the given order unless shuffled."""

    def make(records: Sequence[Record | Rejection], *, shuffle: bool = False, **options) -> Corpus:
        out: Path = tmp_path_factory.mktemp("corpus") / "corpus"
        plan = Plan(
            table=pa.table({"number": list(range(len(records)))}), shuffle=shuffle,
            read=lambda rows: (records[row["number"]] for row in rows),
        )  # fmt: skip
        write_corpus(plan, Options(source="test", **options), out, workers=1)
        return Corpus.open(out)

    return make
