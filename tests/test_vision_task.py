"""The first tests of every student: the alignment reaches it, and the bridges are trained."""

import pytest
import timm
import torch
from torch import Tensor, nn

from cab.bridge import Bridges, BridgeWeights
from cab.distill.losses import Alignment, distillation_kl
from cab.distill.schedule import AlignmentSchedule
from cab.distill.similarity import attention_similarity
from cab.distill.task import LossWeights
from cab.distill.vision import VisionTask
from cab.students.vim import VisionMamba
from cab.teachers.timm import TimmTeacher
from cab_kernels import bridge_mse_grouped

STUDENT = {"depth": 4, "embed_dim": 16, "d_state": 4, "num_classes": 5}
TEACHER = {"img_size": 8, "patch_size": 2, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}


def make_task(name: str = "deit_tiny_patch16_224", a_init: str = "zero", **kwargs: object) -> VisionTask:
    torch.manual_seed(0)
    student = timm.create_model("vim_micro_patch2_8", a_init=a_init, **STUDENT)
    teacher = TimmTeacher(timm.create_model(name, **TEACHER))
    bridges = Bridges(4, 2, student.d_state, 32, teacher.key_width, teacher.query_width)
    return VisionTask(student, teacher, bridges, **kwargs)


def images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


FAMILIES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_tiny_patch16_224.augreg_in21k",
    "vit_base_patch16_clip_224",
    "vit_so400m_patch14_siglip_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_relpos_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_224",
    "beit_base_patch16_224",
]


@pytest.mark.parametrize("a_init", ["zero", "s4d"])
@pytest.mark.parametrize("name", FAMILIES)
def test_alignment_alone_reaches_student_and_bridges(name: str, a_init: str) -> None:
    """The published code fails here: its student gets no gradient, or its bridges no optimiser."""
    task = make_task(name, a_init, weights=LossWeights(kd=0.0))
    task(images())["loss"].backward()
    for layer in task.student.layers:
        mixer = layer.mixer
        for parameter in (mixer.x_proj.weight, mixer.x_proj_b.weight, mixer.in_proj.weight):
            assert parameter.grad is not None
        for x_proj in (mixer.x_proj, mixer.x_proj_b):
            rank, n = mixer.dt_rank, mixer.d_state
            _, of_b, of_c = x_proj.weight.grad.split([rank, n, n])
            assert (of_b.abs().sum(dim=1) > 0).all()
            assert (of_c.abs().sum(dim=1) > 0).all()
        value, _ = mixer.in_proj.weight.grad.chunk(2)
        assert (value.abs().sum(dim=1) > 0).any()
    for name, parameter in task.bridges.named_parameters():
        per_bridge = parameter.grad.flatten(1).abs().sum(dim=1)
        assert len(per_bridge) == 8, name
        assert (per_bridge > 0).all(), name


def test_loss_is_the_formula() -> None:
    """Against bridges, layer map and token order written out: the published definition, in float64."""
    task = make_task(schedule=AlignmentSchedule(weight=0.25)).double()
    batch = images().double()
    result = task(batch)

    layers: dict[int, tuple[Tensor, Tensor]] = {}
    teacher_logits = task.teacher(batch, lambda layer, q, k: layers.update({layer: (q, k)}))
    logits, projections = task.student.forward_with_projections((batch - task.student_mean) / task.student_std)
    order = [*range(1, 9), 0, *range(9, 17)]  # the teacher's class token stands first, the student's in the middle

    def mse(stack: nn.Module, index: int, x: Tensor, target: Tensor) -> Tensor:
        hidden = nn.functional.silu(x @ stack.w1[index].T + stack.b1[index])
        flat = target.transpose(1, 2).flatten(2)[:, order]
        return (hidden @ stack.w2[index].T + stack.b2[index] - flat).square().mean()

    align = torch.zeros((), dtype=torch.float64)
    for layer, directions in enumerate(projections):
        query, key = layers[[0, 0, 1, 1][layer]]
        for direction, (B, C) in enumerate(directions):
            align += mse(task.bridges.key, 2 * layer + direction, B, key) / 4
            align += mse(task.bridges.query, 2 * layer + direction, C, query) / 4
    probabilities, log_student = teacher_logits.softmax(-1), logits.log_softmax(-1)
    kl = (probabilities * (probabilities.log() - log_student)).sum() / len(batch)

    torch.testing.assert_close(result["align"].double(), align, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["kl"].double(), kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result["loss"].double(), kl + 0.25 * align, rtol=1e-5, atol=0)


def test_temperature() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    probabilities = (teacher / 3).softmax(-1)
    expected = 9 * (probabilities * (probabilities.log() - (student / 3).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distillation_kl(student, teacher, 3.0), expected)


def test_bridges_fit_random_keys() -> None:
    """The paper's sanity check: a bridge fed random B learns fixed random K to near zero."""
    torch.manual_seed(0)
    from cab_kernels import bridge_mse_grouped

    bridges = Bridges(1, 1, 16, 128, 24, 24)
    B, K = torch.randn(32, 16), torch.randn(32, 24)
    optimizer = torch.optim.AdamW(bridges.key.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(400):
        loss = bridge_mse_grouped([B], *bridges.key.split([1])[0], K).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 * K.square().mean()


def test_training_the_alignment_lowers_it_through_the_student() -> None:
    """With the bridges held fixed, the student alone must be able to lower the alignment loss."""
    task = make_task(weights=LossWeights(kd=0.0))
    task.bridges.requires_grad_(False)
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=3e-3)
    batch, losses = images(8), []
    for _ in range(30):
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


def test_teacher_is_neither_trained_nor_saved_but_moves_along() -> None:
    task = make_task()
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"student", "bridges"}
    assert {name.split(".")[0] for name in task.state_dict()} == {"student", "bridges"}
    task.double()
    assert next(task.teacher.parameters()).dtype == torch.float64


def test_state_restores_the_bridges() -> None:
    source, other = make_task(), make_task()
    nn.init.normal_(source.bridges.key.w1)
    other.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(other.bridges.key.w1, source.bridges.key.w1)


def test_no_bridge_is_run_where_the_alignment_weighs_nothing() -> None:
    task = make_task(schedule=AlignmentSchedule("until", weight=1.0, until=0.5))
    assert "align" in task(images())
    task.advance(5, 10)
    result = task(images())
    assert "align" not in result
    torch.testing.assert_close(result["loss"], result["kl"])


def test_stages_have_the_gradient_of_the_alignment_and_then_of_the_kl() -> None:
    task = make_task(schedule=AlignmentSchedule("stages", weight=3.0, until=0.5))
    alignment = make_task(weights=LossWeights(kd=0.0), schedule=AlignmentSchedule(weight=3.0))
    kl = make_task(schedule=AlignmentSchedule(weight=0.0))
    for step, alone in ((4, alignment), (5, kl)):
        task.advance(step, 10)
        got, expected = (
            torch.autograd.grad(each(images())["loss"], list(each.parameters()), allow_unused=True)
            for each in (task, alone)
        )
        assert 0 < sum(gradient is not None for gradient in got) < len(got)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_adaptive_weight_follows_the_observed_gradients() -> None:
    task = make_task(schedule=AlignmentSchedule("adaptive", weight=2.0))
    agreement = task.compare_gradients(images())
    assert agreement.kl_norm > 0
    assert agreement.align_norm > 0
    assert -1 <= agreement.cosine <= 1
    task.trust.observe(0.5)
    task.advance(0, 10)
    assert task.alignment_weight == 2.0
    for _ in range(50):
        task.trust.observe(-0.5)
    task.advance(1, 10)
    assert task.alignment_weight == 0.0
    assert "trust.best" in task.state_dict()


def test_cross_entropy_alone_needs_no_teacher() -> None:
    student = timm.create_model("vim_micro_patch2_8", **STUDENT)
    task = VisionTask(student, weights=LossWeights(kd=0.0, ce=1.0))
    result = task(images(), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(result["loss"], nn.functional.cross_entropy(result["logits"], torch.tensor([0, 1, 2])))


def test_each_model_sees_its_own_statistics() -> None:
    task = make_task("vit_tiny_patch16_224")
    seen = {}
    task.student.patch_embed.register_forward_pre_hook(lambda module, args: seen.update(student=args[0]))
    task.teacher.model.patch_embed.register_forward_pre_hook(lambda module, args: seen.update(teacher=args[0]))
    task(torch.full((1, 3, 8, 8), 0.5))
    torch.testing.assert_close(seen["teacher"], torch.zeros(1, 3, 8, 8))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen["student"][0, :, 0, 0], (0.5 - mean) / std)


@pytest.mark.parametrize(
    ("layer_map", "got"), [([0, 0, 1], r"\[0, 0, 1\]"), ([0, 1, 1, 2], r"\[0, 1, 1, 2\]"), ([1, 0, 1, 1], r"\[1, 0")]
)
def test_layer_maps_that_do_not_fit(layer_map: list[int], got: str) -> None:
    with pytest.raises(
        ValueError, match=f"expected a layer map of 4 teacher layers below 2 that never goes back, got {got}"
    ):
        make_task(layer_map=layer_map)


def test_bridges_that_do_not_fit() -> None:
    task = make_task()
    with pytest.raises(ValueError, match=r"= \(4, 4, 24, 24\), got \(4, 4, 8, 24\)"):
        VisionTask(task.student, task.teacher, Bridges(4, 2, 4, 32, 8, 24))


def test_bridges_without_a_teacher() -> None:
    with pytest.raises(ValueError, match="expected a teacher for bridges or a KL term, got None"):
        VisionTask(VisionMamba(8, 2, **STUDENT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd": -1.0}, "expected kd of at least 0, got -1.0"),
        ({"ce": -1.0}, "expected ce of at least 0, got -1.0"),
        ({"temperature": 0.0}, "expected temperature above 0, got 0.0"),
    ],
    ids=["kd", "ce", "temperature"],
)
def test_bad_weights(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeights(**arguments)


def variant(hidden: int, shared: bool, targets: str = "raw") -> VisionTask:
    torch.manual_seed(0)
    student = timm.create_model("vim_micro_patch2_8", a_init="zero", **STUDENT)
    teacher = TimmTeacher(timm.create_model("deit_tiny_distilled_patch16_224", **TEACHER))
    bridges = Bridges(4, 2, student.d_state, hidden, teacher.key_width, teacher.query_width, shared)
    return VisionTask(student, teacher, bridges, targets=targets)


@pytest.mark.parametrize(("hidden", "shared"), [(0, False), (0, True), (8, True)], ids=["linear", "both", "shared"])
def test_every_variant_of_a_bridge_reaches_the_student_and_is_trained(hidden: int, shared: bool) -> None:
    task = variant(hidden, shared)
    result = task(images())
    result["loss"].backward()
    assert result["align_layers"].shape == (4,)
    torch.testing.assert_close(result["align_layers"].mean(), result["align"])
    for name, parameter in task.bridges.named_parameters():
        assert len(parameter) == (2 if shared else 8), name
        assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).all(), name
    assert (task.student.layers[3].mixer.x_proj.weight.grad.abs() > 0).any()


@pytest.mark.parametrize("targets", ["raw", "standardised", "softmax"])
def test_a_linear_bridge_is_the_formula(targets: str) -> None:
    task = variant(0, False, targets).double()
    batch = images().double()
    result = task(batch)
    layers: dict[int, Tensor] = {}
    task.teacher(batch, lambda layer, query, key: layers.update({layer: task.targets.eval().key(layer, key)}))
    _, projections = task.student.forward_with_projections((batch - task.student_mean) / task.student_std)
    order = [*range(2, 10), 0, *range(10, 18)]
    w, b = task.bridges.key.w2[2], task.bridges.key.b2[2]
    residual = projections[1][0].B @ w.T + b
    target = layers[0].value.transpose(1, 2).flatten(2)
    if targets == "standardised":
        target = (target - layers[0].mean) * layers[0].rstd
    of_one = (residual - target[:, order]).square().mean()
    assert result["align_layers"][1] > of_one > 0
    torch.testing.assert_close(of_one, alone(task, projections, layers[0], w, b))


def alone(task: VisionTask, projections: list, target: object, w: Tensor, b: Tensor) -> Tensor:
    """The loss of one bridge, as the alignment computes it."""
    alignment = Alignment(task.bridges, projections, task.targets, task.layer_map, task.token_index)
    weights = BridgeWeights(None, None, w[None], b[None])
    return alignment._linear_losses([projections[1][0].B], weights, target)[0]


def test_k_and_q_that_lie_alike_meet_their_bridges_in_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = variant(128, False, "standardised").eval()
    _, projections = task.student.forward_with_projections(images())
    calls: list[int] = []

    def counted(xs: list[Tensor], *arguments: object, **options: object) -> Tensor:
        calls.append(len(xs))
        return bridge_mse_grouped(xs, *arguments, **options)

    monkeypatch.setattr("cab.distill.losses.bridge_mse_grouped", counted)
    losses = []
    for apart in (False, True):
        alignment = Alignment(task.bridges, projections, task.targets, task.layer_map, task.token_index)

        def meet(layer: int, query: Tensor, key: Tensor, met: Alignment = alignment, apart: bool = apart) -> None:
            met(layer, query, key.transpose(2, 3).contiguous().transpose(2, 3) if apart else key)

        task.teacher(images(), meet)
        losses.append(alignment.layers())
    together, one_by_one = calls[: len(calls) // 3], calls[len(calls) // 3 :]
    assert one_by_one == [count // 2 for count in together for _ in range(2)]
    torch.testing.assert_close(*losses)


def test_a_shared_bridge_is_one_for_all_layers() -> None:
    shared, own = variant(8, True), variant(8, False)
    with torch.no_grad():
        for stack, one in ((own.bridges.key, shared.bridges.key), (own.bridges.query, shared.bridges.query)):
            for name, parameter in stack.named_parameters():
                parameter.copy_(torch.cat([getattr(one, name)] * 4))
    torch.testing.assert_close(shared(images())["align"], own(images())["align"])


@pytest.mark.parametrize(("position", "message"), [(2, "expected d_state of at least 1, got 0"), (5, "query_width of")])
def test_bridges_of_no_size(position: int, message: str) -> None:
    sizes = [4, 2, 4, 8, 24, 24]
    sizes[position] = 0
    with pytest.raises(ValueError, match=message):
        Bridges(*sizes)
    with pytest.raises(ValueError, match="expected hidden of at least 0, got -1"):
        Bridges(4, 2, 4, -1, 24, 24)


def test_similarity_of_attention_is_the_formula() -> None:
    task = make_task("deit_tiny_distilled_patch16_224")
    batch = images(2)
    got = attention_similarity(task, batch)
    assert got.shape == (4,)
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    task.teacher(batch, lambda layer, query, key: layers.update({layer: (query, key)}))
    _, projections = task.student.forward_with_projections((batch - task.student_mean) / task.student_std)
    order = [*range(2, 10), 0, *range(10, 18)]
    query, key = layers[1]
    teacher = torch.einsum("bhtd,bhsd->bhts", query, key).div(12**0.5).softmax(-1).mean(1)[:, order][:, :, order]
    student = torch.zeros(2, 17, 17)
    for t in range(17):
        for s in range(17):
            for direction, seen in zip(projections[3], (s <= t, s >= t), strict=True):
                if seen:
                    student[:, t, s] += (direction.C[:, t] * direction.B[:, s]).sum(-1)
    cosine = (student * teacher).sum((1, 2)) / (student.square().sum((1, 2)) * teacher.square().sum((1, 2))).sqrt()
    torch.testing.assert_close(got[3], cosine.mean())


def test_similarity_needs_a_teacher() -> None:
    task = VisionTask(make_task().student, weights=LossWeights(kd=0.0, ce=1.0))
    with pytest.raises(ValueError, match="attention_similarity: expected a task with a teacher, got none"):
        attention_similarity(task, images())


def learned(**options: object) -> VisionTask:
    torch.manual_seed(0)
    student = timm.create_model("vim_micro_patch2_8", a_init="zero", **STUDENT)
    teacher = TimmTeacher(timm.create_model("deit_tiny_distilled_patch16_224", **TEACHER))
    bridges = Bridges(4, 2, student.d_state, 8, teacher.key_width, teacher.query_width, teacher_layers=2)
    return VisionTask(student, teacher, bridges, **options)


def test_a_learned_layer_map_weighs_the_loss_of_every_teacher_layer() -> None:
    task = learned(weights=LossWeights(kd=0.0))
    with torch.no_grad():
        task.bridges.layer_logits.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [-3.0, 1.0]]))
    shares = task.bridges.layer_logits.softmax(dim=1)
    whole = task(images())["align_layers"]
    fixed = []
    logits, task.bridges.layer_logits = task.bridges.layer_logits, None
    for layer in range(2):
        task.layer_map = [layer] * 4
        fixed.append(task(images())["align_layers"])
    torch.testing.assert_close(whole, shares[:, 0] * fixed[0] + shares[:, 1] * fixed[1])
    task.bridges.layer_logits = logits
    task(images())["loss"].backward()
    slope = shares * (torch.stack(fixed, dim=1) - whole[:, None]) / 4  # of a mean weighed by a softmax
    torch.testing.assert_close(logits.grad, slope)
    assert (task.student.layers[3].mixer.x_proj.weight.grad.abs() > 0).any()
    assert all((p.grad.flatten(1).abs().sum(1) > 0).all() for p in task.bridges.parameters())


def test_a_learned_layer_map_that_does_not_fit_the_teacher() -> None:
    task = learned()
    bridges = Bridges(4, 2, 4, 8, task.teacher.key_width, task.teacher.query_width, teacher_layers=3)
    with pytest.raises(ValueError, match="expected a learned layer map over 2 teacher layers, got 3"):
        VisionTask(task.student, task.teacher, bridges)
    with pytest.raises(ValueError, match="expected teacher_layers of at least 1, got 0"):
        Bridges(4, 2, 4, 8, 24, 24, teacher_layers=0)


def test_a_teacher_of_another_grid_is_sampled_where_the_patches_are() -> None:
    """4 x 4 patches of the student on a 3 x 3 grid behind a class token and four registers."""
    torch.manual_seed(0)
    student = timm.create_model("vim_micro_patch2_8", a_init="zero", **STUDENT)
    sizes = {**TEACHER, "img_size": 12, "patch_size": 4}
    teacher = TimmTeacher(timm.create_model("vit_small_patch14_reg4_dinov2", **sizes))
    bridges = Bridges(4, 2, student.d_state, 8, teacher.key_width, teacher.query_width)
    task = VisionTask(student, teacher, bridges, weights=LossWeights(kd=0.0))
    nearest = [0, 1, 1, 2]  # centres at 1/8, 3/8, 5/8, 7/8 in thirds
    patches = [5 + 3 * row + column for row in nearest for column in nearest]
    assert task.token_index.tolist() == [*patches[:8], 0, *patches[8:]]
    task(images())["loss"].backward()
    for layer in task.student.layers:
        for x_proj in (layer.mixer.x_proj, layer.mixer.x_proj_b):
            assert (x_proj.weight.grad[layer.mixer.dt_rank :].abs().sum(dim=1) > 0).all()
