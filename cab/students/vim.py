"""Vision Mamba (Vim, arXiv:2401.09417) as a distillation student, registered with timm.

``timm.create_model("vim_tiny_patch16_224")`` finds the models here once this module is imported. Parameter names and
shapes are those of hustvl/Vim with the class token in the middle, so that its checkpoints load with ``strict=True``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchEmbed, lecun_normal_, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from cab.patches import patches_as_products
from cab.students.mamba import AInit, BidirectionalMamba
from cab.students.student import ImageStudent, Projections
from cab.token_map import TokenLayout
from cab_kernels import rms_norm_fn


class AddNorm(nn.Module):
    """What a block has to add to the residual stream is added, and the sum normalised (RMSNorm), in one pass."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised sum, in the dtype in which a linear layer wants it, and the sum, float32 at least."""
        normed, residual_out = rms_norm_fn(
            hidden, self.weight, residual=residual, eps=self.eps, prenorm=True, residual_in_fp32=True
        )
        return normed, residual_out


class Block(nn.Module):
    """A pre-norm residual block around the mixer. What it adds to the stream is added by the norm after it."""

    def __init__(self, d_model: int, d_state: int, drop_path: float, a_init: AInit) -> None:
        super().__init__()
        self.norm = AddNorm(d_model)
        self.mixer = BidirectionalMamba(d_model, d_state=d_state, a_init=a_init)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Projections, Projections]]:
        """Mix the tokens of the stream.

        Args:
            hidden: (batch, length, d_model), what is still to be added to the stream.
            residual: (batch, length, d_model), the stream; None before the first block.

        Returns:
            What is to be added next, the stream, and B and C of the forward and of the backward direction.
        """
        normed, residual = self.norm(hidden, residual)
        mixed, projections = self.mixer(normed)
        return self.drop_path(mixed), residual, projections


class VisionMamba(ImageStudent):
    """Vision Mamba: patches, a class token in their middle, bidirectional Mamba blocks, a linear head on that token.

    Args:
        img_size: height and width of the images in pixels, or one number for both; multiples of ``patch_size``.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 leaves it out.
        embed_dim: width of a token.
        depth: blocks.
        d_state: states of a channel of the scan.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        a_init: where A starts: "s4d", or "zero" (linear attention).

    Raises:
        ValueError: ``img_size`` is not a multiple of ``patch_size``.
    """

    directions = 2

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        a_init: AInit = "s4d",
    ) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        if any(side % patch_size for side in self.img_size):
            raise ValueError(
                f"VisionMamba: expected img_size a multiple of patch_size {patch_size}, got {self.img_size}"
            )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.d_state = d_state
        self.num_layers = depth
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        patches_as_products(self.patch_embed)
        patches = self.patch_embed.num_patches
        middle = patches // 2
        places = tuple(place + (place >= middle) for place in range(patches))
        self.token_layout = TokenLayout(self.patch_embed.grid_size, cls=middle, patches=places)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        drops = [drop_path_rate * layer / max(depth - 1, 1) for layer in range(depth)]
        self.layers = nn.ModuleList(Block(embed_dim, d_state, drop, a_init) for drop in drops)
        self.norm_f = AddNorm(embed_dim)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()
        self.register_load_state_dict_pre_hook(_resample_position_embedding)

    def _init_weights(self) -> None:
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        for mixer in self.modules():
            if isinstance(mixer, BidirectionalMamba):
                # As in GPT-2: the residual branches start smaller the more of them there are.
                nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    mixer.out_proj.weight /= math.sqrt(len(self.layers))
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """A, D and the embeddings, by name; timm spares biases and norms, which have one axis, by itself."""
        spared = {"A_log", "A_b_log", "D", "D_b", "cls_token", "pos_embed"}
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in spared}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for timm's decay of the learning rate by layer."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_head()

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised tokens (batch, patches + 1, embed_dim), the class token in the middle."""
        return self._tokens(images)[0]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        cls = tokens[:, self.token_layout.cls]
        return cls if pre_logits else self.head(cls)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        return self.forward_head(self.forward_features(images))

    def forward_with_projections(self, images: Tensor) -> tuple[Tensor, list[tuple[Projections, ...]]]:
        tokens, projections = self._tokens(images)
        return self.forward_head(tokens), projections

    def _tokens(self, images: Tensor) -> tuple[Tensor, list[tuple[Projections, ...]]]:
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(
                f"VisionMamba: expected images of (height, width) = {self.img_size}, got {tuple(images.shape[-2:])}"
            )
        patches = self.patch_embed(images)
        middle = self.token_layout.cls
        before, after = patches.split([middle, patches.shape[1] - middle], dim=1)  # whose gradient is one concatenation
        cls = self.cls_token.to(patches.dtype).expand(len(patches), -1, -1)
        hidden, residual = self.pos_drop(torch.cat((before, cls, after), dim=1) + self.pos_embed), None
        projections = []
        for block in self.layers:
            hidden, residual, of_block = block(hidden, residual)
            projections.append(of_block)
        return self.norm_f(hidden, residual)[0], projections


def _resample_position_embedding(model: VisionMamba, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Fit the position embedding of a checkpoint to this model's grid; that of the class token stays as it is."""
    name = f"{prefix}pos_embed"
    if name not in state or state[name].shape == model.pos_embed.shape:
        return
    stored = state[name]
    side = math.isqrt(stored.shape[1] - 1)
    if side * side != stored.shape[1] - 1:
        raise ValueError(
            f"VisionMamba: expected a position embedding of a square grid, got {stored.shape[1] - 1} patches"
        )
    before, cls, after = stored.tensor_split([side * side // 2, side * side // 2 + 1], dim=1)
    patches = resample_abs_pos_embed(
        torch.cat((before, after), dim=1), list(model.patch_embed.grid_size), old_size=[side, side], num_prefix_tokens=0
    )
    before, after = patches.tensor_split([model.token_layout.cls], dim=1)
    state[name] = torch.cat((before, cls, after), dim=1)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224": _cfg(),
        "vim_small_patch16_224": _cfg(),
        "vim_base_patch16_224": _cfg(),
        "vim_micro_patch2_8": _cfg(input_size=(3, 8, 8), num_classes=10),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], overrides: dict[str, Any]) -> VisionMamba:
    return build_model_with_cfg(VisionMamba, variant, pretrained, **{**defaults, **overrides})


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Tiny: 24 blocks of width 192, 7 M parameters."""
    return _create("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Small: 24 blocks of width 384, 26 M parameters."""
    return _create("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Base: 24 blocks of width 768, 98 M parameters."""
    return _create("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_micro_patch2_8(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A Vim for images of 8 x 8 pixels, small enough to train on a CPU: 8 blocks of width 64."""
    defaults = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 8, "num_classes": 10}
    return _create("vim_micro_patch2_8", pretrained, defaults, kwargs)
