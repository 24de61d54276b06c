"""Settings of runs on images that take seconds."""

from pathlib import Path

TINY = [
    "device=cpu",
    "student.depth=1",
    "student.embed_dim=16",
    "student.d_state=4",
    "teacher.depth=1",
    "teacher.embed_dim=16",
    "teacher.num_heads=2",
    "teacher.steps=2",
    "bridge.hidden=8",
    "optim.steps=2",
    "optim.batch_size=64",
]


def distill(*settings: str) -> list[str]:
    return ["distill", *(word for setting in (*TINY, *settings) for word in ("--set", setting))]


def of_folder(images: Path, *settings: str) -> list[str]:
    vision = ["data.name=folder", f"data.root={images}", "data.image_size=16", "optim.batch_size=4", "arms=cab"]
    return [*distill(*vision, *settings), "--out", str(images / "run")]
