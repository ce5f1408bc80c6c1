"""The authors' released checkpoints: a two-way map between their parameter names and ours (MODEL section 17).

Nothing in a checkpoint is run: ``.pt`` is read with ``weights_only``, the configuration with ``json`` and a regular
expression.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbeta.config import ModelConfig
from dbeta.files import foreign, pickled
from dbeta.models.card import IMPORTED
from dbeta.models.dbeta import DBeta
from dbeta.shards import check_shapes

# Our prefix -> theirs; the first rule that fits is used, {i} is a layer index.
_TRANSFORMER = {
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
    "ffn_norm": "final_layer_norm",
}
_FUSION = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "cross_attention.output": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_DECODER = {
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.output": "attn.out_proj",
    "attention_norm": "ln_1",
    "ffn_norm": "ln_2",
    "ffn_in": "mlp.c_fc",
    "ffn_out": "mlp.c_proj",
}
_PREFIXES = {
    "ecg_encoder.cls": "class_embedding",
    "ecg_encoder.stem.convs.{i}": "ecg_encoder.feature_extractor.conv_layers.{i}.0",
    "ecg_encoder.stem.norm": "ecg_encoder.feature_extractor.conv_layers.0.2",
    "ecg_encoder.stem_norm": "ecg_encoder.layer_norm",
    "ecg_encoder.input_projection": "ecg_encoder.post_extract_proj",
    "ecg_encoder.positional.gain": "ecg_encoder.conv_pos.pos_conv.0.weight_g",
    "ecg_encoder.positional.direction": "ecg_encoder.conv_pos.pos_conv.0.weight_v",
    "ecg_encoder.positional": "ecg_encoder.conv_pos.pos_conv.0",
    "ecg_encoder.norm": "ecg_encoder.encoder.layer_norm",
    **{f"ecg_encoder.layers.{{i}}.{a}": f"ecg_encoder.encoder.layers.{{i}}.{b}" for a, b in _TRANSFORMER.items()},
    "text_encoder": "language_encoder.encoder",
    "ecg_projection": "multi_modal_ecg_proj",
    "text_projection": "multi_modal_language_proj",
    "ecg_pooler": "unimodal_ecg_pooler",
    "text_pooler": "unimodal_language_pooler",
    "fused_ecg_pooler": "multi_modal_ecg_pooler",
    "fused_text_pooler": "multi_modal_language_pooler",
    "fusion.modality": "modality_type_embeddings",
    **{f"fusion.ecg_layers.{{i}}.{a}": f"multi_modal_ecg_layers.{{i}}.{b}" for a, b in _FUSION.items()},
    **{f"fusion.text_layers.{{i}}.{a}": f"multi_modal_language_layers.{{i}}.{b}" for a, b in _FUSION.items()},
    "mlm_head.dense": "mlm_head.transform.dense",
    "mlm_head.norm": "mlm_head.transform.LayerNorm",
    "mlm_head.vocabulary.weight": "mlm_head.decoder.weight",
    "mlm_head.vocabulary.bias": "mlm_head.bias",
    "mem_head.mask_token": "mim_head.mask_token",
    "mem_head.positions": "mim_head.decoder_pos_embed.pe",
    "mem_head.embed": "mim_head.decoder_embed",
    **{f"mem_head.blocks.{{i}}.{a}": f"mim_head.decoder.resblocks.{{i}}.{b}" for a, b in _DECODER.items()},
    "mem_head.norm": "mim_head.decoder_norm",
    "mem_head.output": "mim_head.decoder_pred",
    "etm_head": "itm_head.fc",
}
# Our packed q, k, v -> their three tensors.
_PACKED = {
    "ecg_encoder.layers.{i}.attention.qkv": "ecg_encoder.encoder.layers.{i}.self_attn.{q,k,v}_proj",
    "fusion.ecg_layers.{i}.attention.qkv": "multi_modal_ecg_layers.{i}.attention.self.{query,key,value}",
    "fusion.ecg_layers.{i}.cross_attention.qkv": "multi_modal_ecg_layers.{i}.crossattention.self.{query,key,value}",
    "fusion.text_layers.{i}.attention.qkv": "multi_modal_language_layers.{i}.attention.self.{query,key,value}",
    "fusion.text_layers.{i}.cross_attention.qkv": (
        "multi_modal_language_layers.{i}.crossattention.self.{query,key,value}"
    ),
}
GIVE = "give the released .pt or .safetensors"
UNUSED = "ecg_encoder.mask_emb"
# Weight normalisation under torch's newer name -> the name of the release.
_NEW_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
_MIMIC_ORDER = (0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11)  # canonical lead -> its place in I II III aVR aVF aVL V1-V6


def released_names(name: str) -> tuple[str, ...]:
    """The released names of one of our tensors: one, or three for a packed q, k, v."""
    for rules, packed in ((_PACKED, True), (_PREFIXES, False)):
        for ours, theirs in rules.items():
            pattern = re.escape(ours).replace(re.escape("{i}"), r"(\d+)") + r"(?=\.|$)"
            if match := re.match(pattern, name):
                stem = theirs.replace("{i}", match[1]) if match.groups() else theirs
                if not packed:
                    return (stem + name[match.end() :],)
                choices = re.search(r"\{(.*)\}", stem)
                return tuple(stem.replace(choices[0], c) + name[match.end() :] for c in choices[1].split(","))
    raise KeyError(name)


def to_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the released names and shapes; one ETM logit becomes two, the first always 0."""
    result = {}
    for name, tensor in state.items():
        names = released_names(name)
        if name.startswith("etm_head.") and len(tensor) == 1:
            tensor = torch.cat((torch.zeros_like(tensor), tensor))
        if name == "ecg_encoder.positional.gain" or name == "mem_head.mask_token":
            tensor = tensor[None, None]
        elif name == "mem_head.positions":
            tensor = tensor[None]
        result |= zip(names, tensor.chunk(len(names)))
        if name == "text_encoder.embed_tokens.weight":
            result["language_encoder.shared.weight"] = tensor
    return result


def from_released(released: dict[str, Tensor], model: DBeta, lead_order: str = "canonical") -> dict[str, Tensor]:
    """A released state dict under our names, for ``model`` (which may be on the meta device).

    Args:
        lead_order: the order of leads that the weights were trained on; "mimic" weights are permuted so that the model
            takes canonical leads.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape.
    """
    ours = model.state_dict()
    released = {name: tensor for name, tensor in released.items() if name != UNUSED}
    if model.config.etm_logits == 1:  # sigmoid(z) with z = z1 - z0 is the softmax of two logits
        for name in ("itm_head.fc.weight", "itm_head.fc.bias"):
            if name in released and len(released[name]) == 2:
                released[name] = torch.stack(
                    (torch.zeros_like(released[name][0]), released[name][1] - released[name][0])
                )
    check_shapes(released, to_released(ours), "the released checkpoint")
    if not torch.equal(
        released["language_encoder.shared.weight"], released["language_encoder.encoder.embed_tokens.weight"]
    ):
        raise ValueError("the released checkpoint holds two different token embeddings (shared and embed_tokens)")
    state = {}
    for name, tensor in ours.items():
        value = torch.cat([released[n] for n in released_names(name)]) if len(released_names(name)) > 1 else None
        value = released[released_names(name)[0]] if value is None else value
        if name.startswith("etm_head.") and len(tensor) == 1:
            value = value[1:]
        state[name] = value.reshape(tensor.shape).contiguous()
    return permute_leads(state) if lead_order == "mimic" else state


def permute_leads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict for leads with aVL and aVF exchanged: the stem's input and the reconstruction's output."""
    state, order = dict(state), torch.tensor(_MIMIC_ORDER)
    first = "ecg_encoder.stem.convs.0.weight"
    state[first] = state[first][:, order].contiguous()
    for name in ("mem_head.output.weight", "mem_head.output.bias"):
        state[name] = state[name].unflatten(0, (12, -1))[order].flatten(0, 1).contiguous()
    return state


def import_checkpoint(
    path: str | Path,
    config_path: str | Path | None = None,
    *,
    lead_order: Literal["canonical", "mimic"] = "canonical",
    etm_logits: Literal[1, 2] = 2,
    tokenizer: str = "",
    say: Callable[[str], None] | None = None,
) -> DBeta:
    """Read a released checkpoint.

    Args:
        path: ``.pt`` or ``.safetensors``.
        config_path: the released JSON configuration; None: metadata of the file, else the full model's settings.
        lead_order: see ``from_released``.
        etm_logits: 1 converts the matching head to one logit, exactly.
        tokenizer: folder or hub id of the tokenizer to keep with the model (the release's is Flan-T5's).
        say: where the self-check prints what was mapped; None: no self-check.

    Raises:
        ValueError: the file cannot be read, or does not hold exactly the tensors of such a model.
    """
    if lead_order not in ("canonical", "mimic"):
        raise ValueError(f"lead order {lead_order!r}; accepted: canonical, mimic")
    released, settings = _read(Path(path))
    if config_path is not None:
        try:
            text = Path(config_path).read_bytes()
        except OSError as error:
            raise ValueError(f"released configuration {config_path} cannot be read: {error.strerror}") from None
        settings = _settings(text, f"released configuration {config_path}")
    config = config_of(released, settings, etm_logits)
    with torch.device("meta"):
        model = DBeta(config, report_cleaning="released", about=IMPORTED | {"settings": {"lead order": lead_order}})
    state = from_released(released, model, lead_order)
    model.load_state_dict(state, assign=True)
    model.eval()
    if tokenizer:
        from dbeta.data.tokenizer import TRAINED, load_tokenizer

        model.tokenizer = load_tokenizer(tokenizer, max_vocabulary=config.text_vocab, options=TRAINED)
    if say is not None:
        for line in check_import(released, model, lead_order):
            say(line)
    return model


def check_import(released: dict[str, Tensor], model: DBeta, lead_order: str = "canonical") -> Iterator[str]:
    """What was mapped, part by part, and the proof that nothing was lost on the way.

    Raises:
        ArithmeticError: a tensor that does not come back bit for bit, or features that are not finite.
    """
    state = model.state_dict()
    parts: dict[str, list[str]] = {}
    for name in state:
        parts.setdefault(name.partition(".")[0], []).append(name)
    for part, names in parts.items():
        theirs = [other for name in names for other in released_names(name)]
        above = sorted({name.partition(".")[0] for name in theirs})
        count = sum(state[name].numel() for name in names)
        yield f"  {' + '.join(above):58} -> {part:18} {len(theirs):4} tensors {count:12,} values"
    for name in sorted(released.keys() & {UNUSED}):
        yield f"  {name:58} -> dropped: no output reads it"
    if lead_order == "mimic":
        state = permute_leads(state)  # the order swaps two leads: twice is none
    back = to_released(state)
    if model.config.etm_logits == 1:  # the difference of two logits does not give them back
        back = {name: tensor for name, tensor in back.items() if not name.startswith("itm_head")}
    lost = [name for name, tensor in back.items() if not torch.equal(tensor, released[name])]
    if lost:
        raise ArithmeticError(f"the import lost {', '.join(lost[:3])}: this is a bug of dbeta, please report it")
    yield f"  self-check: {len(back)} tensors come back bit for bit under their released names"
    generator = torch.Generator().manual_seed(0)
    ecg = 0.2 * torch.randn(2, model.config.leads, model.config.samples, generator=generator)
    ids = torch.arange(2 * 5).reshape(2, 5) % model.config.text_vocab
    with torch.no_grad():
        features = {
            "ECG": model.encode_ecg(ecg),
            "text": model.text_features(ids, torch.ones_like(ids, dtype=torch.bool)),
        }
    for kind, found in features.items():
        if not found.isfinite().all() or torch.equal(found[0], found[1]):
            raise ArithmeticError(f"{kind} features of the imported model are not finite or always the same")
        yield f"  self-check: {kind} features {list(found.shape)} finite, rms {found.square().mean().sqrt():.3f}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by released name, and the settings stored with them (if any)."""
    if problem := foreign(path):
        raise ValueError(f"checkpoint {path} {problem}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("cfg", "{}")
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        else:
            text = "{}"
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=None)
            for key in ("model", "state_dict"):
                if isinstance(stored, dict) and isinstance(stored.get(key), dict):
                    stored = stored[key]
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    except Exception:  # pickle.UnpicklingError, whose advice is to read it without weights_only
        with path.open("rb") as file:
            start = file.read(1024)
        if not pickled(start):
            raise ValueError(f"checkpoint {path} is none: its first bytes are {start[:8]!r}; {GIVE}") from None
        raise ValueError(
            f"checkpoint {path} holds more than tensors and is not read, since that could run code; "
            "save its state dict alone, best as .safetensors"
        ) from None
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ValueError(f"checkpoint {path} is not a dictionary of tensors; {GIVE}")
    if larger := [n for n, t in stored.items() if t.numel() * t.itemsize > t.untyped_storage().nbytes()]:
        raise ValueError(f"checkpoint {path}: {larger[0]} claims more values than are stored")
    for new, old in _NEW_NORM.items():
        stored = {name.replace(new, old): tensor for name, tensor in stored.items()}
    settings = _settings(text, f"checkpoint {path}: its metadata cfg")
    return {name: tensor.float() for name, tensor in stored.items()}, settings


def _settings(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{what} holds a {type(settings).__name__}; an object {{setting: value}} is needed")
    return settings


def config_of(released: dict[str, Tensor], settings: dict[str, Any], etm_logits: int = 2) -> ModelConfig:
    """The configuration of a released checkpoint: sizes from its tensors, the rest from its JSON settings.

    Raises:
        ValueError: a tensor that sizes are read from is missing, or a stem that this network does not have.
    """

    def shape(name: str) -> torch.Size:
        if name not in released:
            raise ValueError(f"the released checkpoint has no tensor {name}; is it another model's?")
        return released[name].shape

    def count(pattern: str) -> int:
        return len({m[1] for name in released if (m := re.match(pattern, name))})

    def setting(name: str, default: Any) -> Any:
        value = settings.get(name, default)
        accepted = (int, float) if isinstance(default, float) else int
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise ValueError(f"released configuration: {name} = {value!r}; a number such as {default} is needed")
        return type(default)(value)

    stem = "ecg_encoder.feature_extractor.conv_layers"
    block = "language_encoder.encoder.block.0.layer"
    width = shape("class_embedding")[0]
    stem_layers = count(rf"{re.escape(stem)}\.(\d+)\.0\.weight")
    stem_width = shape(f"{stem}.0.0.weight")[0]
    _check_stem(settings.get("conv_feature_layers"), stem_width, stem_layers)
    text_heads = shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")[1]
    mem_width = shape("mim_head.decoder_embed.weight")[0]
    pos = shape("ecg_encoder.conv_pos.pos_conv.0.weight_v")
    return ModelConfig(
        leads=shape(f"{stem}.0.0.weight")[1],
        width=width,
        stem_width=stem_width,
        stem_layers=stem_layers,
        ecg_layers=count(r"ecg_encoder\.encoder\.layers\.(\d+)\."),
        ecg_heads=setting("encoder_attention_heads", max(width // 64, 1)),
        ecg_ffn=shape("ecg_encoder.encoder.layers.0.fc1.weight")[0],
        pos_kernel=pos[2],
        pos_groups=pos[0] // pos[1],
        text_vocab=shape("language_encoder.shared.weight")[0],
        text_width=shape("language_encoder.shared.weight")[1],
        text_layers=count(r"language_encoder\.encoder\.block\.(\d+)\."),
        text_heads=text_heads,
        text_head_width=shape(f"{block}.0.SelfAttention.q.weight")[0] // text_heads,
        text_ffn=shape(f"{block}.1.DenseReluDense.wo.weight")[1],
        text_buckets=shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")[0],
        text_mask=False,
        fusion_layers=count(r"multi_modal_ecg_layers\.(\d+)\."),
        fusion_heads=setting("num_heads", max(width // 64, 1)),
        fusion_ffn=shape("multi_modal_ecg_layers.0.intermediate.dense.weight")[0],
        mem_tap=setting("mem_layer", 3),
        mem_width=mem_width,
        mem_layers=count(r"mim_head\.decoder\.resblocks\.(\d+)\."),
        mem_heads=setting("mem_decoder_num_heads", max(mem_width // 64, 1)),
        mem_ffn=shape("mim_head.decoder.resblocks.0.mlp.c_fc.weight")[0],
        mask_ratio=setting("mem_prob", 0.75),
        etm_logits=etm_logits,
        dropout=setting("dropout", 0.1),
        attention_dropout=setting("attention_dropout", 0.1),
    )


def _check_stem(text: str | None, width: int, layers: int) -> None:
    """The stem of the JSON, a Python expression such as ``[(256, 2, 2)] * 4``, read without evaluating it."""
    if text is None:
        return
    found: list[tuple[int, ...]] = []
    for term in re.split(r"\s*\+\s*", str(text).strip()):
        match = re.fullmatch(r"\[(.*)\]\s*(?:\*\s*(\d+))?", term)
        layer = re.findall(r"\((\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)", match[1]) if match else []
        found += [tuple(map(int, sizes)) for sizes in layer] * int(match[2] or 1) if match else [()]
    if found != [(width, 2, 2)] * layers:
        raise ValueError(
            f"conv_feature_layers = {text!r} does not describe the checkpoint's stem of {layers} layers of {width} "
            "channels, kernel 2, stride 2"
        )
