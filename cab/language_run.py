"""A run on text. A teacher trained on the spot and each arm's student are kept as folders that transformers loads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaForCausalLM,
)
from transformers import MambaConfig as MambaModelConfig
from transformers.utils import is_bitsandbytes_available, logging

import cab.processes as processes
from cab.config import DecoderConfig, LanguageConfig, MambaConfig, UserError
from cab.data.documents import files_of
from cab.data.language import load
from cab.distill.language import LanguageTask
from cab.distill.task import DistillationTask, LossWeights
from cab.distill.token_losses import Divergence, DivergenceKind
from cab.layer_map import proportional
from cab.positions import loss_by_position
from cab.recall import PAIRS, recall
from cab.refusal import refused
from cab.report import PERPLEXITY, Positions, Recall
from cab.run import Run, needs_teacher
from cab.students.discrete_mamba2 import DiscreteMamba2Config, DiscreteMamba2ForCausalLM
from cab.students.from_teacher import start_from_teacher
from cab.students.language import LanguageStudent, PlainLanguageModel, attention_blocks
from cab.task_options import task_options
from cab.teachers.huggingface import HuggingFaceTeacher

STUDENT = "student"
TEACHER = "teacher-model"
NAMED_WEIGHTS = 2  # of those that a checkpoint lacks, in an error


class LanguageRun(Run):
    """A run on text: see :class:`cab.run.Run`."""

    measure = PERPLEXITY
    config: LanguageConfig

    def __init__(self, config: LanguageConfig, folder: Path) -> None:
        super().__init__(config, folder)
        logging.disable_progress_bar()  # the run has its own
        self.splits = load(config.data, config.teacher.name)
        self.tokens = self.splits.tokens
        # Rows of a multiple of 8 numbers suit the GPU; what no token has is left out of the loss.
        self.vocab_size = -(-self.tokens.size // 8) * 8
        self.full = self.train = self.splits.train
        self.test = self.splits.test

    def files(self) -> tuple[str, Iterable[str]]:
        files = files_of(self.config.data)
        return str(Path(self.config.data.path or files[0].parent)), map(str, files)

    def describe(self) -> str:
        splits = self.splits
        return (
            f"student reads {splits.train_tokens:,} tokens in sequences of {self.config.data.length}, tested on "
            f"{splits.test_tokens:,} in windows that move on by {splits.test.stride}"
        )

    def teacher_model(self, trained: bool = False) -> nn.Module:
        teacher = self.config.teacher
        if trained:
            return AutoModelForCausalLM.from_pretrained(self.folder / TEACHER)
        if teacher.name is not None:
            return _pretrained(teacher.name, dtype=teacher.dtype, **_placement(teacher))
        torch.manual_seed(self.config.seed)
        with refused("expected sizes of a Llama"):
            return LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=teacher.width,
                    intermediate_size=_mlp_width(teacher.width),
                    num_hidden_layers=teacher.depth,
                    num_attention_heads=teacher.heads,
                    num_key_value_heads=teacher.key_heads,
                    max_position_embeddings=max(2048, self.config.data.length),
                    tie_word_embeddings=True,
                    **self._vocabulary(),
                )
            )

    def save_teacher(self, model: nn.Module) -> None:
        self._save(model, self.folder / TEACHER)

    def distillation_task(self, arm: LanguageConfig, teacher: nn.Module | None) -> DistillationTask:
        loss = arm.loss
        with refused():
            tapped = HuggingFaceTeacher(teacher) if teacher is not None else None
            if tapped is not None and tapped.max_length is not None and arm.data.length > tapped.max_length:
                raise UserError(
                    f"expected data.length of at most {tapped.max_length}, the positions of {tapped.name}, "
                    f"got {arm.data.length}"
                )
            if tapped is not None and arm.data.packing == "isolated" and not tapped.packs:
                raise UserError(
                    f"expected data.packing=concatenated or padded for {tapped.name}, which does not keep the "
                    "documents of a sequence apart, got 'isolated'"
                )
            student = self._student(arm, tapped)
            return LanguageTask(
                student,
                tapped,
                **task_options(arm, student, tapped),
                divergence=Divergence(cast(DivergenceKind, loss.divergence), loss.beta, loss.top_k),
                tokens=self.tokens.size,
            )

    def supervised_task(self, model: nn.Module) -> DistillationTask:
        student = PlainLanguageModel(model)
        return LanguageTask(student, weights=LossWeights(kd=0.0, ce=1.0), tokens=self.tokens.size)

    def save_student(self, task: DistillationTask, folder: Path) -> None:
        self._save(cast(LanguageStudent, task.student).model, folder / STUDENT)

    def load_student(self, arm: LanguageConfig, folder: Path) -> nn.Module | None:
        if not (folder / STUDENT).is_dir():
            return None
        with refused(f"expected a whole student of the run in {folder / STUDENT}"):
            return LanguageStudent(AutoModelForCausalLM.from_pretrained(folder / STUDENT)).model

    def recall(self) -> Recall:
        length, known = self.config.data.length, self.splits.test.stream.unique().long()
        known = known[known != self.tokens.end]
        pairs = [count for count in PAIRS if 4 * count <= length and 2 * count <= len(known)]
        if not pairs:
            raise UserError(
                f"expected sequences of at least {4 * PAIRS[0]} tokens and as many as {2 * PAIRS[0]} different ones in "
                f"the test text for --mqar, got {length} and {len(known)}"
            )
        accuracy: dict[str, list[float | None]] = {}
        for name, model, positions in self._models():
            accuracy[name] = [recall(model, n, known, self.device) if 4 * n <= positions else None for n in pairs]
        return Recall(pairs, accuracy)

    def positions(self) -> Positions:
        length, stream = self.config.data.length, self.splits.test.stream
        ends = [factor * length for factor in (1, 2, 4, 8) if factor * length <= len(stream)]
        if len(ends) < 2:
            raise UserError(
                f"expected test text of at least {2 * length} tokens, twice the length, for --positions, "
                f"got {len(stream)}"
            )
        perplexity: dict[str, list[float | None]] = {}
        for name, model, positions in self._models():
            within = [end for end in ends if end <= positions]
            perplexity[name] = [None] * len(ends)
            if within:
                losses = loss_by_position(model, stream, within[-1], self.tokens.size, self.device)
                starts = [1, *within[:-1]]  # nothing comes before the first token
                for index, (start, end) in enumerate(zip(starts, within, strict=True)):
                    perplexity[name][index] = losses[start - 1 : end - 1].mean().exp().item()
        return Positions(ends, perplexity)

    def _models(self) -> Iterator[tuple[str, PlainLanguageModel, float]]:
        """The teacher, where there is one, and the trained students: names, models, how many positions they take."""
        found: Iterable[tuple[str, nn.Module | None]]
        found = ((name, self.load_student(arm, self.folder / name)) for name, arm in self.arms.items())
        if any(map(needs_teacher, self.arms.values())):
            found = itertools.chain([("teacher", self.teacher_model(bool(self.config.teacher.steps)))], found)
        for name, model in found:
            if model is not None:
                positions = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None)
                yield name, PlainLanguageModel(model).to(self.device).eval(), positions or math.inf

    def _student(self, arm: LanguageConfig, teacher: HuggingFaceTeacher | None) -> LanguageStudent:
        torch.manual_seed(arm.seed)
        with refused(f"expected sizes of a {arm.student.name} model"):
            student = LanguageStudent(self._mamba(arm.student))
        if arm.student.from_teacher and teacher is not None:
            start_from_teacher(student.model, teacher.model, proportional(student.num_layers, teacher.num_layers))
        if arm.student.a_init == "zero":
            student.start_at_linear_attention()
        return student

    def _mamba(self, sizes: MambaConfig) -> nn.Module:
        common = {"hidden_size": sizes.width, "num_hidden_layers": sizes.depth, **self._vocabulary()}
        if sizes.name == "mamba":
            config = MambaModelConfig(**common, state_size=sizes.d_state, expand=sizes.expand)
            return MambaForCausalLM(config)
        heads, rest = divmod(sizes.expand * sizes.width, sizes.head_dim)
        if rest:
            raise ValueError(
                f"student.expand * student.width = {sizes.expand * sizes.width} is no multiple of "
                f"student.head_dim = {sizes.head_dim}"
            )
        if sizes.name == "bamba":
            return _bamba(sizes, heads, common)
        common |= {
            "num_heads": heads,
            "head_dim": sizes.head_dim,
            "n_groups": sizes.groups,
            "state_size": sizes.d_state,
        }
        if sizes.name == "mamba2":
            return Mamba2ForCausalLM(Mamba2Config(**common, expand=sizes.expand))
        mlp = sizes.mlp or _mlp_width(sizes.width)
        return DiscreteMamba2ForCausalLM(DiscreteMamba2Config(**common, intermediate_size=mlp))

    def _vocabulary(self) -> dict[str, int | None]:
        end = self.tokens.end
        return {"vocab_size": self.vocab_size, "bos_token_id": None, "eos_token_id": end, "pad_token_id": end}

    def _save(self, model: nn.Module, folder: Path) -> None:
        cast(Any, model).save_pretrained(folder)
        self.tokens.save(folder)


def _pretrained(name: str, **options: Any) -> nn.Module:
    """A causal language model of which every weight is there: transformers would make up those that are missing."""
    expected = f"expected teacher.name to be a causal language model by name or path, got {name!r}"
    with refused(expected):
        model, loaded = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        kind = (model.config.architectures or [type(model).__name__])[0]
        named = ", ".join([*missing[:NAMED_WEIGHTS], *["..."] * (len(missing) > NAMED_WEIGHTS)])
        raise UserError(f"{expected}, a {kind} without {named}")
    return model


def _placement(teacher: DecoderConfig) -> dict[str, Any]:
    """How ``from_pretrained`` is to load a teacher that stays where it then is."""
    options: dict[str, Any] = {}
    if teacher.quantized != "no":
        if not is_bitsandbytes_available():
            raise UserError(
                f"expected the packages of cab-kernels[quantized] for teacher.quantized={teacher.quantized}, got no "
                "module 'bitsandbytes'"
            )
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=teacher.quantized == "4bit",
            load_in_8bit=teacher.quantized == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if teacher.dtype == "float32" else torch.bfloat16,
        )
    if teacher.device_map != "none":
        if processes.count() > 1:
            raise UserError(
                f"expected one process for teacher.device_map={teacher.device_map}, got {processes.count()}"
            )
        options["device_map"] = teacher.device_map
    return options


def _bamba(sizes: MambaConfig, heads: int, common: Mapping[str, Any]) -> nn.Module:
    return BambaForCausalLM(
        BambaConfig(
            **common,
            attn_layer_indices=attention_blocks(sizes.attention, sizes.depth),
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_heads or sizes.heads,
            head_dim=sizes.attention_dim or sizes.width // sizes.heads,
            intermediate_size=sizes.mlp or _mlp_width(sizes.width),
            tie_word_embeddings=True,
            mamba_d_state=sizes.d_state,
            mamba_expand=sizes.expand,
            mamba_n_heads=heads,
            mamba_d_head=sizes.head_dim,
            mamba_n_groups=sizes.groups,
        )
    )


def _mlp_width(width: int) -> int:
    """Of a gated MLP: 8/3 of the tokens' width, rounded up to a multiple of 8."""
    return -(-8 * width // 3 // 8) * 8
