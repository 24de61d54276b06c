"""A captured step must be the step that it was captured from."""

import pytest
import timm
import torch

import cab.students.vim  # noqa: F401  registers the students with timm
from cab.bridge import Bridges
from cab.distill.schedule import AlignmentSchedule
from cab.distill.vision import VisionTask
from cab.graphed import GraphedStep
from cab.teachers.timm import TimmTeacher

pytestmark = pytest.mark.gpu


def make_task(targets: str = "raw", drop_path: float = 0.0) -> VisionTask:
    torch.manual_seed(0)
    student = timm.create_model("vim_micro_patch2_8", depth=3, drop_path_rate=drop_path)
    sizes = {"img_size": 8, "patch_size": 2, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
    teacher = TimmTeacher(timm.create_model("deit_tiny_patch16_224", **sizes))
    bridges = Bridges(3, 2, student.d_state, 64, teacher.key_width, teacher.query_width)
    schedule = AlignmentSchedule("until", weight=0.5, until=0.5)
    return VisionTask(student, teacher, bridges, schedule=schedule, targets=targets).cuda().train()


def batch(seed: int, size: int = 8) -> torch.Tensor:
    return torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("targets", ["raw", "standardised"])
def test_gradients_are_those_of_the_eager_step(targets: str, dtype: torch.dtype) -> None:
    eager, task = make_task(targets), make_task(targets)
    step = GraphedStep(task, dtype)
    for seed in range(3):
        for each in (eager, task):
            each.zero_grad()
            each.advance(seed, 100)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            expected = eager(batch(seed))
        expected["loss"].backward()
        outputs = step(images=batch(seed))
        assert torch.equal(outputs["loss"], expected["loss"])
        for (name, parameter), other in zip(eager.named_parameters(), task.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad), name
    for (name, buffer), other in zip(eager.named_buffers(), task.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_passes_accumulate() -> None:
    task = make_task()
    step = GraphedStep(task, torch.float32, passes=2)
    step(images=batch(0))
    first = [parameter.grad.clone() for parameter in task.parameters()]
    step(images=batch(1))
    both = [parameter.grad.clone() for parameter in task.parameters()]
    task.zero_grad()
    step(images=batch(1))
    for one, total, parameter in zip(first, both, task.parameters(), strict=True):
        torch.testing.assert_close(total, one + parameter.grad)


def test_weight_of_the_alignment_is_followed_and_its_end_too() -> None:
    task = make_task()
    step = GraphedStep(task, torch.float32)
    losses = []
    for weight in (1.0, 0.5, 0.0):
        task.alignment_weight = weight
        task._alignment_weight.fill_(weight)
        task.zero_grad()
        losses.append({name: value.item() for name, value in step(images=batch(0)).items() if value.dim() == 0})
    assert losses[0]["loss"] - losses[1]["loss"] == pytest.approx(0.5 * losses[0]["align"], rel=1e-4)
    assert "align" not in losses[2]
    assert losses[2]["loss"] == pytest.approx(losses[2]["kl"])


def test_random_numbers_differ_from_replay_to_replay() -> None:
    task = make_task(drop_path=0.9)
    step = GraphedStep(task, torch.float32)
    losses = {step(images=batch(0))["loss"].item() for _ in range(8)}
    assert len(losses) > 1


def test_another_batch_size_is_captured_by_itself() -> None:
    task = make_task()
    step = GraphedStep(task, torch.float32)
    small = step(images=batch(0, size=2))["kl"].item()
    step(images=batch(1, size=4))
    assert step(images=batch(0, size=2))["kl"].item() == small


def test_a_further_capture_needs_no_further_workspace_of_cublas() -> None:
    step = GraphedStep(make_task(), torch.bfloat16)
    step(images=batch(0))
    before = torch.cuda.memory_allocated()
    step(images=batch(0, 5))
    assert torch.cuda.memory_allocated() - before < 2**23  # where a workspace is larger: 32 MiB on a Hopper GPU
