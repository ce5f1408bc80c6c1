"""The text that stands for a class: our description of it, its bare name, or what a file says."""

import functools
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from dbeta.evaluation.label_sets import LabelSet, sets_for

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus


@functools.cache
def descriptions() -> dict[str, str]:
    """Name of a condition -> what it is and what is seen on the ECG."""
    return tomllib.loads(resources.files("dbeta.evaluation").joinpath("descriptions.toml").read_text())


def load_prompts(labels: LabelSet, source: str = "descriptions") -> dict[str, tuple[str, ...]]:
    """Lower-case texts per class, in the order of the set; a class of several texts is the mean of their features.

    Ours has one each (the synthetic corpus: its held-out paraphrases).

    Args:
        source: ``descriptions`` (ours), ``names`` (the category name alone, the paper's ablations), or a JSON file:
            {label: text or list of texts}, or {set: {label: ...}} for several sets.

    Raises:
        ValueError: the file cannot be read as that, or leaves a class of the set out.
    """
    if labels.key == "synthetic" and source in ("descriptions", "names"):
        from dbeta.data.synthetic import PROMPTS

        texts = PROMPTS
    elif source == "descriptions":
        texts = {label: f"{name}: {descriptions()[name]}" for label, name in labels.names.items()}
    elif source == "names":
        texts = labels.names
    else:
        texts = _read(Path(source))
        texts = texts.get(labels.key, texts)
    found = {label: _texts(texts.get(label)) for label in labels.labels}
    missing = [label for label, those in found.items() if not those]
    if missing:
        raise ValueError(
            f"prompts {source}: no text for {', '.join(missing)} of {labels.key}; give one for every class"
        )
    return found


def read_prompts(path: Path) -> dict[str, tuple[str, ...]]:
    """Lower-case texts per name of a user's JSON file {name: text or list of texts}.

    Raises:
        ValueError: it cannot be read as that, or names a text as the table of scores names its records.
    """
    found = {str(name): _texts(text) for name, text in _read(path).items()}
    if "record" in found:
        raise ValueError(f"--prompts {path}: record is the column of the records' names; give that text another name")
    without = [name for name, texts in found.items() if not texts]
    if without or not found:
        raise ValueError(f"--prompts {path}: no text for {', '.join(without) or 'anything'}; write {{name: text}}")
    return found


def _texts(given: object) -> tuple[str, ...]:
    """One text or several, lower-case; nothing if it is neither, or one of them is blank."""
    several = [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []
    return tuple(text.lower() for text in several) if all(isinstance(t, str) and t.strip() for t in several) else ()


def prompts_for(corpus: "Corpus") -> dict[str, tuple[str, ...]]:
    """Corpus label -> texts, for every label of the corpus that some label set names; the finest set wins."""
    found: dict[str, tuple[str, ...]] = {}
    for labels in sets_for(corpus.source, list(corpus.labels)):
        texts = load_prompts(labels)
        found |= {code: texts[label] for label, codes in labels.codes.items() for code in codes}
    return {label: found[label] for label in corpus.labels if label in found}


def _read(path: Path) -> dict:
    try:
        texts = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--prompts {path}: {error}; give descriptions, names, or a JSON file {{label: text}}"
        ) from None
    if not isinstance(texts, dict):
        raise ValueError(f"--prompts {path} holds a {type(texts).__name__}; write an object {{label: text}}")
    return texts
