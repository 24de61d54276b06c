import pytest
import timm
import torch
from torch import nn

from cab.patches import PatchConv2d, patches_as_products


def conv(**kwargs: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, **{"kernel_size": (2, 3), "stride": (2, 3), **kwargs}).double()


@pytest.mark.parametrize("size", [(8, 12), (9, 14)], ids=["whole patches", "a rest that no window reaches"])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_are_those_of_the_convolution(size: tuple[int, int], bias: bool) -> None:
    results = []
    for swapped in (False, True):
        layer = conv(bias=bias)
        if swapped:
            patches_as_products(layer)
        assert (type(layer) is PatchConv2d) == swapped
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        out = layer(images)
        results.append((out, *torch.autograd.grad(out.square().sum(), (images, *layer.parameters()))))
    torch.testing.assert_close(*results)


def test_tokens_are_a_view_of_the_product() -> None:
    layer = conv()
    patches_as_products(layer)
    out = layer(torch.rand(2, 3, 8, 12).double())
    assert out.flatten(2).transpose(1, 2).data_ptr() == out.data_ptr()
    assert out.flatten(2).transpose(1, 2).is_contiguous()


def test_autocasts_dtype_is_the_products() -> None:
    layer = conv().float()
    patches_as_products(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(2, 3, 8, 12)).dtype == torch.bfloat16


@pytest.mark.parametrize("kwargs", [{"stride": 1}, {"padding": 1}, {"dilation": 2}])
def test_other_convolutions_stay(kwargs: dict[str, object]) -> None:
    layer = conv(**kwargs)
    patches_as_products(layer)
    assert type(layer) is nn.Conv2d


def test_parameters_and_names_stay() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    names = list(model.state_dict())
    weight = model.patch_embed.proj.weight
    patches_as_products(model)
    assert list(model.state_dict()) == names
    assert type(model.patch_embed.proj) is PatchConv2d
    assert model.patch_embed.proj.weight is weight
