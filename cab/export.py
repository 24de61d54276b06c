"""A student on its own, in a file that timm loads."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from cab.build import student_options
from cab.config import UserError, VisionConfig, known_name
from cab.files import save_whole
from cab.refusal import refused
from cab.settings import of_arm, of_run
from cab.vision_run import STUDENT


def export(folder: Path, arm: str | None, kind: str, file: Path) -> str:
    """Write the student of an arm, and return the line of Python that loads it.

    Args:
        folder: of the run.
        arm: which one; None where the run has one.
        kind: "timm", a checkpoint of torch's, or "safetensors", with the model's name and options as metadata.
        file: where it goes.

    Raises:
        UserError: not the folder of a run on images, no such arm, one that has not ended, or a file that cannot be
            read or written.
    """
    config = of_run(folder)
    if not isinstance(config, VisionConfig):
        raise UserError(f"expected a run on images, got {folder}; the students of language runs are transformers' own")
    if arm is None and len(config.arms) > 1:
        raise UserError(f"expected --arm to be one of {', '.join(config.arms)}, got none")
    arm = arm or config.arms[0]
    known_name(arm, config.arms, "--arm")
    suffix = {"timm": ".pth", "safetensors": ".safetensors"}[kind]
    if file.suffix != suffix:
        raise UserError(f"expected a file {file.stem}{suffix} for --to {kind}, got {file.name}")
    source = folder / arm / STUDENT
    if not source.is_file():
        raise UserError(
            f"expected a trained student in {source.parent}, got none; cab distill --resume {folder} goes on"
        )
    with refused(f"expected a whole student in {source}"):
        state = safetensors.torch.load_file(source)
    student = of_arm(config, arm).student
    options = {**student_options(of_arm(config, arm)), "num_classes": len(state["head.weight"])}
    with refused(f"expected a file that can be written, {file}"):
        if kind == "timm":
            save_whole(file, lambda at: torch.save({"arch": student.name, "state_dict": state}, at))
        else:
            metadata = {"architecture": student.name, "options": json.dumps(options)}
            save_whole(file, lambda at: safetensors.torch.save_file(state, at, metadata))
    written = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"timm.create_model({student.name!r}{written}, checkpoint_path={str(file)!r})"
