"""Training on ``transformers.Trainer``: what it lacks for a distillation task, and nothing that it has."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

import cab.processes as processes
from cab.callbacks import LAYERS, LEARNED, MEASURES, METRICS, TERMS, Events, MetricsFile, Progress, Wandb
from cab.config import RunConfig, UserError
from cab.data.order import ByTurn, RunOrder
from cab.distill.agreement import AdaptiveTrust, GradientAgreement
from cab.distill.task import DistillationTask
from cab.files import settle
from cab.graphed import GraphedStep
from cab.recipe import AveragedWeights, Batch, layer_decay_groups
from cab.refusal import refused

WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
UNFINISHED = "unfinished"  # holds a checkpoint while it is written
NAMED_SAMPLES = 16  # of a batch, in an error


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
    the logs without a synchronisation a step, an order of the data that lasts the whole run, samples that depend on
    their turn alone, averaged weights, checkpoints that are whole or not there, hold no pickled arguments and load
    strictly, and a ``metrics.jsonl`` that a resumed run continues. Several processes share every batch, and where the
    configuration says so the models, too: the run is the same as that of one process.

    Args:
        task: what is trained.
        config: of the run.
        folder: where metrics, events and checkpoints go.
        train, test: data sets of what the task's forward takes, by name.
        name: what the progress bar calls this training.
        mix: makes the batch that is trained on from one that was loaded.

    Raises:
        UserError: the batch cannot be shared out among the processes, there is no such device, or ZeRO-3 cannot do it.
    """

    loss_is_scaled_for_ga = False  # the task's loss is a mean over its batch: Trainer divides by the accumulation

    def __init__(
        self,
        task: DistillationTask,
        config: RunConfig,
        folder: Path,
        train: Dataset,
        test: Dataset,
        name: str = "",
        mix: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.config = config
        self.mix = mix
        self.metrics = MetricsFile(folder / METRICS)
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._compared_at = -1
        self._agreement: GradientAgreement | None = None
        self._first_bad: Tensor | None = None  # the step of the first loss that was no number, -1 before
        self._logged = (0, 0.0)  # step and seconds
        self.shards = config.shard and processes.count() > 1
        self.by_deepspeed = self.shards and processes.by_deepspeed()
        if self.by_deepspeed and config.optim.layer_decay < 1:  # timm's groups go by the shapes of whole parameters
            raise UserError(f"expected optim.layer_decay=1 for DeepSpeed's ZeRO-3, got {config.optim.layer_decay}")
        super().__init__(
            model=task,
            args=_arguments(config, folder, task.aligns),
            data_collator=default_collate,
            train_dataset=ByTurn(train, config.seed),
            eval_dataset=test,
            compute_metrics=self._summarise,
            callbacks=[
                _Advance(),
                _LogBeforeSave(),
                self.metrics,
                Progress(name, sys.stderr),
                Events(folder / "tensorboard"),
                *([Wandb(folder, config)] if config.wandb else []),
            ],
        )
        self.remove_callback(PrinterCallback)
        set_seed(self.args.seed + processes.rank())  # each process drops and mixes in its own way
        self.averaged = AveragedWeights(task, config.optim.ema) if config.optim.ema else None
        if self.averaged:
            self.add_callback(_Average(self.averaged))
        self.graphed: Callable[..., dict[str, Tensor]] | None = None
        if not self.shards and _replays(config, self.args.device):
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            self.graphed = GraphedStep(task, dtype, self.args.gradient_accumulation_steps)
        if self.shards or self.graphed:  # nothing is left to DDP, and a graph cannot be captured of what it has wrapped
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        if self.by_deepspeed:
            self.accelerator.clip_grad_norm_ = processes.clip_gradients

    def run(self, resume: bool = False) -> Outcome:
        """Train, from the folder's last checkpoint where ``resume`` and there is one, and report."""
        folder = Path(str(self.args.output_dir))
        checkpoint = processes.first(lambda: get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None)
        self.args.eval_on_start = checkpoint is None
        if checkpoint is not None:
            with _whole(checkpoint):  # Trainer reads it again
                TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        self.train(resume_from_checkpoint=checkpoint)
        if self.averaged:
            self.averaged.keep()
        test = self.metrics.last("test")
        seconds = test["seconds"]
        samples = self.state.global_step * self.args.train_batch_size * self.args.gradient_accumulation_steps
        return Outcome(
            {name: test[name] for name in MEASURES if name in test}, seconds, samples * self.args.world_size / seconds
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.shards:
            super()._move_model_to_device(model, device)
            return
        task = cast(DistillationTask, model)
        if task.teacher is not None and not task.teacher.stays:
            processes.shard(task.teacher, device)
        processes.shard(task, device, "compare_gradients", last=task.last_aligned)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices and convolutions; not A_log, D, biases, norms, position embeddings or tokens."""
        spared = model.no_weight_decay()
        shapes = {name: processes.shape(parameter) for name, parameter in model.named_parameters()}
        return [name for name, shape in shapes.items() if len(shape) > 1 and name not in spared]

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optim = self.config.optim
        if self.optimizer is None and optim.layer_decay < 1:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = layer_decay_groups(cast(Any, self.model), optim.lr, optim.weight_decay, optim.layer_decay)
            self.optimizer = kind(groups, **options)
        optimizer = super().create_optimizer(model)
        if self.by_deepspeed:
            processes.own_parts(optimizer)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()  # the step before may have ended in an evaluation
        inputs = self._prepare_inputs(inputs)
        if self.mix is not None:
            inputs = self.mix(inputs)
        self._compare_gradients(inputs)
        if self.graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        outputs = self.graphed(**inputs)
        self._count(outputs)
        if self.accelerator.sync_gradients:  # the graph goes past DDP
            processes.average_gradients(cast(nn.Module, self.model))
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
        """For an adaptive schedule or the logs, once a step however many batches accumulate in it."""
        task, step = cast(Any, self.model), self.state.global_step
        logged = self.config.log_gradients and task.aligns and task.weights.kd and task.alignment_weight
        wanted = task.trust is not None or logged
        if not wanted or step == self._compared_at or not AdaptiveTrust.is_due(step, self.state.max_steps):
            return
        self._compared_at = step
        with self.accelerator.autocast(), _unchanged(task), processes.kept_whole(task, task.last_aligned):
            self._agreement = task.compare_gradients(**inputs)
        if task.trust is not None:
            task.trust.observe(self._agreement.cosine)

    def _count(self, outputs: dict[str, Tensor]) -> None:
        """Add up the terms where they are; they are read when something is logged."""
        for name in (*TERMS, "align_layers"):
            if name in outputs:
                self._sums[name] = self._sums.get(name, 0) + outputs[name].detach().float()
        self._passes += 1
        loss = outputs["loss"].detach()
        before = torch.full_like(loss, -1.0) if self._first_bad is None else self._first_bad
        step = float(self.state.global_step + 1)
        self._first_bad = torch.where((before < 0) & ~loss.isfinite(), step, before)

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
        with self.metrics.paused(), self.averaged.in_place() if self.averaged else nullcontext():
            measured = super().evaluate(*args, **kwargs)
            processes.reshard(cast(nn.Module, self.model))
        return measured

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and self._passes:
            self._refuse_what_is_no_number(logs)
            logs |= self._collected()
        super().log(logs, start_time)

    def _collected(self) -> dict[str, float]:
        """What was counted since the last entry, as means."""
        found: dict[str, Any] = {
            name: processes.mean(total / self._passes).tolist() for name, total in self._sums.items()
        }
        layers = found.pop("align_layers", [])
        means: dict[str, float] = {**found, **{f"{LAYERS}{layer:02d}": value for layer, value in enumerate(layers)}}
        bridges = cast(Any, self.model).bridges
        if bridges is not None and bridges.layer_logits is not None:
            shares = processes.whole(processes.own(bridges.layer_logits)).float().softmax(dim=1)
            middle = (shares @ torch.arange(float(shares.shape[1]), device=shares.device)).tolist()
            means |= {f"{LEARNED}{layer:02d}": value for layer, value in enumerate(middle)}
        if cast(Any, self.model).aligns:
            means["align_weight"] = cast(Any, self.model).alignment_weight
        if self._agreement is not None:
            names = ("grad_kl", "grad_align", "grad_cosine")
            means |= {name: value.item() for name, value in zip(names, self._agreement, strict=True)}
        step, seconds = self.state.global_step, self.metrics.seconds()
        if seconds > self._logged[1]:
            means["samples_per_second"] = (step - self._logged[0]) * self._samples_a_step / (seconds - self._logged[1])
        self._sums, self._passes, self._agreement, self._logged = {}, 0, None, (step, seconds)
        return means

    def _refuse_what_is_no_number(self, logs: dict[str, float]) -> None:
        if math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0)):
            return
        bad = [int(step) for step in self.accelerator.gather(self._first_bad).flatten().tolist() if step > 0]
        step = min(bad, default=self.state.global_step)
        what = ("loss", logs["loss"]) if bad else ("gradient", logs.get("grad_norm"))
        samples = self._order().batch((step - 1) * self._samples_a_step, step * self._samples_a_step)
        named = ", ".join(map(str, samples[:NAMED_SAMPLES])) + (", ..." if len(samples) > NAMED_SAMPLES else "")
        good = get_last_checkpoint(str(self.args.output_dir))
        raise UserError(
            f"expected a finite {what[0]}, got {what[1]} at step {step}, which trained on samples {named}; "
            f"{f'the last good checkpoint is {good}' if good else 'there is no checkpoint yet'}; "
            "a lower optim.lr may help"
        )

    @property
    def _samples_a_step(self) -> int:
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _order(self) -> RunOrder:
        turns, length = len(cast(Sized, self.train_dataset)), self.args.max_steps * self._samples_a_step
        return RunOrder(turns, length, self.args.seed, getattr(self.config.data, "repeats", 1))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self._order()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint elsewhere and move it to its place when it is whole; then delete the one before it."""
        folder = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of a process that was killed
        processes.wait()
        self.args.output_dir = str(folder / UNFINISHED)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        processes.wait()
        if self.args.should_save:
            settle(folder / UNFINISHED / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(folder / UNFINISHED / name, folder / name)
            for old in {*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / UNFINISHED} - {folder / name}:
                shutil.rmtree(old)
        processes.wait()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        files = {WEIGHTS: processes.weights(cast(nn.Module, self.model))}
        if self.averaged:
            files[AVERAGED] = self.averaged.weights()
        if self.args.should_save:
            with _written(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for name, state in files.items():
                    safetensors.torch.save_file(state, folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with _whole(folder):
            processes.load_weights(cast(nn.Module, self.model), safetensors.torch.load_file(folder / WEIGHTS))
            if self.averaged:
                self.averaged.load(safetensors.torch.load_file(folder / AVERAGED))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = {
            OPTIMIZER_NAME: processes.optimizer_state(cast(Any, self.optimizer)),
            SCHEDULER_NAME: cast(Any, self.lr_scheduler).state_dict(),
        }
        if self.args.should_save:
            with _written(output_dir):
                for name, state in states.items():
                    torch.save(state, Path(output_dir) / name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _whole(checkpoint):
                optimizer, scheduler = (
                    torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                    for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
                )
                processes.load_optimizer_state(cast(Any, self.optimizer), optimizer)
                cast(Any, self.lr_scheduler).load_state_dict(scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        with _written(output_dir):
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _whole(checkpoint):
                # Each process has a file of its own, and goes without where there were fewer of them.
                if not any(Path(checkpoint).glob("rng_state*.pth")):
                    raise FileNotFoundError("no file of random states")
                super()._load_rng_state(checkpoint)


class _Advance(TrainerCallback):
    """Tells the task where in the run it is."""

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].advance(state.global_step, state.max_steps)


class _Average(TrainerCallback):
    """Keeps the averaged weights."""

    def __init__(self, averaged: AveragedWeights) -> None:
        self.averaged = averaged

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.averaged.update(state.global_step)


class _LogBeforeSave(TrainerCallback):
    """Logs before every checkpoint, so that no part of a mean is lost in it."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save


def _whole(checkpoint: str | Path) -> AbstractContextManager[None]:
    """Of a checkpoint that is read inside, what is missing or damaged is refused."""
    return refused(f"expected a whole checkpoint in {checkpoint} (delete it to start its training again)")


def _written(checkpoint: str | Path) -> AbstractContextManager[None]:
    """Of a checkpoint that is written inside, a disk that does not take it is told."""
    return refused(f"expected a checkpoint that can be written, {checkpoint}")


@contextmanager
def _unchanged(task: DistillationTask) -> Iterator[None]:
    """What is only measured inside leaves the task's buffers and the random numbers as they are."""
    kept = {name: value.clone() for name, value in task.named_buffers()}
    device = next(task.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for name, value in task.named_buffers():
        value.copy_(kept[name])


def _share(batch: int) -> int:
    """Of a batch, what each process takes."""
    share, rest = divmod(batch, processes.count())
    if rest:
        raise UserError(f"expected optim.batch_size to be a multiple of the {processes.count()} processes, got {batch}")
    return share


def _replays(config: RunConfig, device: torch.device) -> bool:
    """Whether forward and backward are one CUDA graph; it must hold no exchange between processes."""
    exchanges = processes.count() > 1 and config.bridge.targets == "standardised"
    return config.graph and device.type == "cuda" and not exchanges


def _arguments(config: RunConfig, folder: Path, aligns: bool) -> TrainingArguments:
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
        per_device_train_batch_size=_share(config.optim.batch_size),
        per_device_eval_batch_size=_share(config.optim.batch_size),
        gradient_accumulation_steps=config.optim.accumulation,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        warmup_steps=math.ceil(config.optim.warmup * config.optim.steps),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.optim.min_lr},
        max_grad_norm=config.optim.clip,
        logging_steps=config.log_every,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        dataloader_num_workers=workers,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # a copy that waits would wait for the step before it, too
        ddp_backend="gloo" if processes.count() > 1 and not on_gpu else None,
        # DDP must not wait for the gradients of bridges whose weight is 0, or of a head that only the alignment trains.
        ddp_find_unused_parameters=not (config.loss.kl or config.loss.ce)
        or (aligns and (config.loss.schedule != "constant" or not config.loss.align)),
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # it would synchronise each step, and hide what it filters
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    # Trainer would take an unset one from the environment, where accelerate's launcher sets it.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    arguments.device  # noqa: B018  settles the number of GPUs, which is then one a process: no DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
