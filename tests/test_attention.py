"""The attention-matrix control: the formula written out against the rows, and its way into the student."""

import pytest
import timm
import torch
from torch import Tensor

import cab.distill.attention
import cab.students.vim  # noqa: F401  registers the students with timm
from cab.bridge import Bridges
from cab.distill.attention import AttentionAlignment
from cab.distill.task import LossWeights
from cab.distill.vision import VisionTask
from cab.students.student import Projections
from cab.teachers.timm import TimmTeacher

STUDENT = {"depth": 4, "embed_dim": 16, "d_state": 4, "num_classes": 5}
TEACHER = {"img_size": 8, "patch_size": 2, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
OWN, THEIRS = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([2, 3, 1, 4, 6])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(directions: list[Projections], query: Tensor, key: Tensor) -> Tensor:
    """The formula with whole matrices."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    teacher = torch.einsum("bhtd,bhsd->bhts", query, key).div(query.shape[-1] ** 0.5).softmax(-1).mean(1)
    scores = [torch.einsum("btn,bsn->bts", way.C, way.B) for way in directions]
    student = scores[0].tril() + (scores[1].triu() if len(scores) > 1 else 0)
    return (student[:, OWN][:, :, OWN] - teacher[:, THEIRS][:, :, THEIRS]).square().sum((1, 2)).mean() / len(OWN)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time: five tokens take three turns, the last of one row."""
    monkeypatch.setattr(cab.distill.attention, "ROWS", 2)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["own keys", "grouped query"])
def test_rows_are_the_formula_and_its_gradient(directions: int, key_heads: int) -> None:
    query, key = random(2, 4, 7, 6, seed=0), random(2, key_heads, 7, 6, seed=1)
    projections = [
        [Projections(*random(2, 2, 6, 3, seed=10 * layer + way).requires_grad_()) for way in range(directions)]
        for layer in range(3)
    ]
    leaves = [source for layer in projections for way in layer for source in way]
    alignment = AttentionAlignment(projections, [0, 0, 1], OWN, THEIRS)
    alignment(0, query, key)
    alignment(1, query + 1, key)
    expected = torch.stack([whole(projections[layer], query + (layer == 2), key) for layer in range(3)])
    torch.testing.assert_close(alignment.layers(), expected)
    torch.testing.assert_close(alignment.loss(), expected.mean())
    uneven = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((alignment.layers() * uneven).sum(), leaves),
        torch.autograd.grad((expected * uneven).sum(), leaves),
    )


def make_task(**options: object) -> VisionTask:
    torch.manual_seed(0)
    student = timm.create_model("vim_micro_patch2_8", a_init="zero", **STUDENT)
    teacher = TimmTeacher(timm.create_model("deit_tiny_distilled_patch16_224", **TEACHER))
    return VisionTask(student, teacher, **{"attention": True, **options})


def test_the_control_alone_reaches_the_student() -> None:
    task = make_task(weights=LossWeights(kd=0.0))
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"student"}
    result = task(torch.rand(3, 3, 8, 8))
    assert result["align_layers"].shape == (4,)
    result["loss"].backward()
    for layer in task.student.layers:
        mixer = layer.mixer
        for x_proj in (mixer.x_proj, mixer.x_proj_b):
            _, *of_b_and_c = x_proj.weight.grad.split([mixer.dt_rank, mixer.d_state, mixer.d_state])
            assert all((part.abs().sum(dim=1) > 0).all() for part in of_b_and_c)
        assert (mixer.in_proj.weight.grad.chunk(2)[0].abs() > 0).any()


def test_training_on_it_brings_the_matrices_together() -> None:
    task = make_task(weights=LossWeights(kd=0.0))
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=3e-3)
    images, losses = torch.rand(8, 3, 8, 8), []
    for _ in range(20):
        loss = task(images)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_no_whole_matrix_is_kept_for_backward() -> None:
    """What is saved is of the size of B and C, however many heads and tokens the teacher has."""
    sizes = []
    query, key = torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 6)
    projections = [[Projections(torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True))]]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        alignment = AttentionAlignment(projections, [0], OWN, THEIRS)
        alignment(0, query, key)
    assert max(sizes) == 2 * 5 * 3


def test_attention_and_bridges_together() -> None:
    bridges = Bridges(4, 2, 4, 8, 24, 24)
    with pytest.raises(
        ValueError, match="expected a teacher and no bridges for the attention's alignment, got bridges"
    ):
        make_task(bridges=bridges)
    with pytest.raises(ValueError, match="alignment, got no teacher"):
        VisionTask(make_task().student, attention=True, weights=LossWeights(kd=0.0, ce=1.0))
