"""Embeddings of unique reports for N3S: a pre-trained encoder's mean token, or hashed n-grams where there is none."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dbeta.data.hub import find_folder
from dbeta.data.reports import TokenTable
from dbeta.data.tokenizer import load_tokenizer
from dbeta.runtime import track

PAPER_ENCODER = "google/flan-t5-small"  # paper 3.4, 512 dimensions
WEIGHTS = ("model.safetensors",)
OPTIONS = "use dbeta negatives --encoder DIR (a folder with its weights and tokenizer) or --encoder hashing"
FEATURES = 2**18  # hashed words and word pairs; a corpus of 180,000 machine-written reports has fewer distinct ones


def hash_embedding(texts: Sequence[str], width: int = 512, seed: int = 0) -> Tensor:
    """TF-IDF of words and word pairs, hashed, projected to ``width``, mean-centred, of norm 1.

    Needs no model. The projection adds or subtracts each feature in one seeded dimension (a count sketch), which keeps
    inner products in expectation. Without the centring, texts with no word in common would all tie at cosine 0.

    Returns:
        float32 [len(texts), width]; a text without words has the embedding of an average one.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    counts = HashingVectorizer(
        n_features=FEATURES, ngram_range=(1, 2), token_pattern=r"\w+", alternate_sign=False, norm=None, dtype=np.float32
    ).transform(texts)
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    draw = np.random.default_rng(seed)
    signs = draw.choice(np.array([-1, 1], np.float32), FEATURES)
    sketch = sparse.csr_matrix((signs, draw.integers(0, width, FEATURES), np.arange(FEATURES + 1)), (FEATURES, width))
    embedding = torch.from_numpy((weighted @ sketch).toarray())
    return unit(embedding.sub_(embedding.mean(0, dtype=torch.float64).float()))


def encoder_embedding(
    texts: Sequence[str], encoder: str | Path, device: torch.device | str = "cpu", tokens_per_batch: int | None = None
) -> Tensor:
    """Mean of a pre-trained encoder's states over the real tokens of each text (RECIPE 1), of norm 1.

    Batches hold texts of like length, so little padding is computed; bf16 on a GPU that has it, else float32.

    Args:
        encoder: directory or hub id of any text encoder that transformers can load, with its tokenizer.
        tokens_per_batch: padding included; by default 4,096 on a CPU and 65,536 on a GPU.

    Returns:
        float32 [len(texts), D] on ``device``.

    Raises:
        ValueError: the encoder cannot be found, or its weights are incomplete.
    """
    model = load_encoder(encoder)
    device = torch.device(device)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    table = TokenTable.build(texts, load_tokenizer(encoder, options=OPTIONS))
    if tokens_per_batch is None:
        tokens_per_batch = 65_536 if device.type == "cuda" else 4096
    return mean_token(model.to(device, torch.bfloat16 if half else torch.float32), table.to(device), tokens_per_batch)


def mean_token(model: torch.nn.Module, table: TokenTable, tokens_per_batch: int) -> Tensor:
    """Mean state over the real tokens of every row of ``table``, of norm 1: float32 [len(table), D]."""
    device = table.ids.device
    ascending, order = table.lengths.cpu().sort(stable=True)
    batches = _batches(ascending.tolist(), tokens_per_batch)
    embedding = torch.empty(len(table), model.config.hidden_size, device=device)
    with torch.inference_mode():
        for first, last, longest in track(batches, "embedding"):
            rows = order[first:last].to(device)
            ids, mask = table.gather(rows, longest)
            states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            embedding[rows] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return unit(embedding)


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by (norm + 1e-10), in place (MODEL section 12)."""
    return vectors.div_(vectors.norm(dim=1, keepdim=True).add_(1e-10))


def load_encoder(encoder: str | Path) -> torch.nn.Module:
    """A text encoder of transformers in eval mode, complete: never with random weights.

    Raises:
        ValueError: it cannot be found or read, or tensors are missing.
    """
    from transformers import AutoModelForTextEncoding

    try:
        folder = find_folder(encoder, WEIGHTS, (*WEIGHTS, "*.json", "spiece.model", "vocab.txt"))
    except ValueError as error:
        raise ValueError(f"text encoder {error}; {OPTIONS}") from None
    try:
        with _quiet_transformers():
            model, report = AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ... by what is wrong with the folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no text encoder can be read from {folder} ({reason[:160]}); {OPTIONS}") from None
    missing = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    missing = {key for key in missing if "pooler" not in key}  # BERT's first-token pooler is not read here
    if missing:
        raise ValueError(f"text encoder {str(encoder)!r} lacks {len(missing)} tensors, for example {min(missing)}")
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar, and no table of the decoder's tensors that an encoder leaves unread."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _batches(lengths: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """(first, last, longest) of runs of ascending ``lengths`` whose padded size stays within ``tokens``."""
    batches, first = [], 0
    for at, length in enumerate(lengths):
        if at > first and (at + 1 - first) * length > tokens:
            batches.append((first, at, lengths[at - 1]))
            first = at
    return [*batches, (first, len(lengths), lengths[-1])]
