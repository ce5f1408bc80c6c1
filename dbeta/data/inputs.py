"""What training reads besides records: a tokenizer, the token table of the reports, the table of negatives."""

import torch

from dbeta.config import Config
from dbeta.data.batch import BatchMaker, TextVocabulary
from dbeta.data.corpus import Corpus
from dbeta.data.negatives import load_negatives, negatives
from dbeta.data.reports import token_table
from dbeta.data.tokenizer import Tokenizer, load_tokenizer
from dbeta.runtime import announce


def load_inputs(corpus: Corpus, config: Config) -> tuple[BatchMaker, Tokenizer]:
    """The batch maker of a corpus, on the host, and its tokenizer.

    Only the smoke preset makes a missing table of negatives on the spot (hashed n-grams, announced): the table decides
    what a model learns, so anything else must ask for it.

    Raises:
        ValueError: no table of negatives, no tokenizer, or one with more ids than the model's vocabulary.
    """
    data, model = config.data, config.model
    tokenizer = load_tokenizer(data.tokenizer, corpus, max_tokens=data.max_tokens, max_vocabulary=model.text_vocab)
    table = None
    if data.negatives == "n3s":
        if not (corpus.path / "negatives.npz").is_file():
            command = f"dbeta negatives {corpus.path} --encoder DIR|hashing"
            if config.preset != "smoke":
                raise ValueError(f"{corpus.path} has no table of negatives; make it with: {command}")
            announce(f"no table of negatives: making one; to choose its encoder run: {command}")
            negatives(corpus.path, device="cpu")
        table = torch.as_tensor(load_negatives(corpus).table)
    report_of = torch.tensor(corpus.column("report"), dtype=torch.int64)
    if len(report_of) and not 0 <= int(report_of.min()) <= int(report_of.max()) < len(corpus.reports):
        raise ValueError(f"{corpus.path / 'records.parquet'} is damaged: reports that are not there; prepare it again")
    maker = BatchMaker(
        report_of,
        token_table(corpus, tokenizer),
        table,
        TextVocabulary(size=tokenizer.vocab_size, mask=tokenizer.mask, special=tokenizer.special_ids),
        data,
        config.loss,
        seed=config.train.seed,
        batch=config.train.batch,
        ecg_tokens=model.ecg_tokens,
        kernels=config.runtime.kernels,
    )
    return maker, tokenizer
