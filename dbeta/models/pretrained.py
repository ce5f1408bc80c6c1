"""Saving and loading whole models, and pre-trained text weights. Strict: never a random weight without being asked.

MODEL_DIR/config.json          format, version, report cleaning, network, what is known of its origin
          README.md            the model card
          model.safetensors    every tensor of the network
          tokenizer/           what encode_text uses, where there is one
"""

import dataclasses
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbeta.config import Config, ModelConfig, RuntimeConfig
from dbeta.files import foreign, put_in_place, sync_file, write_whole
from dbeta.models.card import model_card
from dbeta.models.dbeta import DBeta
from dbeta.models.text_encoder import T5Encoder
from dbeta.shards import check_shapes

VERSION = 1


def save(model: DBeta, folder: Path) -> None:
    """Write a model folder; each file appears whole or not at all.

    Raises:
        OSError: the disk is full or not writable; what was in the folder is still there.
    """
    partial = folder / ".model.safetensors.partial"
    try:
        _write(model, folder, partial)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"model not written to {folder}: {error}; free some space and try again") from error


def _write(model: DBeta, folder: Path, partial: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial)
    sync_file(partial)
    put_in_place(partial, folder / "model.safetensors")
    described = {
        "format": "dbeta-model",
        "version": VERSION,
        "report_cleaning": model.report_cleaning,
        "model": dataclasses.asdict(model.config),
        "about": model.about,
    }
    write_whole(folder / "config.json", json.dumps(described, indent=2))
    write_whole(folder / "README.md", model_card(model))
    if not isinstance(model.text_encoder, T5Encoder):
        model.text_encoder.model.config.save_pretrained(folder / "text_encoder")
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer")


def load(source: str | Path, runtime: RuntimeConfig | None = None, *, tokenizer: str = "") -> DBeta:
    """Read a model, in eval mode on the CPU.

    Args:
        source: a model folder, a run folder (its best model), or a hub id.
        runtime: engines.
        tokenizer: a directory or hub id where the folder has no tokenizer, such as an imported checkpoint's.

    Raises:
        ValueError: nothing there, a newer format, or a tensor that is missing, unexpected or of another shape.
    """
    folder = _find(source)
    if problem := foreign(folder / "model.safetensors"):
        raise ValueError(f"{folder / 'model.safetensors'} {problem}")
    try:
        described = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"model {folder} cannot be read: {error}") from None
    if not isinstance(described, dict) or described.get("format") != "dbeta-model":
        raise ValueError(
            f"model {folder}: its config.json is not that of a dbeta model; dbeta import-checkpoint makes one"
        )
    version = described.get("version")
    if type(version) is not int or version > VERSION:
        raise ValueError(f"model {folder} has format version {version}, this dbeta reads up to {VERSION}")
    config: ModelConfig = Config.from_dict({"model": described.get("model")}).model
    if (folder / "text_encoder").is_dir():
        config = dataclasses.replace(config, text_encoder=str(folder / "text_encoder"))
    elif config.text_encoder != "flan-t5":  # never asked of the hub because a file says so
        raise ValueError(f"model {folder} has no folder text_encoder, which its config.json calls for; save it again")
    cleaning, about = described.get("report_cleaning", "paper"), described.get("about")
    model = _empty(config, runtime, report_cleaning=cleaning, about=about)
    check_shapes(weights, model.state_dict(), f"model {folder}")
    model.load_state_dict(weights, assign=True)
    spec = tokenizer or (str(folder / "tokenizer") if (folder / "tokenizer").is_dir() else "")
    if spec:
        from dbeta.data.tokenizer import TRAINED, load_tokenizer

        model.tokenizer = load_tokenizer(spec, max_vocabulary=config.text_vocab, options=TRAINED)
    return model.eval()


def push(model: DBeta, repo: str, *, private: bool, token: str | None) -> str:
    """See ``Inference.push_to_hub``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a dbeta model")
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{repo!r} cannot be written on the hub ({reason}); log in with: hf auth login") from None
    return str(address)


def _empty(config: ModelConfig, runtime: RuntimeConfig | None, **options: Any) -> DBeta:
    """The network without memory for its weights, where nothing but its own weights has to be filled in."""
    with torch.device("meta" if config.text_encoder == "flan-t5" else "cpu"):
        return DBeta(config, runtime, **options)


def _find(source: str | Path) -> Path:
    for folder in (Path(source), Path(source) / "model"):
        if (folder / "model.safetensors").is_file():
            return folder
    if Path(source).exists():
        raise ValueError(f"{source} holds no model (no model.safetensors, nor model/model.safetensors)")
    return _snapshot(str(source), f"model {str(source)!r} is neither a folder nor on the hub or in its cache")


def _snapshot(hub_id: str, problem: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        wanted = ["*.safetensors", "*.json", "tokenizer/*", "text_encoder/*", "spiece.model"]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{problem} ({reason})") from None


def text_weights_folder(source: str) -> Path:
    """The folder of the pre-trained text encoder that ``model.text_weights`` names; a ValueError if there is none."""
    if source and Path(source).is_dir():
        return Path(source)
    if not source:
        raise ValueError("model.text_weights is not set; use --set model.text_weights=DIR|random")
    problem = (
        f"model.text_weights = {source!r} is neither a folder nor on the hub; use --set model.text_weights=DIR|random"
    )
    return _snapshot(source, problem)


def load_text_weights(model: DBeta, source: str) -> None:
    """Fill the text encoder with pre-trained weights (``model.text_weights``).

    Args:
        source: a directory or hub id of a Flan-T5 (or of another ``text_encoder``); "random" changes nothing.

    Raises:
        ValueError: no source is given, it is not found, or its tensors do not fit.
    """
    if source == "random":
        return
    options = "use --set model.text_weights=DIR|random"
    folder = text_weights_folder(source)
    if not isinstance(model.text_encoder, T5Encoder):
        from transformers import AutoModel

        found = AutoModel.from_pretrained(folder).state_dict()
        wanted = model.text_encoder.model
    else:
        found, wanted = _t5_tensors(folder, options), model.text_encoder
    check_shapes(found, wanted.state_dict(), f"text weights {folder}")
    wanted.load_state_dict(found)


def _t5_tensors(folder: Path, options: str) -> dict[str, Tensor]:
    """The encoder's tensors of a Hugging Face T5 checkpoint, by their names within the encoder."""
    stored: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            stored |= load_file(file)
        if not stored:
            if problem := foreign(folder / "pytorch_model.bin"):
                raise OSError(f"pytorch_model.bin {problem}")
            stored = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"text weights {folder} hold more than tensors and are not read, since that could run code; {options}"
        ) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"text weights {folder} cannot be read: {error}; {options}") from None
    found = {name.removeprefix("encoder."): tensor for name, tensor in stored.items() if name.startswith("encoder.")}
    if "shared.weight" in stored:
        found["embed_tokens.weight"] = stored["shared.weight"]
    return found
