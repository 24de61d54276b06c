"""Everything that a run needs to know: frozen dataclasses that check themselves on construction.

Plain Python: importing this loads no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class UserError(ValueError):
    """What the user gave cannot be used; the message is one line that says what was expected and what came."""


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field with its default, the line that explains it, and the values that it takes."""
    rules = {"help": help, "choices": choices, "above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata=rules)


def has_type(value: Any, annotation: Any) -> bool:
    if annotation == tuple[str, ...]:
        return isinstance(value, tuple) and all_text(value)
    kinds = typing.get_args(annotation) or (annotation,)
    return type(value) in kinds or (float in kinds and type(value) is int)


def all_text(parts: Any) -> bool:
    return isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts)


def describe(annotation: Any) -> str:
    if annotation == tuple[str, ...]:
        return "a list of names"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return " or ".join(names[kind] for kind in typing.get_args(annotation) or (annotation,))


def known_name(name: str, names: Iterable[str], kind: str) -> None:
    names = list(names)
    if name not in names:
        raise UserError(f"expected {kind} to be one of {', '.join(names)}, got {name!r}{nearest(name, names)}")


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class Section:
    """Checks the type and the range of every field on construction, in one message format."""

    _prefix: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Section):
                continue
            key = self._prefix + field.name
            if not has_type(value, hints[field.name]):
                raise UserError(f"expected {key} to be {describe(hints[field.name])}, got {value!r}")
            if value is not None:
                _check_range(key, value, field.metadata)


def _check_range(key: str, value: Any, rules: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"expected {key} to be finite, got {value!r}")
    if rules["choices"] and value not in rules["choices"]:
        raise UserError(f"expected {key} to be one of {', '.join(rules['choices'])}, got {value!r}")
    if rules["above"] is not None and not value > rules["above"]:
        raise UserError(f"expected {key} to be above {rules['above']}, got {value!r}")
    if rules["at_least"] is not None and not value >= rules["at_least"]:
        raise UserError(f"expected {key} to be at least {rules['at_least']}, got {value!r}")
    if rules["at_most"] is not None and not value <= rules["at_most"]:
        raise UserError(f"expected {key} to be at most {rules['at_most']}, got {value!r}")


@dataclass(frozen=True)
class DataConfig(Section):
    """Which images the student sees, and how."""

    _prefix = "data."

    name: str = _option(
        "folder",
        "digits (scikit-learn's scans), folder, or a data set of timm's: torch/NAME (torchvision) or hfds/NAME",
    )
    root: str | None = _option(
        None, "for folder: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg; else where the data set lies"
    )
    fraction: float = _option(1.0, "share of each class of the training split, for the student", above=0, at_most=1)
    index: str | None = _option(None, "index file written by 'cab subset'; takes the place of data.fraction")
    image_size: int = _option(224, "height and width of an image in pixels", at_least=1)
    augment: str = _option(
        "crop",
        "none, crop (random crop and flip), or rand (data.policy, data.color_jitter and data.erasing on top)",
        choices=("none", "crop", "rand"),
    )
    policy: str | None = _option("rand-m9-mstd0.5-inc1", "for augment=rand: a policy of timm's, or none")
    color_jitter: float = _option(0.3, "for augment=rand: strength, where data.policy is none", at_least=0)
    erasing: float = _option(0.25, "for augment=rand: probability of random erasing", at_least=0, at_most=1)
    repeats: int = _option(1, "repeated augmentation: times an image comes up in a row", at_least=1)
    mixup: float = _option(0.0, "alpha of Mixup; 0 leaves it out", at_least=0)
    cutmix: float = _option(0.0, "alpha of CutMix; 0 leaves it out", at_least=0)
    smoothing: float = _option(0.0, "label smoothing, for the cross-entropy", at_least=0, at_most=0.99)
    workers: int = _option(4, "processes that load images; 0 loads in the training process", at_least=0)
    seed: int = _option(0, "draws the split of digits and the subset; the same for every arm", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        reader, slash, name = self.name.partition("/")
        if reader in ("hfids", "tfds", "wds") and slash:
            raise UserError(
                f"expected data.name to be a data set whose images have an index (torch/NAME or hfds/NAME), got "
                f"{self.name!r}, which streams them"
            )
        if self.name not in ("digits", "folder") and not (reader in ("torch", "hfds") and name):
            raise UserError(f"expected data.name to be digits, folder, torch/NAME or hfds/NAME, got {self.name!r}")


@dataclass(frozen=True)
class TeacherConfig(Section):
    """The frozen Transformer: any timm model whose attention layers expose Q and K."""

    _prefix = "teacher."

    name: str = _option("deit_tiny_patch16_224", "a timm model's name")
    pretrained: bool = _option(True, "start from timm's published weights")
    weights: str | None = _option(None, "a .safetensors file with the teacher's weights")
    image_size: int | None = _option(
        None, "the teacher is built for images of this size and gets them resized; none: data.image_size", at_least=1
    )
    patch_size: int | None = _option(None, "the model's own where none", at_least=1)
    embed_dim: int | None = _option(None, "the model's own where none", at_least=1)
    depth: int | None = _option(None, "the model's own where none", at_least=1)
    num_heads: int | None = _option(None, "the model's own where none", at_least=1)
    steps: int = _option(0, "steps of training on the full training split, before distillation", at_least=0)
    lr: float = _option(1e-3, "learning rate of those steps", above=0)


@dataclass(frozen=True)
class StudentConfig(Section):
    """The Mamba student: a Vision Mamba from timm's registry."""

    _prefix = "student."

    name: str = _option("vim_tiny_patch16_224", "a student's name in timm's registry")
    a_init: str = _option("zero", "zero: decay near 1, linear attention; s4d: Mamba's default", choices=("zero", "s4d"))
    patch_size: int | None = _option(None, "the model's own where none", at_least=1)
    embed_dim: int | None = _option(None, "the model's own where none", at_least=1)
    depth: int | None = _option(None, "the model's own where none", at_least=1)
    d_state: int | None = _option(None, "the model's own where none", at_least=1)
    drop_path: float = _option(0.0, "stochastic depth of the last block", at_least=0, at_most=0.99)


@dataclass(frozen=True)
class TextConfig(Section):
    """Which text the student reads, and in what pieces."""

    _prefix = "data."

    name: str = _option(
        "files", "python (its standard library, on every machine) or files", choices=("python", "files")
    )
    path: str | None = _option(
        None, "for files: a text, .jsonl or .parquet file, a folder of such files, or a saved Hugging Face data set"
    )
    field: str = _option("text", "the field or column of .jsonl, .parquet and data sets that holds the text")
    tokenizer: str = _option(
        "teacher", "bytes, teacher (the teacher's own), or a Hugging Face tokenizer by name or path"
    )
    length: int = _option(1024, "tokens of a sequence", at_least=2)
    packing: str = _option(
        "concatenated",
        "documents of a sequence: concatenated (one after the other, each seeing those before it), isolated (the same, "
        "none seeing another) or padded (only one, and padding behind it)",
        choices=("concatenated", "isolated", "padded"),
    )
    cache: str | None = _option(
        None,
        "a folder for the tokens, which are then read from there as they are needed: for text larger than the memory; "
        "none holds them in memory",
    )
    limit: int | None = _option(None, "characters to read at most; all where none", at_least=1)
    held_out: float = _option(0.05, "share of the documents for the test", above=0, at_most=0.5)
    test_tokens: int | None = _option(None, "of the held-out text, to be tested on at most; all where none", at_least=1)
    workers: int = _option(0, "processes that load sequences; 0 loads in the training process", at_least=0)
    seed: int = _option(0, "draws the documents for the test; the same for every arm", at_least=0)


@dataclass(frozen=True)
class DecoderConfig(Section):
    """The frozen Transformer: any causal language model of transformers whose attention layers expose Q and K."""

    _prefix = "teacher."

    name: str | None = _option(None, "a Hugging Face model by name or path; none builds a small Llama of this size")
    width: int = _option(128, "of the small Llama", at_least=1)
    depth: int = _option(4, "of the small Llama: layers", at_least=1)
    heads: int = _option(4, "of the small Llama", at_least=1)
    key_heads: int = _option(2, "of the small Llama: heads of K and V", at_least=1)
    dtype: str = _option(
        "auto", "of the teacher's weights: auto (as published)", choices=("auto", "float32", "bfloat16")
    )
    quantized: str = _option(
        "no",
        "keep the teacher's linear layers in 4 or 8 bits; needs the extra quantized",
        choices=("no", "4bit", "8bit"),
    )
    device_map: str = _option(
        "none",
        "spread the teacher over the machine's devices as transformers does; for one process",
        choices=("none", "auto", "balanced", "sequential"),
    )
    steps: int = _option(0, "steps of training on the training text, before distillation", at_least=0)
    lr: float = _option(1e-3, "learning rate of those steps", above=0)


@dataclass(frozen=True)
class MambaConfig(Section):
    """The student: a Mamba language model, a Mamba-2, a hybrid of Mamba-2 and attention, or a discrete Mamba-2."""

    _prefix = "student."

    name: str = _option(
        "mamba",
        "mamba, mamba2, bamba (blocks of Mamba-2 or attention, with gated MLPs) or discrete_mamba2 (a Transformer's "
        "blocks with a discrete Mamba-2 in the place of attention)",
        choices=("mamba", "mamba2", "bamba", "discrete_mamba2"),
    )
    a_init: str = _option("zero", "zero: decay near 1, linear attention; s4d: Mamba's default", choices=("zero", "s4d"))
    width: int = _option(768, "of the residual stream", at_least=1)
    depth: int = _option(24, "layers", at_least=1)
    d_state: int = _option(16, "states of a channel, N; 64 to 128 are usual for mamba2", at_least=1)
    expand: int = _option(2, "channels of the scan over the width", at_least=1)
    head_dim: int = _option(64, "of every Mamba-2: channels that share a decay", at_least=1)
    groups: int = _option(1, "of every Mamba-2: sets of B and C", at_least=1)
    attention: str = _option(
        "every-4", "of bamba: blocks that keep attention: every-K, the last of each K; or their numbers from 0: 3,7,11"
    )
    heads: int = _option(12, "of bamba's attention", at_least=1)
    key_heads: int | None = _option(None, "of bamba's attention: heads of K and V; none: as many", at_least=1)
    attention_dim: int | None = _option(None, "of a head of bamba's attention; none: student.width / heads", at_least=1)
    mlp: int | None = _option(
        None, "width inside the MLPs of bamba and discrete_mamba2; none: 8/3 student.width", at_least=1
    )
    from_teacher: bool = _option(False, "start from the teacher's weights where shapes allow")


@dataclass(frozen=True)
class BridgeConfig(Section):
    """The MLPs from the student's B and C to the teacher's K and Q."""

    _prefix = "bridge."

    enabled: bool = _option(True, "align the student's B and C with the teacher's K and Q")
    aligns: str = _option(
        "projections",
        "what: projections (B with K, C with Q, through bridges), or, as a control, attention (the matrix C B^T with "
        "the teacher's softmax(Q K^T), without bridges; images only)",
        choices=("projections", "attention"),
    )
    hidden: int = _option(128, "width of a bridge's hidden layer; 0 makes the bridges linear", at_least=0)
    shared: bool = _option(False, "one bridge for B and one for C of a direction serve all layers")
    layer_map: str = _option(
        "proportional",
        "proportional; last-K, the same over the teacher's last K layers; the teacher layer of each layer: 0,0,1,3; or "
        "learned, for each layer a weight of every teacher layer, trained with the bridges (best with "
        "bridge.targets=standardised: of raw ones the smallest win)",
    )
    targets: str = _option(
        "raw",
        "K and Q as they are (raw), each channel standardised, or through the published code's softmax",
        choices=("raw", "standardised", "softmax"),
    )


@dataclass(frozen=True)
class LossConfig(Section):
    """What is minimised: kl * KL(teacher || student) + ce * cross-entropy + align(step) * alignment, or in stages."""

    _prefix = "loss."

    kl: float = _option(1.0, "weight of the KL divergence from the teacher's logits", at_least=0)
    ce: float = _option(0.0, "weight of the cross-entropy with the labels", at_least=0)
    temperature: float = _option(1.0, "of the logits in the KL divergence", above=0)
    align: float = _option(1.0, "weight of the alignment, where bridge.enabled", at_least=0)
    schedule: str = _option(
        "constant",
        "of the alignment's weight: constant, until (then 0), ramp (falls to 0), stages (alone, without KL and "
        "cross-entropy; then 0), or adaptive (follows the agreement of its gradient with the KL's)",
        choices=("constant", "until", "ramp", "stages", "adaptive"),
    )
    until: float = _option(
        1.0, "share of the steps after which until, ramp and the first of the stages end", above=0, at_most=1
    )


@dataclass(frozen=True)
class TokenLossConfig(LossConfig):
    """What is minimised, each term a mean over tokens; another divergence may take the place of the KL."""

    divergence: str = _option(
        "forward",
        "what loss.kl weighs: forward, KL(teacher || student), reverse, KL(student || teacher), or jsd between them",
        choices=("forward", "reverse", "jsd"),
    )
    beta: float = _option(0.5, "of jsd: share of the teacher in the mixture", above=0, at_most=0.999)
    top_k: int | None = _option(
        None, "compare the teacher's likeliest tokens and all others as one; none compares all", at_least=1
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay; averaged weights."""

    _prefix = "optim."

    steps: int = _option(20_000, "optimiser steps", at_least=1)
    batch_size: int = _option(64, "images or sequences a forward pass, shared out among the processes", at_least=1)
    accumulation: int = _option(1, "forward passes a step", at_least=1)
    lr: float = _option(5e-4, "peak learning rate", above=0)
    min_lr: float = _option(0.0, "learning rate at the end", at_least=0)
    layer_decay: float = _option(
        1.0, "learning rate of a layer over that of the layer above it; images only", above=0, at_most=1
    )
    weight_decay: float = _option(
        0.05, "spares A_log, D, biases, norms, position embeddings and class tokens", at_least=0
    )
    warmup: float = _option(0.05, "share of the steps", at_least=0, at_most=1)
    clip: float = _option(1.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    ema: float = _option(
        0.0,
        "decay of averaged weights, which are then what is evaluated and kept; 0: none",
        at_least=0,
        at_most=0.999999,
    )


@dataclass(frozen=True)
class Config(Section):
    """One run: the same teacher, data, order of data and number of steps for each of its arms."""

    preset: str = _option("digits", "the preset that the rest of the values started from")
    arms: tuple[str, ...] = _option(("cab",), "variants to train, one after the other; 'cab presets' lists them")
    seed: int = _option(0, "initial weights and order of the data; the same for every arm", at_least=0)
    device: str = _option("auto", "auto (a GPU where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    precision: str = _option(
        "auto", "auto (bfloat16 on a GPU), float32 or bfloat16", choices=("auto", "float32", "bfloat16")
    )
    graph: bool = _option(
        True,
        "on a GPU, replay forward and backward pass as one CUDA graph; not where models are sharded, or where several "
        "processes standardise their targets together",
    )
    shard: bool = _option(
        False,
        "of several processes, each holds a part of student, teacher, bridges and optimiser, not the whole: FSDP2, or "
        "ZeRO-3 where accelerate launches DeepSpeed",
    )
    log_gradients: bool = _option(
        False, "log norms and cosine of the gradients of the KL and of the alignment, 100 times a run"
    )
    wandb: bool = _option(False, "log to Weights & Biases too, a run an arm; needs the extra wandb")
    threads: int | None = _option(None, "of PyTorch on the CPU; its own choice where none", at_least=1)
    log_every: int = _option(50, "steps between two entries of the training losses", at_least=1)
    eval_every: int = _option(1000, "steps between two evaluations", at_least=1)
    save_every: int = _option(1000, "steps between two checkpoints", at_least=1)
    bridge: BridgeConfig = BridgeConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.arms:
            raise UserError("expected arms to name at least one arm, got none")
        if self.optim.min_lr > self.optim.lr:
            raise UserError(f"expected optim.min_lr of at most optim.lr={self.optim.lr}, got {self.optim.min_lr}")
        if len(set(self.arms)) < len(self.arms):
            raise UserError(f"expected each arm once, got {', '.join(self.arms)}")
        aligned_to_the_end = self.bridge.enabled and self.loss.align and self.loss.schedule == "constant"
        if not self.loss.kl and not self.loss.ce and not aligned_to_the_end:
            raise UserError("expected loss.kl, loss.ce or a constant loss.align above 0, got nothing to learn from")
        if self.loss.schedule == "adaptive" and self.bridge.enabled and not self.loss.kl:
            raise UserError("expected loss.kl above 0 for loss.schedule=adaptive, which compares with it, got 0.0")
        if self.loss.schedule == "stages" and self.loss.until == 1:
            raise UserError("expected loss.until below 1 for loss.schedule=stages, whose second stage follows, got 1.0")


@dataclass(frozen=True)
class VisionConfig(Config):
    """One run on images."""

    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        teacher_key = "teacher.image_size" if self.teacher.image_size else "data.image_size"
        for key, size, patch_key, patch_size in (
            (teacher_key, self.teacher.image_size or self.data.image_size, "teacher", self.teacher.patch_size),
            ("data.image_size", self.data.image_size, "student", self.student.patch_size),
        ):
            if patch_size and size % patch_size:
                raise UserError(f"expected {key} to be a multiple of {patch_key}.patch_size={patch_size}, got {size}")
        if self.data.name == "folder" and self.data.root is None:
            raise UserError("expected data.root, a folder with train/CLASS and val/CLASS, got none")
        if not (self.teacher.pretrained or self.teacher.weights or self.teacher.steps):
            raise UserError("expected teacher.pretrained, teacher.weights or teacher.steps, got a teacher without any")


@dataclass(frozen=True)
class LanguageConfig(Config):
    """One run on text."""

    loss: TokenLossConfig = TokenLossConfig()
    data: TextConfig = TextConfig()
    teacher: DecoderConfig = DecoderConfig()
    student: MambaConfig = MambaConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.name == "files" and self.data.path is None:
            raise UserError("expected data.path, a file or folder with text, got none")
        if self.teacher.name is None and not self.teacher.steps:
            raise UserError("expected teacher.name, or teacher.steps to train a teacher on the text, got neither")
        placed = {"quantized": (self.teacher.quantized, "no"), "device_map": (self.teacher.device_map, "none")}
        for name, (value, without) in placed.items():
            wanted = f"for teacher.{name}={value}"
            if value != without and self.teacher.name is None:
                raise UserError(f"expected teacher.name {wanted}, got none")
            if value != without and self.teacher.steps:
                raise UserError(f"expected teacher.steps=0 {wanted}, got {self.teacher.steps}")
            if value != without and self.shard:
                raise UserError(f"expected shard=false {wanted}, got true")
        if self.teacher.device_map != "none" and self.graph:
            raise UserError(f"expected graph=false for teacher.device_map={self.teacher.device_map}, got true")
        if self.teacher.quantized != "no" and self.student.from_teacher:
            raise UserError(
                f"expected student.from_teacher=false for teacher.quantized={self.teacher.quantized}, got true"
            )
        if self.data.packing == "isolated" and self.student.name != "mamba":
            raise UserError(
                f"expected data.packing=concatenated or padded for student.name={self.student.name}, got 'isolated'"
            )
        if self.data.packing == "isolated" and self.graph:
            raise UserError("expected graph=false for data.packing=isolated, whose documents vary in number, got true")
        if self.bridge.enabled and self.bridge.aligns == "attention":
            raise UserError("expected bridge.aligns=projections for a language model, got 'attention'")
        if self.optim.layer_decay != 1:
            raise UserError(f"expected optim.layer_decay=1 for a language model, got {self.optim.layer_decay}")
        if self.data.tokenizer == "teacher" and self.teacher.name is None:
            raise UserError("expected data.tokenizer=bytes or a tokenizer's name without teacher.name, got 'teacher'")


RunConfig = VisionConfig | LanguageConfig
