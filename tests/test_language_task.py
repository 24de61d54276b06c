"""The first tests of every student: the alignment reaches it, and the bridges are trained."""

import pytest
import torch
from language_models import VOCABULARY, checkpoint_blocks, make
from torch import Tensor, nn

from cab.bridge import Bridges
from cab.distill.language import LanguageTask
from cab.distill.schedule import AlignmentSchedule
from cab.distill.task import LossWeights
from cab.distill.token_losses import Divergence
from cab.students.language import LanguageStudent
from cab.teachers.huggingface import HuggingFaceTeacher

STUDENTS = ("mamba", "falcon_mamba", "mamba2", "bamba", "discrete_mamba2")


def make_task(
    student: str = "mamba", teacher: str = "llama", learned: int | None = None, **options: object
) -> LanguageTask:
    """Four layers learn from two; Q of the Llama has four heads, K two. ``learned`` are a learned map's layers."""
    student = LanguageStudent(make(student, num_hidden_layers=4))
    teacher = HuggingFaceTeacher(make(teacher, seed=1))
    torch.manual_seed(2)
    widths = (teacher.key_width, teacher.query_width)
    bridges = Bridges(student.mamba_layers, 1, student.d_state, 24, *widths, teacher_layers=learned)
    return LanguageTask(student, teacher, bridges, **options).train()


def bridged_mse(stack: nn.Module, index: int, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The loss of one bridge, written out."""
    inner = nn.functional.silu(source @ stack.w1[index].T + stack.b1[index])
    residual = inner @ stack.w2[index].T + stack.b2[index] - target.transpose(1, 2).flatten(2)
    return residual[mask].square().mean()


def batch() -> dict[str, Tensor]:
    """Two sequences, the second with three tokens of padding at its end."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("teacher", ["llama", "gpt2", "falcon", "gptj"])
@pytest.mark.parametrize("student", STUDENTS)
def test_alignment_alone_reaches_student_and_bridges(student: str, teacher: str, checkpointing: bool) -> None:
    """The published code fails here: its bridges are in no optimiser."""
    task = make_task(student, teacher, weights=LossWeights(kd=0.0))
    task.student.start_at_linear_attention()
    if checkpointing:
        checkpoint_blocks(task.student.model)
    task(**batch())["loss"].backward()
    n = task.student.d_state
    blocks = task.student.model.base_model.layers
    mixers = [getattr(block, "mixer", None) or getattr(block, "mamba", None) for block in blocks]
    assert [mixer is None for mixer in mixers] == [False, student == "bamba", False, False]
    for mixer in filter(None, mixers):
        of_b_and_c = (
            mixer.x_proj.weight.grad[-2 * n :]
            if hasattr(mixer, "x_proj")
            else mixer.in_proj.weight.grad[2 * mixer.intermediate_size :][: 2 * n]
        )
        assert (of_b_and_c.abs().sum(dim=1) > 0).all()
        assert (mixer.in_proj.weight.grad.abs().sum(dim=1) > 0).any()
    for name, parameter in task.bridges.named_parameters():
        per_bridge = parameter.grad.flatten(1).abs().sum(dim=1)
        assert len(per_bridge) == (3 if student == "bamba" else 4), name
        assert (per_bridge > 0).all(), name


def test_loss_is_the_formula() -> None:
    """Against bridges, layer map and mask written out, in float64; K has half the width of Q."""
    task = make_task(
        weights=LossWeights(kd=0.5, ce=2.0, temperature=3.0),
        schedule=AlignmentSchedule(weight=0.25),
        divergence=Divergence("reverse"),
        chunk=4,
    ).double()
    given = batch()
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    result = task(**given)

    layers: dict[int, tuple[Tensor, Tensor]] = {}
    teacher = task.teacher.logits(task.teacher(ids, mask, lambda layer, q, k: layers.update({layer: (q, k)})))
    hidden, projections = task.student.forward_with_projections(ids, given["attention_mask"])
    student = task.student.logits(hidden)
    following = mask[:, 1:]

    align = torch.zeros((), dtype=torch.float64)
    for layer, ((B, C),) in enumerate(projections):
        query, key = layers[layer // 2]
        assert (query.shape[1], key.shape[1]) == (4, 2)
        of_key = bridged_mse(task.bridges.key, layer, B, key, mask)
        align += (of_key + bridged_mse(task.bridges.query, layer, C, query, mask)) / 4
    p, q = ((logits[:, :-1][following] / 3).softmax(-1) for logits in (teacher, student))
    kl = 9 * (q * (q / p).log()).sum(-1).mean()
    ce = nn.functional.cross_entropy(student[:, :-1][following], ids[:, 1:][following])

    assert result.keys() == {"loss", "kl", "ce", "align", "align_layers"}
    torch.testing.assert_close(result["align_layers"].mean(), result["align"])
    # The bridge op returns float32.
    torch.testing.assert_close(result["align"].double(), align, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["kl"], kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(result["ce"], ce, rtol=1e-6, atol=0)
    torch.testing.assert_close(result["loss"].double(), 0.5 * kl + 2 * ce + 0.25 * align, rtol=1e-5, atol=0)


def losses_of_pairs(task: LanguageTask, given: dict[str, Tensor]) -> Tensor:
    """Of each Mamba block of the hybrid, all but its second, with each teacher layer the alignment: (3, 2)."""
    mask = given["attention_mask"].bool()
    layers: list[tuple[Tensor, Tensor]] = []
    task.teacher(**given, on_layer=lambda layer, query, key: layers.append((query, key)))
    _, projections = task.student.forward_with_projections(**given)
    assert [len(directions) for directions in projections] == [1, 0, 1, 1]
    return torch.stack(
        [
            bridged_mse(task.bridges.key, bridge, B, key, mask)
            + bridged_mse(task.bridges.query, bridge, C, query, mask)
            for bridge, ((B, C),) in enumerate(filter(None, projections))
            for query, key in layers
        ]
    ).view(3, 2)


def test_a_block_that_keeps_attention_meets_no_bridge() -> None:
    """The others learn from the teacher layers of their places among all blocks, and the mean is over them alone."""
    task, given = make_task("bamba", weights=LossWeights(kd=0.0)), batch()
    losses = losses_of_pairs(task, given)[torch.arange(3), torch.tensor([0, 1, 1])]
    result = task(**given)
    torch.testing.assert_close(result["align_layers"], losses.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result["loss"], losses.mean(), rtol=1e-4, atol=1e-6)


def test_a_learned_layer_map_of_a_hybrid_has_a_row_for_each_mamba_block() -> None:
    task, given = make_task("bamba", learned=2, weights=LossWeights(kd=0.0)), batch()
    with torch.no_grad():
        task.bridges.layer_logits.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0], [-3.0, 1.0]]))
    losses = (task.bridges.layer_logits.softmax(dim=1) * losses_of_pairs(task, given)).sum(dim=1)
    result = task(**given)
    torch.testing.assert_close(result["align_layers"], losses.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result["loss"], losses.mean(), rtol=1e-4, atol=1e-6)
    (expected,) = torch.autograd.grad(losses.mean(), task.bridges.layer_logits)
    result["loss"].backward()
    torch.testing.assert_close(task.bridges.layer_logits.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("student", STUDENTS)
def test_padding_changes_nothing(student: str) -> None:
    task, given = make_task(student, weights=LossWeights(ce=1.0)), batch()
    alone = {name: tensor[1:, :6] for name, tensor in given.items()}
    padded = {name: tensor[1:] for name, tensor in given.items()}
    torch.testing.assert_close(task(**padded), task(**alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("term", ["kl", "ce", "align"])
@pytest.mark.parametrize("student", ["mamba", "falcon_mamba"])
def test_packed_documents_are_worth_as_much_as_one_by_one(student: str, term: str, checkpointing: bool) -> None:
    """Loss and gradients, in float64: the mean over what counts in each document, by how much of it there is."""
    weights = LossWeights(kd=float(term == "kl"), ce=float(term == "ce"))
    schedule = AlignmentSchedule(weight=float(term == "align"))
    task = make_task(student, weights=weights, schedule=schedule).double()
    if checkpointing:
        checkpoint_blocks(task.student.model)
    ids = batch()["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
    documents = [ids[:1, :4], ids[:1, 4:7], ids[:1, 7:], ids[1:, :1], ids[1:, 1:]]

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(task.parameters()), allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    packed = task(ids, position_ids=positions)["loss"]
    counts = [document.shape[1] - (term != "align") for document in documents]
    alone = [task(document)["loss"] * count / sum(counts) for document, count in zip(documents, counts, strict=True)]
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-5, atol=0)
    expected = gradients(torch.stack(alone).sum())
    assert len(expected) > 10
    scale = max(gradient.abs().max().item() for gradient in expected)
    torch.testing.assert_close(gradients(packed), expected, rtol=1e-4, atol=1e-6 * scale)


def test_labels_leave_a_prompt_out() -> None:
    task, given = make_task(weights=LossWeights(ce=1.0)), batch()
    labels = given["input_ids"].clone()
    labels[0] = -100
    labels[1, 6:] = -100
    got, expected = task(**given, labels=labels), task(**{name: tensor[1:] for name, tensor in given.items()})
    torch.testing.assert_close((got["kl"], got["ce"]), (expected["kl"], expected["ce"]), rtol=1e-4, atol=1e-6)


def test_training_the_alignment_lowers_it_through_the_student() -> None:
    """With the bridges held fixed, the student alone must be able to lower the alignment loss."""
    task = make_task(weights=LossWeights(kd=0.0))
    task.bridges.requires_grad_(False)
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = task(**batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_teacher_is_neither_trained_nor_saved_but_moves_along() -> None:
    task = make_task()
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"student", "bridges"}
    assert {name.split(".")[0] for name in task.state_dict()} == {"student", "bridges"}
    task.double()
    assert next(task.teacher.parameters()).dtype == torch.float64
    of_student = {name.rsplit(".", 1)[-1] for name in task.no_weight_decay() if name.startswith("student.model.")}
    assert of_student == {"A_log", "D"}


def test_no_bridge_is_run_where_the_alignment_weighs_nothing() -> None:
    task = make_task(schedule=AlignmentSchedule("until", weight=1.0, until=0.5))
    assert "align" in task(**batch())
    task.advance(5, 10)
    assert task(**batch()).keys() == {"loss", "kl"}


def gradients(task: LanguageTask) -> dict[str, Tensor]:
    """Of the loss, by the parameters that it reaches."""
    names, parameters = zip(*task.named_parameters(), strict=True)
    found = torch.autograd.grad(task(**batch())["loss"], parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("student", STUDENTS)
def test_stages_have_the_gradient_of_the_alignment_and_then_of_the_predictions(student: str) -> None:
    weights, schedule = LossWeights(kd=0.5, ce=2.0), AlignmentSchedule("stages", weight=3.0, until=0.5)
    task = make_task(student, weights=weights, schedule=schedule)
    alignment = make_task(student, weights=LossWeights(kd=0.0), schedule=AlignmentSchedule(weight=3.0))
    predictions = make_task(student, weights=weights, schedule=AlignmentSchedule(weight=0.0))
    for step, alone, terms in ((4, alignment, {"align", "align_layers"}), (5, predictions, {"kl", "ce"})):
        task.advance(step, 10)
        assert task(**batch()).keys() == {"loss", *terms}
        got, expected = gradients(task), gradients(alone)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert any(name.startswith("bridges.") for name in got) == (step == 4)


def test_the_first_stage_is_evaluated_by_its_predictions_too() -> None:
    task = make_task(schedule=AlignmentSchedule("stages", until=0.5)).eval()
    result = task(**batch())
    assert result.keys() == {"loss", "kl", "ce", "align", "align_layers"}
    assert torch.equal(result["loss"], result["align"])
    assert task.train().compare_gradients(**batch()).kl_norm > 0


def test_a_control_without_bridges_has_one_stage() -> None:
    task = make_task(schedule=AlignmentSchedule("stages", until=0.5))
    control = LanguageTask(task.student, task.teacher, schedule=task.schedule)
    result = control(**batch())
    assert result.keys() == {"loss", "kl"}
    assert torch.equal(result["loss"], result["kl"])


def test_cross_entropy_alone_needs_no_teacher() -> None:
    model = make("mamba2")
    task = LanguageTask(LanguageStudent(model), weights=LossWeights(kd=0.0, ce=1.0))
    ids = batch()["input_ids"]
    torch.testing.assert_close(task(ids)["loss"], model(ids, labels=ids).loss, rtol=1e-4, atol=1e-6)


def test_vocabularies_that_differ() -> None:
    student, teacher = LanguageStudent(make("mamba", vocab_size=64)), HuggingFaceTeacher(make("llama"))
    with pytest.raises(ValueError, match="got 64 logits of the student and 48 of the teacher"):
        LanguageTask(student, teacher)
    task = LanguageTask(student, teacher, tokens=45)
    assert torch.isfinite(task(torch.randint(45, (2, 5)))["loss"])


def test_bridges_that_do_not_fit() -> None:
    task = make_task()
    with pytest.raises(ValueError, match=r"LanguageTask: expected bridges .* = \(4, 4, 16, 32\), got \(4, 4, 32, 32\)"):
        LanguageTask(task.student, task.teacher, Bridges(4, 1, 4, 24, 32, 32))
