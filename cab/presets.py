"""Presets and arms: the named values from which a run starts.

A *preset* says what is trained on what. An *arm* is a named variant of one run: the paper's bridge, or a control that
leaves something out. Plain Python, as the configuration is.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cab.config import LanguageConfig, VisionConfig


@dataclass(frozen=True)
class Variant:
    """A named set of values, with the line that explains it; a preset also says what kind of run they are for."""

    help: str
    overrides: Mapping[str, Any]
    kind: type[VisionConfig] | type[LanguageConfig] = VisionConfig


_CAB = {"bridge.enabled": True, "bridge.aligns": "projections", "student.a_init": "zero"}

ARMS: Mapping[str, Variant] = types.MappingProxyType(
    {
        "cab": Variant("the paper's: bridge and A ~ 0", _CAB),
        "cab-adaptive": Variant(
            "bridge, A ~ 0; the alignment's weight follows the agreement of the gradients",
            {**_CAB, "loss.schedule": "adaptive"},
        ),
        "cab-softmax": Variant(
            "the published code's targets and weight: bridge to softmax of K and Q, A ~ 0",
            {**_CAB, "bridge.targets": "softmax", "loss.align": 3.0},
        ),
        "cab-s4d": Variant("bridge, Mamba's own A", {**_CAB, "student.a_init": "s4d"}),
        "attention": Variant(
            "control: the whole attention matrix instead of K and Q, no bridge, A ~ 0; images only",
            {**_CAB, "bridge.aligns": "attention"},
        ),
        "soft-kd": Variant("control: KL alone, Mamba's own A", {"bridge.enabled": False, "student.a_init": "s4d"}),
        "soft-kd-a0": Variant("control: KL alone, A ~ 0", {"bridge.enabled": False, "student.a_init": "zero"}),
        "ce": Variant(
            "control: labels alone, no teacher",
            {"bridge.enabled": False, "student.a_init": "s4d", "loss.kl": 0.0, "loss.ce": 1.0},
        ),
        "custom": Variant("exactly what the configuration says", {}),
    }
)

# A recipe for ImageNet-1k. The published learning rate is 5e-4 for 512 images a step, in proportion to the batch.
_IMAGENET = {
    "log_gradients": True,
    "log_every": 100,
    "eval_every": 10_000,
    "save_every": 5_000,
    "data.workers": 8,
    "optim.steps": 600_000,
    "optim.batch_size": 64,
    "optim.lr": 5e-4 * 64 / 512,
    "optim.min_lr": 1e-5,
    "optim.warmup": 5 / 300,
    "optim.clip": 0.0,
}
# DeiT's augmentation (arXiv:2012.12877, table 9), which the published code uses.
_DEIT_AUGMENTATION = {"data.augment": "rand", "data.mixup": 0.8, "data.cutmix": 1.0, "data.smoothing": 0.1}
_IMAGENET_EPOCH = 1_281_167  # training images
_LOW_DATA = {**_IMAGENET, "data.fraction": 0.1}
_LANGUAGE = {"graph": False, "optim.batch_size": 8, "optim.weight_decay": 0.1}
_LM_LOCAL = {
    "arms": ("soft-kd", "soft-kd-a0", "cab"),
    "log_every": 10,
    "eval_every": 100,
    "save_every": 100,
    "data.name": "python",
    "data.tokenizer": "bytes",
    "data.length": 128,
    "data.limit": 2_000_000,
    "data.test_tokens": 20_000,
    "graph": False,
    "teacher.steps": 300,
    "teacher.lr": 3e-3,
    "student.width": 64,
    "student.depth": 4,
    "bridge.hidden": 64,
    "bridge.targets": "standardised",
    "loss.align": 0.1,
    "optim.steps": 150,
    "optim.batch_size": 16,
    "optim.lr": 3e-3,
}
_SMALL = {"teacher.name": "deit_small_patch16_224", "student.name": "vim_small_patch16_224"}


def _all_data(aligned: int) -> dict[str, Any]:
    """300 epochs on all of ImageNet-1k, of which the first ``aligned`` have the alignment."""
    return {
        **_IMAGENET,
        "optim.steps": 300 * _IMAGENET_EPOCH // 512,
        "optim.batch_size": 512,
        "optim.lr": 5e-4,
        "loss.schedule": "until",
        "loss.until": aligned / 300,
    }


PRESETS: Mapping[str, Variant] = types.MappingProxyType(
    {
        "digits": Variant(
            "scikit-learn's digits; a small ViT trained on the spot teaches a small Vim on 10 %; minutes on a CPU",
            {
                "arms": ("soft-kd", "soft-kd-a0", "cab"),
                "threads": 1,  # its tensors are too small to share: two threads took nearly twice as long
                "log_every": 5,
                "eval_every": 25,
                "save_every": 100,
                "data.name": "digits",
                "data.fraction": 0.1,
                "data.image_size": 8,
                "data.augment": "none",
                "data.workers": 0,
                "teacher.name": "vit_tiny_patch16_224",
                "teacher.pretrained": False,
                "teacher.patch_size": 2,
                "teacher.embed_dim": 64,
                "teacher.depth": 4,
                "teacher.num_heads": 4,
                "teacher.steps": 800,
                "teacher.lr": 2e-3,
                "student.name": "vim_micro_patch2_8",
                "student.depth": 4,
                "bridge.hidden": 64,
                "optim.steps": 200,
                "optim.batch_size": 32,
                "optim.lr": 1e-3,
            },
        ),
        "vision": Variant(
            "a folder of images, a pretrained timm ViT as teacher, Vim-Tiny at 224 x 224; needs data.root and a GPU", {}
        ),
        "imagenet-vim-tiny": Variant(
            "the paper's low-data recipe: DeiT-Tiny teaches Vim-Tiny for 600,000 steps of 64 images, whatever the "
            "--fraction (3000, 600, 300 and 150 epochs of 0.01, 0.05, 0.1 and 0.2); needs data.root",
            _LOW_DATA,
        ),
        "imagenet-vim-small": Variant("the same for DeiT-Small and Vim-Small", {**_LOW_DATA, **_SMALL}),
        "imagenet-vim-tiny-controls": Variant(
            "the low-data recipe for the paper's method and every control, one student after the other",
            {**_LOW_DATA, "arms": ("ce", "soft-kd", "soft-kd-a0", "cab-s4d", "attention", "cab-softmax", "cab")},
        ),
        "imagenet-vim-tiny-full": Variant(
            "the paper's recipe for all of the data: 300 epochs, aligned for the first 35", _all_data(35)
        ),
        "imagenet-vim-tiny-full-50": Variant("the same, aligned for the first 50", _all_data(50)),
        "imagenet-vim-small-full": Variant(
            "all of the data, aligned for the first 35 epochs, for DeiT-Small and Vim-Small",
            {**_all_data(35), **_SMALL},
        ),
        "imagenet-vim-small-full-50": Variant("the same, aligned for the first 50", {**_all_data(50), **_SMALL}),
        "imagenet-vim-tiny-code": Variant(
            "the published code's recipe: softmax targets of weight 3, DeiT's augmentation, averaged weights",
            {
                **_LOW_DATA,
                **_DEIT_AUGMENTATION,
                "arms": ("cab-softmax",),
                "student.drop_path": 0.1,
                "optim.ema": 0.99996,
            },
        ),
        "lm-local": Variant(
            "Python's standard library as text, byte by byte; a small Llama trained on the spot teaches a small Mamba",
            _LM_LOCAL,
            LanguageConfig,
        ),
        "lm-local-gpu": Variant(
            "the same, larger: 512 bytes of context, a Llama of 8 layers and a Mamba of 6; minutes on a GPU",
            {
                **_LM_LOCAL,
                "log_every": 50,
                "eval_every": 300,
                "save_every": 300,
                "data.length": 512,
                "data.limit": 20_000_000,
                "data.test_tokens": 200_000,
                "teacher.width": 384,
                "teacher.depth": 8,
                "teacher.heads": 6,
                "teacher.steps": 1500,
                "teacher.lr": 1e-3,
                "student.width": 256,
                "student.depth": 6,
                "bridge.hidden": 128,
                "optim.steps": 600,
                "optim.batch_size": 32,
                "optim.lr": 1e-3,
            },
            LanguageConfig,
        ),
        "lm": Variant(
            "a Hugging Face decoder teaches a Mamba of 130 M parameters; needs teacher.name, data.path and a GPU",
            {**_LANGUAGE, "loss.schedule": "until", "loss.until": 0.1},
            LanguageConfig,
        ),
        "lm-stages": Variant(
            "the paper's two stages: alignment alone on 200 M tokens, then the KL alone on 2,000 M, in steps of 256 "
            "sequences of 1,024; needs teacher.name, data.path and a GPU",
            {
                **_LANGUAGE,
                "optim.steps": 2_200_000_000 // (256 * 1024),
                "optim.batch_size": 32,
                "optim.accumulation": 8,
                "optim.lr": 2e-5,
                "optim.warmup": 0.1,
                "loss.schedule": "stages",
                "loss.until": 1 / 11,
            },
            LanguageConfig,
        ),
    }
)
