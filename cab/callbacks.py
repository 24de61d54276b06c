"""What a training tells of itself: metrics as JSON lines, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import is_wandb_available

from cab.config import Config, UserError
from cab.files import write_whole
from cab.refusal import refused
from cab.settings import flatten

METRICS = "metrics.jsonl"
TERMS = ("kl", "ce", "align")  # of the loss, each where the task computes it
MEASURES = ("loss", "accuracy", "top5", "perplexity", *TERMS)
LAYERS = "align_layers/"  # begins the name of a layer's alignment
LEARNED = "layer_map/"  # begins the name of the teacher layer, a mean over a learned map's weights, of a layer
# Of the training alone.
_OF_TRAINING = (
    "align_weight",
    "grad_kl",
    "grad_align",
    "grad_cosine",
    "learning_rate",
    "grad_norm",
    "samples_per_second",
)


class MetricsFile(TrainerCallback):
    """Writes what is logged as JSON lines, each with its step, its split and the seconds of training so far.

    A resumed run drops the entries behind its checkpoint, and its seconds go on from the last entry that it keeps.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []
        self._started: float | None = None
        self._writes = True
        self._paused_at: float | None = None

    def last(self, split: str) -> dict[str, Any]:
        """The latest entry of "train" or "test"; a :class:`UserError` where a resumed training has lost it."""
        for entry in reversed(self.entries):
            if entry["split"] == split:
                return entry
        raise UserError(f"expected what was measured on the {split} split in {self.file}, got none")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside."""
        self._paused_at = _now()
        yield
        if self._started is not None:
            self._started += _now() - self._paused_at
        self._paused_at = None

    def seconds(self) -> float:
        """Of training so far."""
        return 0.0 if self._started is None else (self._paused_at or _now()) - self._started

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        before = [] if args.eval_on_start else read_metrics(self.file)
        self.entries = [entry for entry in before if entry["step"] <= state.global_step]
        self._writes = state.is_world_process_zero
        if self._writes:
            write_whole(self.file, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._started = _now() - (self.entries[-1]["seconds"] if self.entries else 0.0)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self._started is None or "train_runtime" in logs:
            return
        split = "test" if "eval_loss" in logs else "train"
        named = {name.removeprefix("eval_"): value for name, value in logs.items()}
        kept: dict[str, Any] = {name: named[name] for name in (*MEASURES, *_OF_TRAINING) if name in named}
        for prefix in (LAYERS, LEARNED):
            layers = [value for name, value in named.items() if name.startswith(prefix)]
            if layers:
                kept[prefix.rstrip("/")] = layers
        self.entries.append({"step": state.global_step, "split": split, "seconds": round(self.seconds(), 3), **kept})
        if self._writes:
            with self.file.open("a") as lines:
                lines.write(json.dumps(self.entries[-1]) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The entries of a ``metrics.jsonl``; none where there is no file, and not one that a kill left unfinished.

    Raises:
        UserError: the file holds something else than JSON.
    """
    with refused(f"expected lines of JSON in {file}"):
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class Events(TensorBoardCallback):
    """TensorBoard events of a training, in a folder of our choice; what is only measured leaves none."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.tb_writer is not None:  # a training has begun
            # Trainer's epoch counts runs here, not passes over the data.
            super().on_log(args, state, control, {name: logs[name] for name in logs if name != "epoch"}, **kwargs)


class Wandb(WandbCallback):
    """Transformers' reports to Weights & Biases, as a run of its own for each training.

    Args:
        folder: of the training; a folder's name and its parent's name the run, whose files lie in it.
        config: of the training.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        require_wandb()
        super().__init__()
        self.folder = folder
        self.config = config

    def setup(self, args: TrainingArguments, state: Any, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{self.folder.parent.name}/{self.folder.name}"
            self._wandb.init(project="cab", name=name, dir=str(self.folder), config=flatten(self.config))
        super().setup(args, state, model, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._wandb.finish()  # the next training is another run


def require_wandb() -> None:
    """Refuse, as a :class:`UserError`, to go on where wandb is not installed."""
    if not is_wandb_available():
        raise UserError("expected the packages of cab-kernels[wandb] for wandb=true, got no module 'wandb'")


class Progress(TrainerCallback):
    """A progress bar on a terminal; a line for each evaluation where the output is a file or a pipe."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.stream = stream
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(
            desc=self.name,
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=self.stream,
            disable=not self.stream.isatty(),
            dynamic_ncols=True,
        )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self.bar is None:
            return
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.4g}"
        if "eval_accuracy" in logs:
            self.shown["accuracy"] = f"{logs['eval_accuracy']:.1%}"
        if "eval_perplexity" in logs:
            self.shown["perplexity"] = f"{logs['eval_perplexity']:.2f}"
        self.bar.set_postfix(self.shown)
        if self.bar.disable and "eval_loss" in logs:
            shown = ", ".join(f"{name} {value}" for name, value in self.shown.items())
            print(f"{self.name}: step {state.global_step}/{state.max_steps}, {shown}", file=self.stream, flush=True)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
