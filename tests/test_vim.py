import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from cab.students.mamba import BidirectionalMamba
from cab.students.vim import VisionMamba


def micro(**kwargs: object) -> VisionMamba:
    torch.manual_seed(0)
    return timm.create_model("vim_micro_patch2_8", **{"depth": 3, "embed_dim": 16, "d_state": 4, **kwargs})


@pytest.mark.parametrize(("name", "width"), [("vim_tiny", 192), ("vim_small", 384), ("vim_base", 768)])
def test_published_names_and_shapes(name: str, width: int) -> None:
    """The tensors of hustvl/Vim's checkpoints (24 blocks, v2, class token in the middle): they load strictly."""
    inner, rank = 2 * width, -(-width // 16)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
        "norm_f.weight": (width,),
    }
    for layer in range(24):
        prefix = f"layers.{layer}."
        shapes |= {
            f"{prefix}norm.weight": (width,),
            f"{prefix}mixer.in_proj.weight": (2 * inner, width),
            f"{prefix}mixer.out_proj.weight": (width, inner),
        }
        for mark in ("", "_b"):
            shapes |= {
                f"{prefix}mixer.A{mark}_log": (inner, 16),
                f"{prefix}mixer.D{mark}": (inner,),
                f"{prefix}mixer.conv1d{mark}.weight": (inner, 1, 4),
                f"{prefix}mixer.conv1d{mark}.bias": (inner,),
                f"{prefix}mixer.x_proj{mark}.weight": (rank + 32, inner),
                f"{prefix}mixer.dt_proj{mark}.weight": (inner, rank),
                f"{prefix}mixer.dt_proj{mark}.bias": (inner,),
            }
    with torch.device("meta"):
        model = timm.create_model(f"{name}_patch16_224")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


def test_checkpoint_file_loads_strictly(tmp_path) -> None:
    source, path = micro(), tmp_path / "vim.pth"
    torch.save({"model": source.state_dict()}, path)  # the published files keep the weights under "model"
    torch.manual_seed(1)
    loaded = timm.create_model("vim_micro_patch2_8", depth=3, embed_dim=16, d_state=4, checkpoint_path=str(path))
    for (name, a), b in zip(source.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_another_resolution_is_resampled() -> None:
    small, large = micro(), micro(img_size=16)
    with torch.no_grad():  # a plane over the grid, which resampling keeps; the class token is no part of it
        rows = torch.linspace(-0.75, 0.75, 4).view(4, 1, 1).expand(4, 4, 16).reshape(1, 16, 16)
        small.pos_embed.copy_(torch.cat((rows[:, :8], torch.full((1, 1, 16), 7.0), rows[:, 8:]), dim=1))
    large.load_state_dict(small.state_dict(), strict=True)
    assert large.pos_embed.shape == (1, 65, 16)
    assert (large.pos_embed[:, 32] == 7).all()
    grid = torch.cat((large.pos_embed[:, :32], large.pos_embed[:, 33:]), dim=1).view(8, 8, 16)
    torch.testing.assert_close(grid[:, 0], grid[:, 7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grid[1:-1].diff(dim=0).mean().item(), 0.25, rtol=0.1, atol=0)
    assert large(torch.rand(1, 3, 16, 16)).shape == (1, 10)


def test_checkpoint_of_no_square_grid() -> None:
    state = micro().state_dict()
    state["pos_embed"] = torch.zeros(1, 13, 16)
    with pytest.raises(ValueError, match="expected a position embedding of a square grid, got 12 patches"):
        micro().load_state_dict(state)


def test_projections_come_out_differentiable_for_every_layer_and_direction() -> None:
    student = micro()
    logits, projections = student.forward_with_projections(torch.rand(2, 3, 8, 8))
    assert logits.shape == (2, 10)
    assert [len(layer) for layer in projections] == [2, 2, 2]
    for layer in projections:
        for direction in layer:
            assert direction.B.shape == direction.C.shape == (2, 17, 4)
            assert direction.B.requires_grad
            assert direction.C.requires_grad


def test_forward_is_the_same_with_and_without_projections() -> None:
    student, images = micro().eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(student(images), student.forward_with_projections(images)[0])


def tokens_with_pytorchs_norm(student: VisionMamba, images: Tensor) -> Tensor:
    """The tokens before the head, block by block: the stream, plus the mixer's result for its norm."""
    patches = student.patch_embed(images)
    cls = student.cls_token.expand(len(images), -1, -1)
    stream = torch.cat((patches[:, :8], cls, patches[:, 8:]), dim=1) + student.pos_embed
    for block in student.layers:
        stream = stream + block.mixer(F.rms_norm(stream, (16,), block.norm.weight, 1e-5))[0]
    return F.rms_norm(stream, (16,), student.norm_f.weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_and_gradients_are_those_of_addition_and_pytorchs_norm(dtype: torch.dtype) -> None:
    student, images = micro().to(dtype), torch.rand(2, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        for block in student.layers:
            block.norm.weight.uniform_(0.5, 1.5)
    parameters = [parameter for name, parameter in student.named_parameters() if not name.startswith("head")]
    results = []
    for tokens in (student.forward_features(images), tokens_with_pytorchs_norm(student, images)):
        assert tokens.dtype == dtype
        results.append((tokens, *torch.autograd.grad(tokens.square()[:, ::3].sum(), parameters)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 model", "autocast"])
def test_stream_is_float32_and_the_mixers_input_16_bits(autocast: bool) -> None:
    student, dtypes = micro(), []
    for block in student.layers:
        block.norm.register_forward_hook(lambda _, inputs, outputs: dtypes.append([t.dtype for t in outputs]))
    images = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        student(images) if autocast else student.bfloat16()(images.bfloat16())
    assert dtypes == [[torch.bfloat16, torch.float32]] * 3


def test_dropped_paths_add_nothing() -> None:
    student, images = micro(drop_path_rate=0.1).train(), torch.rand(2, 3, 8, 8)
    for block in student.layers:
        block.drop_path.drop_prob = 1.0
    streams = []
    student.norm_f.register_forward_hook(lambda _, inputs, outputs: streams.append(outputs[1]))
    student.layers[0].norm.register_forward_hook(lambda _, inputs, outputs: streams.append(outputs[1]))
    student(images)
    assert torch.equal(*streams)


def linear_attention(mixer: BidirectionalMamba, hidden: Tensor) -> Tensor:
    """The mixer with decay 1, written as the masked product of C and B, direction by direction, with flips."""
    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    outputs = []
    for mark in ("", "_b"):
        tokens = x.flip(1) if mark else x
        conv, x_proj = getattr(mixer, f"conv1d{mark}"), getattr(mixer, f"x_proj{mark}")
        u = F.silu(conv(tokens.transpose(1, 2))[..., : tokens.shape[1]]).transpose(1, 2)
        low_rank, B, C = x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        delta = F.softplus(getattr(mixer, f"dt_proj{mark}")(low_rank))
        y = (C @ B.transpose(1, 2)).tril() @ (delta * u) + getattr(mixer, f"D{mark}") * u
        outputs.append((y.flip(1) if mark else y) * F.silu(z))
    return mixer.out_proj((outputs[0] + outputs[1]) / 2)


def test_a_zero_is_linear_attention() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(16, d_state=4, a_init="zero").double()
    hidden = torch.randn(2, 33, 16, dtype=torch.float64)
    out, _ = mixer(hidden)
    # exp(-20) is 2e-9: the decay over 33 steps of delta < 0.2 differs from 1 by 1e-8.
    torch.testing.assert_close(out, linear_attention(mixer, hidden), rtol=1e-7, atol=1e-9)


def test_s4d_is_not_linear_attention() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(16, d_state=4, a_init="s4d").double()
    hidden = torch.randn(2, 33, 16, dtype=torch.float64)
    out, _ = mixer(hidden)
    assert (out - linear_attention(mixer, hidden)).abs().max() > 1e-3 * out.abs().max()


def test_backward_direction_sees_later_tokens_only() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(16, d_state=4)
    hidden = torch.randn(1, 9, 16)
    changed = hidden.clone()
    changed[:, 5] += 1
    (_, (forward, backward)), (_, (forward_2, backward_2)) = mixer(hidden), mixer(changed)
    moved = (forward.B != forward_2.B).any(dim=-1)[0]
    moved_back = (backward.B != backward_2.B).any(dim=-1)[0]
    # The causal window of four looks back, that of the backward direction ahead.
    assert moved.tolist() == [False] * 5 + [True] * 4
    assert moved_back.tolist() == [False] * 2 + [True] * 4 + [False] * 3


def test_spared_from_decay() -> None:
    spared = micro().no_weight_decay()
    per_layer = {f"layers.{i}.mixer.{name}" for i in range(3) for name in ("A_log", "A_b_log", "D", "D_b")}
    assert spared == per_layer | {"cls_token", "pos_embed"}


def test_reset_classifier() -> None:
    student = micro()
    student.reset_classifier(3)
    assert student(torch.rand(1, 3, 8, 8)).shape == (1, 3)
    student.reset_classifier(0)
    assert student(torch.rand(1, 3, 8, 8)).shape == (1, 16)


def test_image_size_must_be_a_multiple_of_the_patch() -> None:
    with pytest.raises(ValueError, match=r"expected img_size a multiple of patch_size 2, got \(9, 9\)"):
        micro(img_size=9)


def test_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"expected images of \(height, width\) = \(8, 8\), got \(8, 10\)"):
        micro()(torch.rand(1, 3, 8, 10))


def test_unknown_start_of_a() -> None:
    with pytest.raises(ValueError, match="expected a_init 's4d' or 'zero', got 'hippo'"):
        micro(a_init="hippo")
