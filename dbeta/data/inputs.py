"""What training reads besides records: a tokenizer, the token table of the reports, the table of negatives."""

import torch

from dbeta.config import Config
from dbeta.data.batch import BatchMaker, TextVocabulary
from dbeta.data.corpus import Corpus
from dbeta.data.negatives import load_negatives, negatives
from dbeta.data.reports import TokenTable
from dbeta.data.tokenizer import Tokenizer, load_tokenizer
from dbeta.runtime import announce


def load_tables(corpus: Corpus, config: Config) -> tuple[BatchMaker, Tokenizer]:
    """The batch maker of a corpus, on the host, and its tokenizer.

    Only the smoke preset makes a missing table of negatives on the spot (hashed n-grams, announced): a table decides
    what a model learns, so anything else must ask for it.

    Raises:
        ValueError: no table of negatives, no tokenizer, or one with more ids than the model's vocabulary.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, corpus, vocab_size=config.model.text_vocab)
    if tokenizer.vocab_size > config.model.text_vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.text_vocab is {config.model.text_vocab}; "
            f"use --set model.text_vocab={tokenizer.vocab_size}"
        )
    table = None
    if config.data.negatives == "n3s":
        if not (corpus.path / "negatives.npz").is_file():
            command = f"dbeta negatives {corpus.path} --encoder DIR|hashing"
            if config.preset != "smoke":
                raise ValueError(f"{corpus.path} has no table of negatives; make it with: {command}")
            announce(f"making the table of negatives with the hashing encoder; for a language model's, run: {command}")
            negatives(corpus.path, encoder="hashing", device="cpu")
        table = load_negatives(corpus).table
    tokens = TokenTable.load_or_build(corpus, tokenizer, max_tokens=config.data.max_tokens)
    maker = BatchMaker(
        torch.as_tensor(corpus.column("report")).long(),
        tokens,
        None if table is None else torch.as_tensor(table),
        TextVocabulary(size=tokenizer.vocab_size, mask=tokenizer.mask_id, special=tuple(tokenizer.special_ids)),
        config.data,
        config.loss,
        seed=config.train.seed,
        batch=config.train.batch,
        ecg_tokens=config.model.samples >> config.model.stem_layers,
        kernels=config.runtime.kernels,
    )
    return maker, tokenizer
