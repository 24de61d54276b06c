"""The command line, the only reader of arguments and environment. Torch loads when a command needs it, not before."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from cab.config import UserError
from cab.presets import ARMS, PRESETS
from cab.report import FIGURES, positions_table, recall_table, table
from cab.settings import CONFIG, of_run, resolve, to_yaml

# What the extras "vision", "language" and "deepspeed" bring; a missing one is the user's to install, any other import
# error is ours.
_VISION = {"sklearn", "timm", "torchvision"}
_LANGUAGE = {"datasets", "pyarrow"}
_DEEPSPEED = {"deepspeed"}
_BOTH = {"accelerate", "matplotlib", "safetensors", "tensorboard", "tqdm", "transformers", "yaml"}

ZERO3 = "launch/zero3.yaml"
# What a launcher sets when it asks for sharded models: by which of our configurations, and what else that one has.
_SHARDING = {
    "ACCELERATE_USE_FSDP": ("launch/fsdp2.yaml", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}),
    "ACCELERATE_USE_DEEPSPEED": (
        ZERO3,
        {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for what the user can put right.

    Raises:
        SystemExit: the arguments are refused, with 2, or the command is interrupted, with 130.
    """
    options = _parser().parse_args(arguments)
    # Threads that spin while they wait starve one another once anything else uses the cores: 14 times slower, measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Unset, it makes tokenizers warn when processes that load data are started, which encode nothing.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        options.command(options)
    except (UserError, ModuleNotFoundError, OSError) as error:
        if options.traceback:
            traceback.print_exc()
        print(f"{options.program}: {_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print("\n" + "; ".join(["interrupted", *interruption.args]), file=sys.stderr)
        raise SystemExit(130) from None
    return 0


def _line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extras = {"vision": _VISION, "language": _LANGUAGE, "deepspeed": _DEEPSPEED, "vision] or [language": _BOTH}
        extra = next((name for name, packages in extras.items() if package in packages), None)
        if extra is None:
            raise error
        return f"expected the packages of cab-kernels[{extra}], got no module {error.name!r}"
    if isinstance(error, OSError):
        return f"expected files that can be read and written, got: {' '.join(str(error).split())}"
    # A process that loads images hands its error over with its traceback around the message.
    return " ".join(str(error).rpartition("UserError: ")[2].split())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cab",
        description="Distil a Transformer into a Mamba student: small bridges align the student's B and C with the "
        "teacher's K and Q, layer by layer (arXiv:2510.19266).",
        epilog="'cab distill' with nothing else is a complete example that takes minutes on a CPU.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_distill(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_export(commands)
    _add_presets(commands)
    _add_subset(commands)
    for name, command in commands.choices.items():
        command.add_argument("--traceback", action="store_true", help="on an error, print Python's traceback too")
        command.set_defaults(program=f"cab {name}")
    return parser


def _add_distill(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "distill",
        help="train the arms of a run and compare them",
        description="Train one student for each arm, with the same teacher, data, order of data and steps, and end "
        "with a table and learning curves. The values come from a preset, then --config, then the flags and --set.",
        epilog="examples: cab distill | cab distill --preset imagenet-vim-tiny --teacher deit_tiny_patch16_224 --data "
        "/data/imagenet --fraction 0.01 | cab distill --set arms=cab,ce --set optim.steps=600 | torchrun "
        "--nproc-per-node 8 -m cab distill --preset imagenet-vim-tiny --data /data/imagenet",
    )
    parser.add_argument("--preset", metavar="NAME", help="where the values start from; default: digits")
    parser.add_argument("--teacher", metavar="NAME", help="the same as --set teacher.name=NAME")
    parser.add_argument("--student", metavar="NAME", help="the same as --set student.name=NAME")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="your images (a folder with train/CLASS/*.jpg and val/CLASS/*.jpg) or text; default preset: vision",
    )
    parser.add_argument("--fraction", metavar="F", help="the same as --set data.fraction=F")
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with values; see --print-config")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one value, such as optim.lr=1e-3; repeatable"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the run; default: runs/PRESET-TIME")
    parser.add_argument("--resume", metavar="DIR", type=Path, help="go on with an interrupted run; stands alone")
    parser.add_argument(
        "--print-config", action="store_true", help="print every value with its meaning as YAML, and stop"
    )
    parser.set_defaults(command=_distill)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure the students of a run",
        description="Measure the students of a run on its test split. A student needs neither teacher nor bridges.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--data", metavar="DIR", help="other images (a folder with train/ and val/) or another text")
    parser.add_argument(
        "--attention",
        metavar="FILE",
        type=Path,
        help="also draw the similarity of teacher's and students' attention: .png, .pdf or .svg",
    )
    parser.add_argument("--length", metavar="N", type=int, help="of text: windows of N tokens, also longer than learnt")
    parser.add_argument(
        "--mqar",
        action="store_true",
        help="of text: also measure how well teacher and students recall pairs of tokens from their context",
    )
    parser.add_argument(
        "--positions",
        action="store_true",
        help="of text: also measure perplexity against the position, up to 8 times the length that was learnt",
    )
    parser.set_defaults(command=_eval)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="compare runs: a table and curves",
        description="Print a table of all arms of some runs, as far as they have come, and draw their learning curves.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.png"), help=".png, .pdf or .svg; default: report.png"
    )
    parser.set_defaults(command=_report)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write a student on its own",
        description="Write the student of an arm, without bridges or optimiser, into a file that timm loads, and print "
        "the line of Python that loads it (after 'import cab.students.vim').",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("file", metavar="FILE", type=Path, help=".pth for timm, .safetensors for safetensors")
    parser.add_argument("--arm", metavar="NAME", help="which arm; needed where the run has several")
    parser.add_argument("--to", choices=("timm", "safetensors"), default="safetensors", help="default: safetensors")
    parser.set_defaults(command=_export)


def _add_presets(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "presets", help="list presets and arms", description="List the presets and the arms, with what they fix."
    )
    parser.set_defaults(command=_presets)


def _add_subset(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "subset",
        help="choose a class-balanced part of a data set",
        description="Choose the same fraction of every class of DATA/train, at least one image each, and write their "
        "names to an index file for data.index. No image is copied.",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="folder that holds train/CLASS/*.jpg")
    parser.add_argument("--fraction", metavar="F", type=float, required=True, help="above 0, at most 1")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the index file, JSON")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the choice; default: 0")
    parser.set_defaults(command=_subset)


def _settings(options: argparse.Namespace) -> list[str]:
    """The flags as settings, before those of --set, which win."""
    flags = {"teacher.name": options.teacher, "student.name": options.student, "data.fraction": options.fraction}
    return [f"{key}={value}" for key, value in flags.items() if value is not None] + options.set


def _distill(options: argparse.Namespace) -> None:
    settings = _settings(options)
    if options.resume and (options.preset or options.config or settings or options.data or options.out):
        raise UserError("expected --resume alone, since the run's own configuration holds; got other options beside it")
    if options.resume:
        config, folder = of_run(options.resume), options.resume
    else:
        config = resolve(options.preset, options.config, settings, options.data)
        folder = options.out or Path("runs") / f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"
    if options.print_config:
        print(to_yaml(config), end="")
        return
    if _joined(config.device):
        config = dataclasses.replace(config, shard=True)
    from cab import processes
    from cab.run import distill, taken

    def place() -> Path:
        if not options.resume and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise taken(folder)
        return folder

    try:
        folder = processes.first(place)
        distill(config, folder, print)
        processes.leave()
    except (UserError, OSError):
        processes.leave(together=False)
        raise
    except KeyboardInterrupt:
        if (folder / CONFIG).is_file():
            raise KeyboardInterrupt(f"cab distill --resume {folder} goes on") from None
        raise


def _joined(device: str) -> bool:
    """Join the other processes where a launcher has started several, and say whether it wants the models sharded."""
    shards = ""
    for switch, (file, wanted) in _SHARDING.items():
        if _is_set(switch):
            shards = file
            for name, value in wanted.items():
                if os.environ.get(name, value) != value:
                    raise UserError(f"expected {name}={value}, as {file} has it, got {os.environ[name]}")
        os.environ.pop(switch, None)  # the models come sharded: accelerate has nothing to wrap
    count = _of_launcher("WORLD_SIZE", "1")
    if count > 1:
        local_rank = _of_launcher("LOCAL_RANK")
        import torch

        from cab import processes
        from cab.refusal import refused

        cpu = device == "cpu" or not torch.cuda.is_available()
        by_deepspeed = shards == ZERO3
        if by_deepspeed:
            os.environ["DS_ACCELERATOR"] = "cpu" if cpu else "cuda"
        with refused(f"expected what a launcher sets for {count} processes, as torchrun does"):
            processes.start(local_rank, cpu, by_deepspeed)
    return bool(shards)


def _of_launcher(name: str, default: str = "none") -> int:
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise UserError(f"expected {name}, which a launcher sets, to be a whole number, got {value}")
    return int(value)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _writable(file: Path) -> None:
    """Refuse a file that cannot be made or replaced, before anything is computed for it."""
    if not file.parent.is_dir():
        raise UserError(f"expected a file in a folder that exists, got {file}")
    if file.is_dir():
        raise UserError(f"expected a file, got the folder {file}")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"expected a file in a folder that can be written, got {file}: {error.strerror}") from error


def _drawable(file: Path) -> None:
    """Refuse the name of a figure for which matplotlib has no form, or would write another file."""
    if file.suffix.lower() not in FIGURES:
        raise UserError(f"expected a figure's name to end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}, got {file}")
    _writable(file)


def _eval(options: argparse.Namespace) -> None:
    if options.attention:
        _drawable(options.attention)
    from cab.run import compare_attention, evaluate, measure_positions, measure_recall

    print(table(*evaluate(options.run, options.data, options.length)))
    if options.attention:
        compare_attention(options.run, options.attention, options.data)
        print(f"similarity of the attention: {options.attention}")
    if options.mqar:
        print(f"\n{recall_table(measure_recall(options.run, options.data, options.length))}")
    if options.positions:
        print(f"\n{positions_table(measure_positions(options.run, options.data, options.length))}")


def _report(options: argparse.Namespace) -> None:
    _drawable(options.out)
    from cab.run import report

    print(table(*report(options.runs, options.out)))
    print(f"learning curves: {options.out}")


def _export(options: argparse.Namespace) -> None:
    from cab.export import export

    _writable(options.file)
    print(export(options.run, options.arm, options.to, options.file))


def _presets(options: argparse.Namespace) -> None:
    width = max(map(len, [*PRESETS, *ARMS])) + 2
    for title, variants in (("presets, for --preset", PRESETS), ("arms, for --set arms=NAME,NAME", ARMS)):
        print(f"{title}:")
        for name, variant in variants.items():
            print(f"  {name:<{width}}{variant.help}")
    print("\nevery value of a preset, with its meaning: cab distill --preset NAME --data DIR --print-config")


def _subset(options: argparse.Namespace) -> None:
    from cab.data.folder import scan
    from cab.data.subset import class_balanced, write_index

    _writable(options.out)
    folder = scan(options.data / "train")
    chosen = class_balanced(folder.labels, folder.classes, options.fraction, options.seed)
    write_index(options.out, folder.names, folder.labels, folder.classes, chosen)
    print(f"{options.out}: {len(chosen)} of {len(folder.names)} images, {len(folder.classes)} classes")


def _version() -> str:
    try:
        return importlib.metadata.version("cab-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
