"""Configuration: TOML presets into frozen dataclasses, one section per concern.

A preset holds only what differs from the defaults below, which are the paper's (section numbers in the comments;
RECIPE decisions marked [D]). ``--set section.key=value`` overrides a single value. An unknown or ill-typed key is a
``ValueError`` that names the dotted path and the nearest valid one.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

MAX_BYTES = 1 << 20
COUNTS = (
    "train.steps", "train.batch", "train.accumulate", "train.log_every", "train.eval_every", "train.eval_records",
    "train.checkpoint_every", "train.keep_checkpoints", "optim.max_nonfinite", "data.synthetic_records",
    "data.max_tokens",
)  # fmt: skip
SHARES = (
    "data.lead_keep_probability", "data.negative_fraction", "loss.mlm_probability", "loss.mlm_mask", "loss.mlm_random",
    "optim.warmup", "optim.hold", "optim.decay", "optim.initial_scale", "model.dropout", "model.attention_dropout",
)  # fmt: skip
SUMS = (("optim.warmup", "optim.hold", "optim.decay"), ("loss.mlm_mask", "loss.mlm_random"))  # shares of one whole
AT_LEAST_0 = ("loss.mlm", "loss.mem", "loss.etm", "loss.ets", "optim.lr", "optim.weight_decay", "optim.clip")
RANGES = {
    **dict.fromkeys(COUNTS, (1, math.inf)), **dict.fromkeys(SHARES, (0, 1)), **dict.fromkeys(AT_LEAST_0, (0, math.inf)),
    **dict.fromkeys(("optim.beta1", "optim.beta2"), (0, 0.999999)), "optim.eps": (1e-30, 1),
    "optim.final_scale": (1e-9, 1), "model.leads": (12, 12), "data.workers": (1, 1024),
    "train.seed": (0, 1 << 40), "runtime.timeout_s": (1e-3, 1e7),
}  # fmt: skip
MOST, MOST_LAYERS = 1 << 20, 256  # sizes of a network: what claims more is a slip, or hostile
PRESETS = ("smoke", "paper", "released", "hopper")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read and how a batch is drawn from it."""

    report_cleaning: Literal["paper", "released"] = "paper"  # punctuation removed (3.1) | only stripped at the ends
    tokenizer: str = "google/flan-t5-base"  # hub id or directory; "corpus": one trained on the corpus's own reports
    max_tokens: int = 254  # 3.1: 256 minus room for two specials
    lead_keep_probability: float = 0.5  # random lead masking (4.1): each lead survives with this probability
    negative_fraction: float = 0.5  # share of each batch that is shown a far report (3.4)
    negatives: Literal["n3s", "random"] = "n3s"  # random: the ablation without N3S (Table 6)
    engine: Literal["auto", "dali", "reference"] = "auto"
    workers: int = 2
    on_corrupt: Literal["stop", "skip"] = "stop"  # a record that cannot be read; skip: the next one of its split
    synthetic_records: int = 4000  # size of the built-in corpus, used when no --data is given


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network, MODEL sections 1-7. Widths in units, kernels in samples or tokens."""

    leads: int = 12
    samples: int = 5000  # 10 s at 500 Hz
    width: int = 768
    stem_width: int = 256
    stem_layers: int = 4  # kernel 2, stride 2 each: 5000 -> 312 tokens
    ecg_layers: int = 8
    ecg_heads: int = 12
    ecg_ffn: int = 3072
    pos_kernel: int = 128
    pos_groups: int = 16
    text_encoder: str = "flan-t5"  # or a directory / hub id of any transformers encoder (Table 7)
    text_weights: str = ""  # directory of pre-trained T5 weights; "random" says so explicitly
    text_vocab: int = 32128
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_head_width: int = 64
    text_ffn: int = 2048
    text_activation: Literal["gated-gelu", "gated-relu", "gated-silu", "relu", "gelu", "silu"] = "gated-gelu"
    text_buckets: int = 32
    text_max_distance: int = 128
    text_mask: bool = True  # [D] padding is not attended; the release attends it (false)
    fusion_layers: int = 6
    fusion_heads: int = 12
    fusion_ffn: int = 3072
    mem_tap: int = 3  # the MEM decoder reads the input of this fusion layer; -1: the final output
    mem_width: int = 384
    mem_layers: int = 4
    mem_heads: int = 6
    mem_ffn: int = 1536
    mask_ratio: float = 0.75
    etm_logits: Literal[1, 2] = 1  # Eq. 3: one logit [P]; the release has two
    dropout: float = 0.1
    attention_dropout: float = 0.1

    @property
    def ecg_tokens(self) -> int:
        """Tokens of a record: every stem layer halves the samples, rounding down."""
        return self.samples >> self.stem_layers

    @property
    def patch(self) -> int:
        """Samples per lead that the reconstruction head predicts for a token."""
        return self.samples // self.ecg_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Total = sum of weight x loss (all 1, section 3.2); a weight of 0 is the ablation of Table 6."""

    mlm: float = 1.0
    mem: float = 1.0
    etm: float = 1.0
    ets: float = 1.0
    mlm_probability: float = 0.25  # share of non-special tokens selected (4.1)
    mlm_mask: float = 0.8
    mlm_random: float = 0.1  # the rest is left unchanged
    mem_target: Literal["original", "input"] = "original"  # [D] a masked lead must be reconstructed
    mem_normalise: bool = True
    reconstruct_rows: Literal["all", "matched"] = "all"
    ets_reduction: Literal["batch", "mean"] = "batch"  # Eq. 4: sum / B [P]; the release divides by B^2
    ets_same_report: Literal["negative", "ignore", "positive"] = "negative"
    ets_pairs: Literal["micro", "batch"] = "micro"  # with train.accumulate: pairs of a micro-batch | of the whole batch


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and the tri-stage schedule (4.1; MODEL section 13)."""

    lr: float = 5e-5
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.01
    warmup: float = 0.1  # shares of all steps
    hold: float = 0.4
    decay: float = 0.5
    initial_scale: float = 0.01
    final_scale: float = 0.05
    clip: float = 0.0  # 0: no gradient clipping
    max_nonfinite: int = 20  # this many skipped steps in a row end the run


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at once, and what is written when. ``batch`` counts records over all ranks."""

    steps: int = 300_000  # 4.1
    batch: int = 128  # 4.1
    accumulate: int = 1
    seed: int = 0
    log_every: int = 50
    eval_every: int = 5000
    eval_records: int = 1024
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and with which engines; changes the speed, never the function."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the GPU has it
    kernels: Literal["auto", "fused", "reference"] = "auto"
    attention: Literal["auto", "flash-attn", "sdpa-flash", "sdpa", "reference"] = "auto"
    removals: bool = True  # the exact removals of KERNELS section 1
    compile: bool = False
    compile_scope: Literal["step", "layers"] = "step"  # the step as one graph | each layer by itself: compiles faster
    cuda_graphs: bool = True  # replay the compiled step as a CUDA graph, where there is a GPU
    deterministic: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"  # several ranks: whole weights on each | weights and moments sharded
    timeout_s: float = 600.0  # a rank that waits longer than this for another ends the run; above a validation's time


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole resolved configuration; written into every run folder and checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    preset: str = "paper"

    @classmethod
    def load(cls, preset: str = "smoke", overrides: typing.Iterable[str] = ()) -> Self:
        """Read a named preset or a TOML file, then apply ``section.key=value`` overrides.

        Raises:
            ValueError: unknown preset or key, or a value of the wrong type; the message names what is accepted.
        """
        if preset in PRESETS:
            text = resources.files("dbeta").joinpath("presets", f"{preset}.toml").read_text()
        elif Path(preset).is_file():
            text = _text(Path(preset))
        else:
            raise ValueError(f"preset {preset!r} is neither one of {', '.join(PRESETS)} nor an existing TOML file")
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"preset {preset!r} is not valid TOML: {error}") from None
        return cls.from_dict({"preset": preset, **_override(values, overrides)})

    @classmethod
    def load_json(cls, path: Path, overrides: typing.Iterable[str] = ()) -> Self:
        """Read a run's ``config.json``, then apply overrides; errors as ``load``."""
        try:
            values = json.loads(_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no configuration, which is an object of sections")
        return cls.from_dict(_override(values, overrides))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from nested dictionaries (a preset, config.json); strict about keys and types."""
        config = _build(cls, values, "")
        _check_values(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, as JSON and TOML can hold."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Indented JSON of ``to_dict``."""
        return json.dumps(self.to_dict(), indent=2)


def _text(path: Path) -> str:
    """A configuration file, which is short and UTF-8."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} is longer than {MAX_BYTES:,} bytes; is it a configuration?")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); is it a configuration?") from None


def _check_values(config: "Config") -> None:
    """Raise a ValueError for a number that cannot be: counts start at 1, shares lie in 0..1, nothing is NaN."""
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for key in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
            value, dotted = getattr(part, key.name), f"{section.name}.{key.name}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{dotted} = {value}; accepted: a finite number")
            low, high = RANGES.get(dotted, (-math.inf, math.inf))
            if part is config.model and type(value) is int and dotted not in (*RANGES, "model.mem_tap"):
                low, high = 1, MOST_LAYERS if dotted.endswith("_layers") else MOST
            if isinstance(value, int | float) and not low <= value <= high:
                accepted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:,}"
                raise ValueError(f"{dotted} = {value}; accepted: {f'{low:g}' if low == high else accepted}")
    for parts in SUMS:
        total = sum(getattr(getattr(config, section), key) for section, key in (part.split(".") for part in parts))
        if total > 1 + 1e-9:
            raise ValueError(f"{' + '.join(parts)} = {total:g}; accepted: at most 1, they are shares of one whole")
    if config.model.ecg_tokens < 1:
        raise ValueError(
            f"model.stem_layers = {config.model.stem_layers} leave no token of {config.model.samples} samples"
        )


def _override(values: dict[str, Any], overrides: typing.Iterable[str]) -> dict[str, Any]:
    for override in overrides:
        path, equals, value = override.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot):
            raise ValueError(f"--set {override!r}: write section.key=value, for example train.steps=100")
        if not isinstance(values.setdefault(section, {}), dict):
            raise ValueError(f"--set {override!r}: {section} is a value, not a section")
        values[section][key] = _Raw(value.strip())
    return values


class _Raw(str):
    """A value from the command line, still to be parsed by the type of its field."""


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        dotted = f"{path}{name}"
        if name not in hints:
            near = difflib.get_close_matches(dotted, _every_key(), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f"; accepted: {', '.join(sorted(hints))}"
            raise ValueError(f"unknown configuration key {dotted}{hint}")
        arguments[name] = _convert(hints[name], value, dotted)
    return cls(**arguments)


def _every_key() -> list[str]:
    sections = typing.get_type_hints(Config)
    return [f"{s}.{k}" for s, h in sections.items() if dataclasses.is_dataclass(h) for k in typing.get_type_hints(h)]


def _convert(hint: Any, value: Any, dotted: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{dotted} is a section, given {value!r}")
        return _build(hint, value, f"{dotted}.")
    if typing.get_origin(hint) in (Literal, types.UnionType):
        accepted = typing.get_args(hint)
        for choice in accepted:
            if (value == choice and type(value) is type(choice)) or (isinstance(value, _Raw) and value == str(choice)):
                return choice
        raise ValueError(f"{dotted} = {value!r}; accepted: {', '.join(map(str, accepted))}")
    try:
        if isinstance(value, _Raw):
            return _PARSE[hint](str(value))
    except (KeyError, ValueError):
        raise ValueError(f"{dotted} = {str(value)!r} is not of type {hint.__name__}") from None
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{dotted} = {value!r} is not of type {hint.__name__}")
    return value


_PARSE = {
    int: lambda text: int(text.replace("_", "")),
    float: float,
    str: str,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}
