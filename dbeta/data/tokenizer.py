"""The tokenizer: T5's from a directory or the hub, or one trained on the corpus's own reports.

A thin layer over Hugging Face's ``tokenizers``, because a table of every unique report is tokenised once and training
needs no more than a few ids. A folder with ``tokenizer.json`` is read without importing transformers.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dbeta.data.hub import find_folder
from dbeta.files import write_whole
from dbeta.runtime import announce

MAX_TOKENS = 254  # paper 4.1: 256 minus room for two specials; T5's end token counts among the 254 (MODEL section 11)
TRAINED_VOCABULARY = 4096
_SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>")  # ids 0 1 2 as in T5; T5 itself has no mask token


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        pad, eos, unk, mask: ids. T5 has no mask token of its own: ``<extra_id_0>`` serves (RECIPE 1).
        special_ids: ids that MLM never selects, ascending.
        vocab_size: number of ids, specials included; the model's embedding table may be larger.
        max_tokens: rows are truncated to this many ids, the end token included.
    """

    backend: tokenizers.Tokenizer
    pad: int
    eos: int
    unk: int
    mask: int
    special_ids: tuple[int, ...]
    vocab_size: int
    max_tokens: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]  # holds the truncation too

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the tokenizer's special tokens (T5: the end token), truncated, not padded."""
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts))]
        except BaseException as error:
            if not _panicked(error):
                raise
            raise ValueError(
                f"the tokenizer is damaged ({error}); delete its tokenizer.json and make it again"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.backend.decode(list(ids))

    def save(self, folder: Path) -> None:
        """Write the folder that ``load_tokenizer(folder)`` and transformers' AutoTokenizer read."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        names = {name: self.backend.id_to_token(getattr(self, name)) for name in ("pad", "eos", "unk", "mask")}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_tokens}
        config |= {f"{name}_token": token for name, token in names.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _panicked(error: BaseException) -> bool:
    """Whether the library met what it took for impossible; Python does not count that among its Exceptions."""
    return type(error).__name__ == "PanicException"


PRETRAINING = "use --set data.tokenizer=DIR or --set data.tokenizer=corpus"
TRAINED = "use the one that the model was trained with: --tokenizer DIR, or from_pretrained(..., tokenizer=DIR)"


def load_tokenizer(
    spec: str | Path,
    corpus=None,
    *,
    max_tokens: int = MAX_TOKENS,
    max_vocabulary: int | None = None,
    options: str = "",
) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names.

    Args:
        spec: a directory, a hub id (downloaded where it is not in the local cache), or "corpus": one trained on
            ``corpus.reports`` and kept in the corpus folder.
        corpus: needed for "corpus" only; has ``.path`` and ``.reports``.
        max_tokens: truncation, end token included.
        max_vocabulary: size of the model's embedding table, and the limit of a trained vocabulary.
        options: what to do about one that will not do, for the message; "": what pre-training can be told.

    Raises:
        ValueError: it cannot be found, has no token MLM could use as mask, or has more ids than ``max_vocabulary``.
    """
    if str(spec) == "corpus":
        if corpus is None:
            raise ValueError("data.tokenizer = 'corpus' needs a corpus (--data CORPUS); or --set data.tokenizer=DIR")
        return _trained(corpus, max_tokens, min(max_vocabulary or TRAINED_VOCABULARY, TRAINED_VOCABULARY))
    tokenizer = _assemble(*_find(spec, options or PRETRAINING), max_tokens, f"tokenizer {str(spec)!r}")
    if max_vocabulary is not None and tokenizer.vocab_size > max_vocabulary:
        enough = -(-tokenizer.vocab_size // 128) * 128
        raise ValueError(
            f"tokenizer {str(spec)!r} has {tokenizer.vocab_size} ids, more than model.text_vocab = {max_vocabulary}; "
            + (options or f"use --set model.text_vocab={enough} or --set data.tokenizer=corpus")
        )
    return tokenizer


def _find(spec: str | Path, options: str) -> tuple[tokenizers.Tokenizer, dict]:
    """Backend and special-token names of a directory or hub id."""
    files = ("tokenizer.json", "spiece.model", "vocab.txt")
    try:
        folder = find_folder(spec, files, (*files, "*config.json"))
    except ValueError as error:
        raise ValueError(f"tokenizer {error}; {options}") from None
    try:
        if (folder / "tokenizer.json").is_file():
            config = folder / "tokenizer_config.json"
            names = json.loads(config.read_text()) if config.is_file() else {}
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), names
        from transformers import AutoTokenizer  # for folders that hold a SentencePiece model or a word list only

        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return loaded.backend_tokenizer, loaded.special_tokens_map
    except BaseException as error:  # tokenizers raises plain Exception; transformers OSError, ValueError, ImportError
        if not isinstance(error, Exception) and not _panicked(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"no tokenizer can be read from {folder} ({reason[:120]}); it needs a tokenizer.json or "
            f"spiece.model: {options}"
        ) from None


def _assemble(backend: tokenizers.Tokenizer, names: dict, max_tokens: int, what: str) -> Tokenizer:
    def token_id(*candidates: str | None) -> int | None:
        return next((i for c in candidates if isinstance(c, str) and (i := backend.token_to_id(c)) is not None), None)

    def named(key: str) -> str | None:
        value = names.get(key) if isinstance(names, dict) else None
        return value.get("content") if isinstance(value, dict) else value

    ids = {
        "pad": token_id(named("pad_token"), "<pad>", "[PAD]"),
        "eos": token_id(named("eos_token"), named("sep_token"), "</s>", "[SEP]"),
        "unk": token_id(named("unk_token"), "<unk>", "[UNK]"),
        "mask": token_id(named("mask_token"), "<mask>", "[MASK]", "<extra_id_0>"),
    }
    missing = [name for name, value in ids.items() if value is None]
    if missing:
        raise ValueError(f"{what} has no {' or '.join(missing)} token; use a T5 or BERT one, or data.tokenizer=corpus")
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special} | set(ids.values())
    backend.no_padding()
    backend.enable_truncation(max_tokens)
    return Tokenizer(
        backend=backend, **ids, special_ids=tuple(sorted(special)), vocab_size=backend.get_vocab_size(),
        max_tokens=max_tokens,
    )  # fmt: skip


def train(texts: Sequence[str], size: int = TRAINED_VOCABULARY, max_tokens: int = MAX_TOKENS) -> Tokenizer:
    """A byte-pair tokenizer of at most ``size`` ids on the given texts; the same texts give the same tokenizer.

    The letters a-z, digits and the corpus's own characters are always known, so that only a foreign script is <unk>.
    """
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, show_progress=False, max_token_length=24,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL],
        limit_alphabet=size // 4, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789"),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _assemble(backend, {}, max_tokens, "the trained tokenizer")


def _trained(corpus, max_tokens: int, size: int) -> Tokenizer:
    folder = Path(corpus.path) / f"tokenizer-{size}"
    if not folder.is_dir():
        tokenizer = train(corpus.reports, size, max_tokens)
        announce(
            f"data.tokenizer=corpus: a tokenizer of {tokenizer.vocab_size} ids was trained on the "
            f"{len(corpus.reports)} reports of {corpus.path}"
        )
        try:
            _keep(tokenizer, folder)
        except OSError as error:
            announce(f"the tokenizer is not kept in {corpus.path} ({error.strerror}); it is trained again in every run")
            return tokenizer
    return load_tokenizer(folder, max_tokens=max_tokens)


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    """Save under a temporary name and rename: a folder with the final name is whole. The first of several wins."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        tokenizer.save(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise
