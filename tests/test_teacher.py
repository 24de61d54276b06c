import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab.teachers.frozen import FrozenLinear
from cab.teachers.timm import TimmTeacher
from cab.token_map import TokenLayout

# Two layers each of the families' own classes, as small as their constructors allow: class token and prefix tokens.
FAMILIES = {
    "deit_tiny_patch16_224": (0, 1),
    "deit_tiny_distilled_patch16_224": (0, 2),
    "deit3_small_patch16_224": (0, 1),
    "vit_tiny_patch16_224.augreg_in21k": (0, 1),
    "vit_base_patch16_clip_224": (0, 1),
    "vit_so400m_patch14_siglip_224": (None, 0),
    "vit_medium_patch16_reg4_gap_256": (None, 4),
    "vit_relpos_small_patch16_224": (None, 0),
    "vit_relpos_base_patch16_clsgap_224": (0, 1),
    "vit_small_patch14_dinov2": (0, 1),
    "vit_small_patch14_reg4_dinov2": (0, 5),
    "vit_small_patch16_dinov3": (0, 5),
    "eva02_tiny_patch14_224": (0, 1),
    "eva_giant_patch14_224": (0, 1),
    "vit_small_patch16_rope_224": (0, 1),
    "vit_base_patch16_rope_mixed_224": (0, 1),
    "beit_base_patch16_224": (0, 1),
    "beitv2_base_patch16_224": (0, 1),
}


def small(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **kwargs})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shows_q_and_k(name: str) -> None:
    cls, prefix = FAMILIES[name]
    model = small(name)
    teacher = TimmTeacher(model)
    seen: list[tuple[int, Tensor, Tensor]] = []
    images = torch.rand(3, 3, 32, 32)
    logits = teacher(images, lambda *layer: seen.append(layer))
    with torch.no_grad():
        torch.testing.assert_close(logits, model((images - teacher.mean) / teacher.std))
    assert [layer for layer, _, _ in seen] == [0, 1]
    assert all(query.shape == key.shape == (3, 2, 16 + prefix, 16) for _, query, key in seen)
    assert not any(tensor.requires_grad for layer in seen for tensor in layer[1:])
    assert teacher.token_layout == TokenLayout((4, 4), cls=cls, patches=tuple(range(prefix, 16 + prefix)))
    assert (teacher.num_layers, teacher.key_width, teacher.query_width) == (2, 32, 32)


def rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    """The patches of (batch, heads, tokens, head_dim) turned pair by pair by the angles of ``rope``."""
    prefix, patches = x.tensor_split([attention.num_prefix_tokens], dim=2)
    sine, cosine = rope.chunk(2, dim=-1)
    if getattr(attention, "rotate_half", False):
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-patches[..., 1::2], patches[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((prefix, patches * cosine + turned * sine), dim=2)


def by_hand(attention: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Q and K of a layer from what goes into it."""
    if getattr(attention, "qkv", None) is None:
        flat = [attention.q_proj(x), attention.k_proj(x)]
    else:
        biases = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:  # K has no bias there
            biases = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
        flat = list(F.linear(x, attention.qkv.weight, biases).chunk(3, dim=-1)[:2])
    width = flat[0].shape[-1] // attention.num_heads
    query, key = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in flat)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:
        query, key = rotated(attention, query, rope), rotated(attention, key, rope)
    return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


# Grouped-query attention: one of timm's classes has it, and repeats K for it.
GROUPED = "vit_large_patch16_sapiens2"
HEADS = {"num_heads": 4, "num_kv_heads": (4, 2)}


@pytest.mark.parametrize(("name", "sizes"), [*((name, {}) for name in FAMILIES), (GROUPED, HEADS)])
def test_q_and_k_are_those_of_the_layer(name: str, sizes: dict[str, object]) -> None:
    if name == GROUPED and not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = small(name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at nothing, embeddings too
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher, seen = TimmTeacher(model), []
    expected: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.attn.q_norm = getattr(block.attn, "q_norm", nn.Identity())
        block.attn.k_norm = getattr(block.attn, "k_norm", nn.Identity())
        block.attn.register_forward_pre_hook(
            lambda attention, args, kwargs: expected.append(by_hand(attention, args[0], kwargs.get("rope"))),
            with_kwargs=True,
        )
    teacher(torch.rand(2, 3, 32, 32), lambda *layer: seen.append(layer))
    assert len(seen) == len(expected) == 2
    for (query, key), (_, *got) in zip(expected, seen, strict=True):
        torch.testing.assert_close(got, [query, key])


class ManualAttention(nn.Module):
    """Packed qkv, and attention written out."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-1, -2)).softmax(dim=-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).flatten(2))


def test_packed_qkv_is_read_where_attention_is_written_out() -> None:
    model = small("deit_tiny_patch16_224")
    fused, seen = {}, {}
    images = torch.rand(2, 3, 32, 32)
    TimmTeacher(model)(images, lambda layer, query, key: fused.update({layer: (query, key)}))
    for block in model.blocks:
        manual = ManualAttention(32, 2)
        manual.qkv.load_state_dict(block.attn.qkv.state_dict())
        manual.proj.load_state_dict(block.attn.proj.state_dict())
        block.attn = manual
    TimmTeacher(model)(images, lambda layer, query, key: seen.update({layer: (query, key)}))
    torch.testing.assert_close(seen[0], fused[0])
    assert seen.keys() == {0, 1}


def test_teacher_is_frozen_and_stays_in_evaluation_mode() -> None:
    teacher = TimmTeacher(small("deit_tiny_patch16_224", drop_path_rate=0.9))
    teacher.train()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(teacher(images), teacher(images))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_other_means_give_the_same_logits() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2).double().eval()
    images = torch.rand(2, 3, 224, 224).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1).double() for name in ("mean", "std"))
        expected = model((images - mean) / std)
        teacher = TimmTeacher(model).double()
        changed = {type(module).__name__ for module in model.modules()}
        torch.testing.assert_close(teacher(images), expected)
    assert {"PatchConv2d", "FrozenLayerNorm", "FrozenLinear"} <= changed
    assert not {"Conv2d", "LayerNorm", "Linear"} & changed


def test_parameters_are_cast_for_autocast_once_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(4, 3), torch.rand(2, 4)
    plain = copy.deepcopy(layer)
    layer.__class__ = FrozenLinear
    used = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *given: used.append(given) or linear(x, *given))

    def same(dtype: torch.dtype, enabled: bool = True) -> bool:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            return torch.equal(layer(x), plain(x))

    assert same(torch.bfloat16)
    assert same(torch.bfloat16)
    first, second = used[0], used[2]
    assert all(one is other and one.dtype == torch.bfloat16 for one, other in zip(first, second, strict=True))
    with torch.no_grad():
        for module in (layer, plain):
            module.weight.fill_(0.3)
    assert same(torch.bfloat16)
    layer.load_state_dict({"weight": torch.rand(3, 4), "bias": torch.rand(3)})
    plain.load_state_dict(layer.state_dict())
    assert same(torch.bfloat16)
    before = used[-2]
    assert same(torch.float16)
    assert same(torch.bfloat16)
    assert used[-2][0] is before[0]
    assert same(torch.bfloat16, enabled=False)
    layer.double()
    plain.double()
    x = x.double()
    assert same(torch.bfloat16)


def test_callback_runs_with_the_callers_gradient_mode() -> None:
    teacher, modes = TimmTeacher(small("deit_tiny_patch16_224")), []
    teacher(torch.rand(1, 3, 32, 32), lambda *layer: modes.append(torch.is_grad_enabled()))
    with torch.no_grad():
        teacher(torch.rand(1, 3, 32, 32), lambda *layer: modes.append(torch.is_grad_enabled()))
    assert modes == [True, True, False, False]


def test_own_statistics() -> None:
    teacher = TimmTeacher(small("vit_tiny_patch16_224"))
    assert teacher.mean.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_nano_rw_256", "maxvit_tiny_tf_224"]
    + ["twins_svt_small", "hiera_tiny_224", "pvt_v2_b0", "nest_tiny", "davit_tiny", "levit_128s"],
)
def test_windows_and_changing_grids_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^TimmTeacher: cannot read Q and K of {name}: (it has no list|expected Q)"):
        TimmTeacher(timm.create_model(name, num_classes=2))


@pytest.mark.parametrize("name", ["convit_tiny", "cait_xxs24_224", "naflexvit_base_patch16_gap"])
def test_attention_that_is_not_that_of_a_plain_layer_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^TimmTeacher: cannot read Q and K of {name}: expected "):
        TimmTeacher(small(name))


def test_windowed_attention_is_refused() -> None:
    model = timm.create_model("samvit_base_patch16", depth=2, embed_dim=32, num_heads=2, img_size=64, window_size=2)
    with pytest.raises(ValueError, match="cannot read Q and K of samvit_base_patch16: its attention does not run over"):
        TimmTeacher(model)


def test_model_without_attention_is_refused() -> None:
    model = timm.create_model("resnet18", num_classes=2)
    with pytest.raises(ValueError, match="cannot read Q and K of resnet18: it has no list of 'blocks'"):
        TimmTeacher(model)


class NoAttention(nn.Module):
    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        return x


def test_layers_that_show_nothing_are_counted() -> None:
    model = small("deit_tiny_patch16_224")
    model.blocks[1].attn = NoAttention()
    with pytest.raises(ValueError, match="expected Q and K of 2 layers, got 1"):
        TimmTeacher(model)


def test_images_of_another_size() -> None:
    teacher = TimmTeacher(small("deit_tiny_patch16_224"))
    grey = torch.full((1, 3, 40, 48), 0.25)
    torch.testing.assert_close(teacher(grey), teacher(torch.full((1, 3, 32, 32), 0.25)))
    spots = torch.zeros(1, 3, 64, 64)
    spots[..., ::2, ::2] = 1  # finer than the teacher's pixels: they must come out as grey, not as black or white
    seen = []
    teacher.model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher(spots)
    inner = (seen[0] * teacher.std + teacher.mean)[..., 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="expected images of 3 channels, got 1"):
        teacher(torch.rand(1, 1, 32, 32))
