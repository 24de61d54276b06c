"""A run: the data, the teacher, each arm in turn, and the folder in which all of it stays.

The folder holds ``config.yaml``, ``files.json``, by which the data are known again, the teacher where it was trained on
the spot, ``results.json``, ``curves.png``, the lock of the process that trains, and a folder for each arm:
``metrics.jsonl``, TensorBoard events, the last checkpoint, and at the end the student, without the bridges, and
``result.json``. ``vision_run`` and ``language_run`` say what data and models are.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

import cab.processes as processes
from cab.callbacks import METRICS, read_metrics, require_wandb
from cab.config import LanguageConfig, RunConfig, UserError
from cab.data.fingerprint import Held, difference, fingerprint
from cab.distill.task import DistillationTask
from cab.files import locked, write_whole
from cab.recipe import Batch
from cab.refusal import refused
from cab.report import ACCURACY, PERPLEXITY, Measure, Positions, Recall, Row, plot, plot_similarity, table
from cab.settings import CONFIG, of_arm, of_run, to_yaml
from cab.trainer import Outcome, TaskTrainer

RESULT = "result.json"
FILES = "files.json"  # the names and sizes of the data's files, folder by folder
LOCK = ".lock"  # of the process that trains
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # what a disk says that knows none

Say = Callable[[str], None]


def distill(config: RunConfig, folder: Path, say: Say) -> list[Row]:
    """Train every arm of the run and report; goes on where a run in ``folder`` was interrupted.

    Args:
        config: of the run.
        folder: of the run, made here; a folder that holds files must hold this very run.
        say: takes each line of the report; where several processes share the run, in the first of them.

    Returns:
        The rows of the table that was reported.

    Raises:
        UserError: something in the configuration or in the data cannot be used, the data are not those with which the
            run began, another process trains in the folder, or has begun a run there in the meantime.
    """
    with ExitStack() as held:
        begun = processes.first((folder / CONFIG).is_file)
        if begun:
            processes.first(lambda: held.enter_context(_alone(folder)))
        run = _run(config, folder)
        run.check()
        processes.wait()  # until none of them looks for what the first is about to write
        if not begun:
            processes.first(lambda: held.enter_context(_alone(folder, new=True)))
        return run.distill(say)


def taken(folder: Path) -> UserError:
    """The refusal of a folder that a new run was to have."""
    how = f"; --resume {folder} goes on with it" if (folder / CONFIG).is_file() else ""
    return UserError(f"expected a new or empty folder for --out, got {folder}{how}")


@contextmanager
def _alone(folder: Path, new: bool = False) -> Iterator[None]:
    """Train in the folder of a run, a ``new`` one or one that has begun, and let no other process do so."""
    with refused(f"expected a folder for the run that can be made, {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise UserError(f"expected a folder in which no other process trains, got {folder}") from None
        except ModuleNotFoundError:  # no locks here, which is no reason not to train
            pass
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise UserError(f"expected a file that can be written, {lock}, got: {error}") from error
        if new and (folder / CONFIG).is_file():  # another run has begun, and perhaps ended, since this one looked
            raise taken(folder)
        yield


def evaluate(folder: Path, data: str | None = None, length: int | None = None) -> tuple[Measure, list[Row]]:
    """Measure the students of a run on the test split, and return a row for each.

    Args:
        folder: of the run.
        data: a folder of images, or text, in the place of the run's own.
        length: takes the place of ``data.length``: how a student fares beyond the length that it learnt.

    Raises:
        UserError: not the folder of a run, or no arm of it has ended; a length for a run on images.
    """
    run = _run(_with_data(folder, data, length), folder)
    return run.measure, run.evaluate()


def report(folders: Sequence[Path], file: Path) -> tuple[Measure, list[Row]]:
    """Draw the curves of all arms of some runs into one figure, and return a row for each that has ended.

    Args:
        folders: of the runs, on images all or on text all.
        file: where the figure goes.

    Raises:
        UserError: not the folder of a run, runs of different kinds, or nothing trained yet.
    """
    configs = [of_run(folder) for folder in folders]
    if len({type(config) for config in configs}) > 1:
        raise UserError("expected runs on images, or runs on text, got both")
    measure = PERPLEXITY if isinstance(configs[0], LanguageConfig) else ACCURACY
    metrics, rows = {}, []
    for folder, run, config in zip(folders, _names(folders), configs, strict=True):
        prefix = f"{run}/" if len(folders) > 1 else ""
        for name in ("teacher", *config.arms):
            entries = read_metrics(folder / name / METRICS)
            if entries and name != "teacher":
                metrics[prefix + name] = entries
            if (folder / name / RESULT).is_file():
                row = _read_row(folder / name)
                rows.append(row._replace(name=prefix + name))
    if not metrics:
        raise UserError(f"expected a run with metrics, got none in {', '.join(map(str, folders))}")
    levels = {row.score for row in rows if row.name.rpartition("/")[2] == "teacher"}
    plot(measure, metrics, levels.pop() if len(levels) == 1 else None, ", ".join(_names(folders)), file)
    return measure, rows


def _read_row(folder: Path) -> Row:
    """What an ended training came to."""
    with refused(f"expected a result as a run writes it in {folder / RESULT}"):
        return Row(**json.loads((folder / RESULT).read_text()))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    count = 1
    while len({part[-count:] for part in parts}) < len(set(parts)):
        count += 1
    return ["/".join(part[-count:]) for part in parts]


def compare_attention(folder: Path, file: Path, data: str | None = None, images: int = 256) -> None:
    """Draw how alike the attention of teacher and students are, layer by layer, on the first images of the test split.

    Raises:
        UserError: not the folder of a run on images, or no arm of it has ended.
    """
    run = _run(_with_data(folder, data), folder)
    plot_similarity(run.attention_similarity(images), file)


def measure_recall(folder: Path, data: str | None = None, length: int | None = None) -> Recall:
    """Measure how well teacher and students recall pairs from their context, and keep it as ``mqar.json``.

    Args:
        folder: of the run.
        data: as for :func:`evaluate`; its held-out part says which tokens are known.
        length: of the longest sequence, in place of ``data.length``.

    Raises:
        UserError: not the folder of a run on text, or a length or a text that is too short.
    """
    found = _run(_with_data(folder, data, length), folder).recall()
    write_whole(folder / "mqar.json", json.dumps(found._asdict()) + "\n")
    return found


def measure_positions(folder: Path, data: str | None = None, length: int | None = None) -> Positions:
    """Measure perplexity up to 8 times the length that was learnt, and keep it as ``positions.json``.

    Args:
        folder: of the run.
        data: as for :func:`evaluate`.
        length: that counts as learnt, in place of ``data.length``.

    Raises:
        UserError: not the folder of a run on text, or less held-out text than twice the length.
    """
    found = _run(_with_data(folder, data, length), folder).positions()
    write_whole(folder / "positions.json", json.dumps(found._asdict()) + "\n")
    return found


def _with_data(folder: Path, data: str | None, length: int | None = None) -> RunConfig:
    config: Any = of_run(folder)
    on_text = isinstance(config, LanguageConfig)
    if length is not None and not on_text:
        raise UserError(f"expected a run on text for --length, got one on images in {folder}")
    changes: dict[str, Any] = {} if length is None else {"length": length}
    if data is not None:  # an index file lists images of the run's own data
        changes |= {"name": "files", "path": data} if on_text else {"name": "folder", "root": data, "index": None}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def _run(config: RunConfig, folder: Path) -> Run:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if isinstance(config, LanguageConfig):
        from cab.language_run import LanguageRun

        return LanguageRun(config, folder)
    from cab.vision_run import VisionRun

    return VisionRun(config, folder)


def needs_teacher(config: RunConfig) -> bool:
    """Whether the loss of this configuration has a term that a teacher provides."""
    return bool(config.loss.kl) or config.bridge.enabled


class Run(ABC):
    """One run in its folder, of whatever kind.

    Args:
        config: of the run.
        folder: of the run.

    Attributes:
        measure: by which students are compared.
        arms: by name, each with the values that it fixes.
        full: the whole training split, for a teacher that is trained on the spot.
        train: the student's part of it.
        test: what is evaluated.
        mix: makes the batch that is trained on from one that was loaded; None where that is the same.
    """

    measure: ClassVar[Measure]
    full: Dataset[Any]
    train: Dataset[Any]
    test: Dataset[Any]
    mix: Callable[[Batch], Batch] | None = None

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.arms: dict[str, Any] = {name: of_arm(config, name) for name in config.arms}
        self.writes = processes.rank() == 0
        self._held: dict[str, Held] = {}

    @property
    def device(self) -> str:
        """Where a model is measured without a trainer."""
        return "cuda" if self.config.device != "cpu" and torch.cuda.is_available() else "cpu"

    @abstractmethod
    def files(self) -> tuple[str, Iterable[str]]:
        """The folder or the file that the data are, and the files in it; none of data that come with a library."""

    @abstractmethod
    def describe(self) -> str:
        """A line about the data."""

    def save_data(self) -> None:
        """Write to the folder what must be kept of the data."""
        if self._held:
            write_whole(self.folder / FILES, json.dumps(self._held, indent=1) + "\n")

    @abstractmethod
    def teacher_model(self, trained: bool = False) -> nn.Module:
        """The model that teaches, ``trained`` on the spot if it has been, else as the configuration says."""

    @abstractmethod
    def save_teacher(self, model: nn.Module) -> None:
        """Keep a teacher that was trained on the spot."""

    @abstractmethod
    def distillation_task(self, arm: Any, teacher: nn.Module | None) -> DistillationTask:
        """Student, teacher and bridges of one arm; ``teacher`` is None where :func:`needs_teacher` says so."""

    @abstractmethod
    def supervised_task(self, model: nn.Module) -> DistillationTask:
        """A task that trains or measures a model on the data alone."""

    @abstractmethod
    def save_student(self, task: DistillationTask, folder: Path) -> None:
        """Keep the student of an arm, without the bridges."""

    @abstractmethod
    def load_student(self, arm: Any, folder: Path) -> nn.Module | None:
        """What :meth:`save_student` has kept, None where the arm has not ended."""

    def attention_similarity(self, images: int) -> dict[str, list[float]]:
        """Of every arm that has ended, the similarity of each layer's attention with its teacher layer's."""
        raise UserError(f"expected a run on images for the attention's similarity, got {self.folder}")

    def recall(self) -> Recall:
        """How well the teacher, and every student whose arm has ended, recall pairs from their context."""
        raise UserError(f"expected a run on text for --mqar, got one on images in {self.folder}")

    def positions(self) -> Positions:
        """Of the teacher, and every student whose arm has ended, the perplexity against the position."""
        raise UserError(f"expected a run on text for --positions, got one on images in {self.folder}")

    def distill(self, say: Say) -> list[Row]:
        if self.writes:
            write_whole(self.folder / CONFIG, to_yaml(self.config))
            self.save_data()
            say(self.describe())
        rows = []
        if any(map(needs_teacher, self.arms.values())):
            rows.append(self._teacher())
        for name, arm in self.arms.items():
            rows.append(self._arm(name, arm))
        if self.writes:
            self._report(rows, say)
        return rows

    def evaluate(self) -> list[Row]:
        rows = []
        for name, arm in self.arms.items():
            student = self.load_student(arm, self.folder / name)
            if student is not None:
                rows.append(self._measured(name, student, self.folder / name))
        if not rows:
            raise UserError(
                f"expected a trained student in {self.folder}, got none; cab distill --resume {self.folder} goes on"
            )
        return rows

    def check(self) -> None:
        """Say what does not fit before anything is trained: changed data, or an arm, each built and shown a sample."""
        processes.first(self._check_files)
        if self.config.wandb:
            require_wandb()
        sample = default_collate([self.train[0]])
        for arm in self.arms.values():
            teacher = self.teacher_model() if needs_teacher(arm) else None
            task = self.distillation_task(arm, teacher).eval()
            with torch.no_grad():
                task(**sample)

    def _check_files(self) -> None:
        """Refuse data whose files have changed since the run began."""
        root, files = self.files()
        self._held = fingerprint(root, files)
        if not (self.folder / FILES).is_file():  # it begins here
            return
        with refused(f"expected the data's files as a run writes them in {self.folder / FILES}"):
            changed = difference(root, json.loads((self.folder / FILES).read_text()), self._held)
        if changed is not None:
            raise UserError(f"expected the data with which {self.folder} began, {changed}")

    def _teacher(self) -> Row:
        """The teacher's row; it is trained on the full training split first where the run asks for that."""
        config, folder = self.config, self.folder / "teacher"
        if (folder / RESULT).is_file():
            return _read_row(folder)
        model = self.teacher_model()
        if config.teacher.steps:
            optim = dataclasses.replace(config.optim, steps=config.teacher.steps, lr=config.teacher.lr)
            plan = dataclasses.replace(config, optim=optim)
            task = self.supervised_task(model)
            trainer = TaskTrainer(task, plan, folder, self.full, self.test, "teacher", self.mix)
            outcome = trainer.run(resume=True)
            processes.make_whole(task)
            if self.writes:
                self.save_teacher(model)
            row = self._row("teacher", outcome)
        else:
            row = self._measured("teacher", model, folder)
        self._keep(row, folder)
        return row

    def _arm(self, name: str, config: RunConfig) -> Row:
        folder = self.folder / name
        if (folder / RESULT).is_file():
            return _read_row(folder)
        processes.wait()  # until the first has written the teacher
        teacher = self.teacher_model(bool(config.teacher.steps)) if needs_teacher(config) else None
        task = self.distillation_task(config, teacher)
        outcome = TaskTrainer(task, config, folder, self.train, self.test, name, self.mix).run(resume=True)
        processes.make_whole(task)
        if self.writes:
            self.save_student(task, folder)
        row = self._row(name, outcome)
        self._keep(row, folder)
        return row

    def _keep(self, row: Row, folder: Path) -> None:
        """Write down what an ended training came to: from here on it is not done again."""
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / RESULT, json.dumps(row._asdict()) + "\n")

    def _row(self, name: str, outcome: Outcome) -> Row:
        test = outcome.test
        figures = test[self.measure.name], test.get("align"), outcome.seconds, outcome.samples_per_second
        return Row(name, *figures, test.get("top5"))

    def _measured(self, name: str, model: nn.Module, folder: Path) -> Row:
        quiet = dataclasses.replace(self.config, wandb=False)  # a measurement is no training to report
        trainer = TaskTrainer(self.supervised_task(model), quiet, folder, self.train, self.test)
        test = trainer.evaluate()
        return Row(name, test[f"eval_{self.measure.name}"], top5=test.get("eval_top5"))

    def _report(self, rows: list[Row], say: Say) -> None:
        config, scores = self.config, {row.name: row.score for row in rows}
        results = {
            "measure": self.measure.name,
            "rows": [row._asdict() for row in rows],
            "environment": _environment(),
        }
        write_whole(self.folder / "results.json", json.dumps(results, indent=1) + "\n")
        metrics = {name: read_metrics(self.folder / name / METRICS) for name in config.arms}
        title = f"{config.preset}: {config.student.name} taught by {config.teacher.name}"
        plot(self.measure, metrics, scores.get("teacher"), title, self.folder / "curves.png")
        say("")
        say(table(self.measure, rows))
        say("")
        say(f"learning curves: {self.folder / 'curves.png'}")
        say(f"configuration, metrics, events and weights: {self.folder}")


def _environment() -> dict[str, str | int]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"python": platform.python_version(), **versions, "device": device, "threads": torch.get_num_threads()}
