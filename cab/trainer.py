"""Training on ``transformers.Trainer``: what it lacks for a distillation task, and nothing that it has."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate
from tqdm import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from cab.config import RunConfig, UserError
from cab.data.order import RunOrder
from cab.distill.task import DistillationTask
from cab.graphed import GraphedStep

METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"
TERMS = ("kl", "ce", "align")  # of the loss, each where the task computes it
MEASURES = ("loss", "accuracy", "perplexity", *TERMS)


class Outcome(NamedTuple):
    """What one training came to.

    Attributes:
        test: accuracy or perplexity, and the mean of each loss term, on the test split.
        seconds: training time, evaluation left out.
        samples_per_second: images or sequences trained on over ``seconds``.
    """

    test: dict[str, float]
    seconds: float
    samples_per_second: float


class TaskTrainer(Trainer):
    """Trains a task: a module whose forward returns its loss, its logits and the terms of the loss.

    Adds to ``Trainer``: decay groups that spare what decay would spoil, the alignment's schedule, every loss term in
    the logs without a synchronisation a step, an order of the data that lasts the whole run, checkpoints without
    pickled arguments that load strictly, and a ``metrics.jsonl`` that a resumed run continues.

    Args:
        task: what is trained.
        config: of the run.
        folder: where metrics, events and checkpoints go.
        train, test: data sets of what the task's forward takes, by name.
        name: what the progress bar calls this training.
    """

    loss_is_scaled_for_ga = False  # the task's loss is a mean over its batch: Trainer divides by the accumulation

    def __init__(
        self, task: DistillationTask, config: RunConfig, folder: Path, train: Dataset, test: Dataset, name: str = ""
    ) -> None:
        self.metrics = MetricsFile(folder / METRICS)
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._compared_at = -1
        super().__init__(
            model=task,
            args=_arguments(config, folder),
            data_collator=default_collate,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=self._summarise,
            callbacks=[
                _Advance(),
                _LogBeforeSave(),
                self.metrics,
                _Progress(name, sys.stderr),
                _Events(folder / "tensorboard"),
            ],
        )
        self.remove_callback(PrinterCallback)
        self.graphed: Callable[..., dict[str, Tensor]] | None = None
        if config.graph and self.args.device.type == "cuda":
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            self.graphed = GraphedStep(task, dtype, self.args.gradient_accumulation_steps)

    def run(self, resume: bool = False) -> Outcome:
        """Train, from the folder's last checkpoint where ``resume`` and there is one, and report."""
        checkpoint = get_last_checkpoint(self.args.output_dir) if resume else None
        self.args.eval_on_start = checkpoint is None
        self.train(resume_from_checkpoint=checkpoint)
        test = self.metrics.last("test")
        seconds = test["seconds"]
        samples = self.state.global_step * self.args.train_batch_size * self.args.gradient_accumulation_steps
        return Outcome(
            {name: test[name] for name in MEASURES if name in test}, seconds, samples * self.args.world_size / seconds
        )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices and convolutions; not A_log, D, biases, norms, position embeddings or tokens."""
        spared = model.no_weight_decay()
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and name not in spared]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()  # the step before may have ended in an evaluation
        inputs = self._prepare_inputs(inputs)
        self._compare_gradients(inputs)
        if self.graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        outputs = self.graphed(**inputs)
        self._count(outputs)
        return outputs["loss"] / self.args.gradient_accumulation_steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        self._count(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _compare_gradients(self, inputs: dict[str, Tensor]) -> None:
        """Feed an adaptive schedule, once a step however many batches accumulate in it."""
        trust, step = self.model.trust, self.state.global_step
        if trust is None or step == self._compared_at or not trust.is_due(step, self.state.max_steps):
            return
        self._compared_at = step
        with self.accelerator.autocast():
            agreement = self.model.compare_gradients(**inputs)
        trust.observe(agreement.cosine)

    def _count(self, outputs: dict[str, Tensor]) -> None:
        """Add up the terms where they are; they are read when something is logged."""
        for name in TERMS:
            if name in outputs:
                self._sums[name] = self._sums.get(name, 0) + outputs[name].detach().float()
        self._passes += 1

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """One value a sample for each measure, so that a last, smaller batch counts for no more than it holds."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        measures = cast(Any, self.model).measures(inputs, outputs)
        return outputs["loss"].detach(), measures, measures["weight"]

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        measures = dict(prediction.predictions)
        weight = measures.pop("weight")
        means = {name: float((values * weight).sum() / weight.sum()) for name, values in measures.items()}
        return cast(Any, self.model).summary(means)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.metrics.paused():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and self._passes:
            logs |= {name: total.item() / self._passes for name, total in self._sums.items()}
            if self.model.bridges is not None:
                logs["align_weight"] = self.model.alignment_weight
            self._sums, self._passes = {}, 0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        samples = self.args.max_steps * self.args.train_batch_size * self.args.gradient_accumulation_steps
        return RunOrder(len(cast(Sized, dataset)), samples * self.args.world_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.model, str(folder / WEIGHTS))  # embeddings may be tied to the head

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        safetensors.torch.load_model(self.model if model is None else model, Path(resume_from_checkpoint) / WEIGHTS)


class MetricsFile(TrainerCallback):
    """Writes what is logged as JSON lines, each with its step, its split and the seconds of training so far.

    A resumed run drops the entries behind its checkpoint, and its seconds go on from the last entry that it keeps.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []
        self._started: float | None = None
        self._paused_at: float | None = None

    def last(self, split: str) -> dict[str, Any]:
        """The latest entry of "train" or "test"."""
        return next(entry for entry in reversed(self.entries) if entry["split"] == split)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside."""
        self._paused_at = _now()
        yield
        if self._started is not None:
            self._started += _now() - self._paused_at
        self._paused_at = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        before = [] if args.eval_on_start else read_metrics(self.file)
        self.entries = [entry for entry in before if entry["step"] <= state.global_step]
        self.file.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._started = _now() - (self.entries[-1]["seconds"] if self.entries else 0.0)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self._started is None or "train_runtime" in logs:
            return
        split = "test" if "eval_loss" in logs else "train"
        named = {name.removeprefix("eval_"): value for name, value in logs.items()}
        if not math.isfinite(named["loss"]):
            raise UserError(
                f"expected a finite loss, got {named['loss']} at step {state.global_step}; a lower optim.lr may help"
            )
        kept = {
            name: named[name] for name in (*MEASURES, "align_weight", "learning_rate", "grad_norm") if name in named
        }
        seconds = (self._paused_at or _now()) - self._started
        self.entries.append({"step": state.global_step, "split": split, "seconds": round(seconds, 3), **kept})
        with self.file.open("a") as lines:
            lines.write(json.dumps(self.entries[-1]) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The entries of a ``metrics.jsonl``; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


class _Advance(TrainerCallback):
    """Tells the task where in the run it is."""

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].advance(state.global_step, state.max_steps)


class _LogBeforeSave(TrainerCallback):
    """Logs before every checkpoint, so that no part of a mean is lost in it."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save


class _Events(TensorBoardCallback):
    """TensorBoard events in a folder of our choice."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Trainer's epoch counts runs here, not passes over the data.
        super().on_log(args, state, control, {name: logs[name] for name in logs if name != "epoch"}, **kwargs)


class _Progress(TrainerCallback):
    """A progress bar on a terminal; a line for each evaluation where the output is a file or a pipe."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.stream = stream
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
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


def _arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    workers = config.data.workers
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("expected a CUDA GPU for device=cuda, got none")
    on_gpu = cuda and config.device != "cpu"
    automatic = on_gpu and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not on_gpu,
        bf16={"auto": automatic, "float32": False, "bfloat16": True}[config.precision],
        seed=config.seed,
        max_steps=config.optim.steps,
        per_device_train_batch_size=config.optim.batch_size,
        per_device_eval_batch_size=config.optim.batch_size,
        gradient_accumulation_steps=config.optim.accumulation,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        warmup_steps=math.ceil(config.optim.warmup * config.optim.steps),
        lr_scheduler_type="cosine",
        max_grad_norm=config.optim.clip,
        logging_steps=config.log_every,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        save_total_limit=1,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=on_gpu,
        # DDP must not wait for the bridges' gradients once their weight has become 0.
        ddp_find_unused_parameters=config.bridge.enabled and config.loss.schedule != "constant",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # it would synchronise each step, and hide what it filters
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    arguments.device  # noqa: B018  settles the number of GPUs, which is then one a process: no DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
