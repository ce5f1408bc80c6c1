"""``dbeta-pretrain``: between the command line and ``trainer.train``; the same as ``python -m dbeta.pretrain``.

Without a corpus it makes the built-in synthetic one inside the run folder, announced.
"""

import time
from pathlib import Path
from typing import Any

from dbeta.config import Config
from dbeta.runtime import announce


def run(
    config: Config, *, data: Path | None, out: Path | None, resume: bool, show_examples: bool = False
) -> dict[str, Any]:
    """Pre-train with a resolved configuration; returns the last validation metrics.

    Args:
        data: a corpus folder; None makes the built-in synthetic corpus inside the run folder.
        out: the run folder; None makes one under ``runs/`` named by preset and time.

    Raises:
        ValueError: what is missing or does not fit, with what to do.
    """
    if out is None and resume:
        raise ValueError("--resume needs --out RUN, the run folder to go on with")
    from dbeta.data.corpus import Corpus
    from dbeta.distributed import explained, join, leave
    from dbeta.runtime import resolve_device
    from dbeta.stopping import StopRequest
    from dbeta.trainer import train

    ranks = join(resolve_device(config.runtime.device), config.runtime.timeout_s)
    with explained(ranks, config.runtime.timeout_s):
        out = out or ranks.once(lambda: Path("runs") / f"{Path(config.preset).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        corpus = Corpus.open(data or ranks.once(lambda: _synthetic(config, out)))
        if config.preset != "smoke":
            _require_language_model(config, corpus.path)
        with StopRequest(ranks) as stop:  # from before the model is made until the report is written
            last = train(config, corpus, out, resume=resume, show_examples=show_examples, stop=stop)
        leave()
    return last


def _require_language_model(config: Config, corpus: Path) -> None:
    """What a real run needs of a language model, checked before anything is loaded; all gaps in one error."""
    from dbeta.data.tokenizer import load_tokenizer
    from dbeta.models.pretrained import text_weights_folder

    gaps = []
    if config.model.text_weights != "random":
        try:
            text_weights_folder(config.model.text_weights)
        except ValueError as error:
            gaps.append(str(error))
    if config.data.tokenizer != "corpus":
        try:
            load_tokenizer(config.data.tokenizer)
        except ValueError as error:
            gaps.append(str(error))
    if config.data.negatives == "n3s" and not _chosen_table(corpus):
        gaps.append(f"no table of negatives of a chosen encoder; run: dbeta negatives {corpus} --encoder DIR|hashing")
    if gaps:
        raise ValueError(f"preset {config.preset} lacks {len(gaps)} of its inputs. " + ". ".join(gaps))


def _chosen_table(corpus: Path) -> bool:
    """Whether the corpus has a table of negatives that somebody asked for, not one that smoke fell back to."""
    from dbeta.data.negatives import NegativeTable

    path = corpus / "negatives.npz"
    return path.is_file() and not NegativeTable.load(path).metadata.get("fallback", False)


def _synthetic(config: Config, out: Path) -> Path:
    from dbeta.data.prepare import prepare

    folder = out / "corpus"
    if not (folder / "corpus.json").is_file():
        announce(
            f"no --data: making the built-in synthetic corpus of {config.data.synthetic_records:,} records in {folder}"
        )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from None
        prepare("synthetic", None, folder, limit=config.data.synthetic_records, workers=config.data.workers)
    return folder


if __name__ == "__main__":
    from dbeta.cli import pretrain

    pretrain()
