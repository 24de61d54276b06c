"""Mamba blocks of transformers on our ops: the same numbers as its own sequential fallback."""

import pytest
import torch
from language_models import VOCABULARY, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache
from transformers.models.mamba import modeling_mamba
from transformers.utils import ModelOutput

from cab.students import transformers_mamba
from cab.students.transformers_mamba import use_cab_kernels

FAMILIES = ("mamba", "falcon_mamba")


def batch() -> tuple[Tensor, Tensor]:
    """Two sequences, the second with two tokens of padding on its left."""
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def both(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    return make(family).to(dtype), use_cab_kernels(make(family).to(dtype))


def cache_of(output: ModelOutput) -> dict[str, Cache]:
    """The argument that goes on from an output; transformers before 5.24 names it differently."""
    name = "cache" if "cache" in output else "cache_params"
    return {name: output[name]}


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids, mask = batch()
    model.train()
    result = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    result.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return result.logits[mask.bool()].detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_within_the_error_budget_of_the_fallback(family: str) -> None:
    """Against transformers in float64: at most twice the error that its own float32 has, plus a rounding."""
    gold_logits, gold = run(make(family).double())
    (own_logits, own), (logits, gradients) = (run(model) for model in both(family))

    def check(name: str, got: Tensor, peer: Tensor, exact: Tensor) -> None:
        scale = exact.abs().max()
        budget = 2 * (peer - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * scale
        assert (got - exact).abs().max() <= budget, name

    check("logits", logits, own_logits, gold_logits)
    assert gradients.keys() == gold.keys()
    for name, exact in gold.items():
        assert exact.any(), name
        check(name, gradients[name], own[name], exact)


@pytest.mark.parametrize("options", [{}, {"residual_in_fp32": False}], ids=["stream-float32", "stream-bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bfloat16_give_dtypes_and_logits_of_transformers(family: str, options: dict) -> None:
    """The norm takes the stream in its weights' dtype, as transformers does."""
    ids, mask = batch()
    own, ours = make(family, **options).bfloat16(), use_cab_kernels(make(family, **options).bfloat16())
    with torch.no_grad():
        exact = make(family, **options)(ids, attention_mask=mask).logits[mask.bool()]
        expected, got = (model(ids, attention_mask=mask, output_hidden_states=True) for model in (own, ours))
    assert [hidden.dtype for hidden in got.hidden_states] == [hidden.dtype for hidden in expected.hidden_states]
    budget = (
        2 * (expected.logits[mask.bool()] - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    )
    assert (got.logits[mask.bool()] - exact).abs().max() <= budget


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same_tokens_one_step_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = transformers_mamba.selective_state_update
    monkeypatch.setattr(
        transformers_mamba, "selective_state_update", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs)
    )
    ids, mask = batch()
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    own, ours = (model.generate(ids, **settings) for model in both(family))
    assert own.shape == (2, 31)
    assert torch.equal(own, ours)
    assert len(steps) == 2 * 11  # two layers; the prompt gives the first token


def test_a_single_token_that_is_learnt_from_has_its_gradient() -> None:
    """The one-token step is for inference; where gradients are wanted the scan takes its place."""
    ids, _ = batch()
    model = use_cab_kernels(make("mamba"))
    first = model(ids[:, :18], use_cache=True)
    model(ids[:, 18:], **cache_of(first), use_cache=True).logits.sum().backward()
    assert model.backbone.layers[0].mixer.x_proj.weight.grad.any()


@pytest.mark.parametrize("split", [1, 2, 7, 18])
def test_a_prompt_in_parts_goes_on_from_the_cache(split: int) -> None:
    """transformers' own blocks forget the state between the parts."""
    ids, _ = batch()
    model = use_cab_kernels(make("mamba"))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :split], use_cache=True)
        second = model(ids[:, split:], **cache_of(first), use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_those_that_run_alone(family: str) -> None:
    """With cu_seqlens in the mask's place; the second document is shorter than the convolution."""
    ids, _ = batch()
    model = use_cab_kernels(make(family))
    bounds = torch.tensor([0, 9, 11, 19], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids[:1], attention_mask=bounds, use_cache=False).logits
        alone = [model(part).logits for part in ids[:1].split([9, 2, 8], dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="use_cab_kernels: expected use_cache=False with packed documents, got"):
            model(ids[:1], attention_mask=bounds, use_cache=True)


def test_checkpoints_stay_those_of_transformers(tmp_path) -> None:
    ids, _ = batch()
    model = use_cab_kernels(make("mamba"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.backbone.layers[0].mixer) is modeling_mamba.MambaMixer
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-6)


def test_twice_is_as_good_as_once() -> None:
    model = use_cab_kernels(make("mamba"))
    assert use_cab_kernels(model) is model
    kinds = {type(module).__name__ for module in model.modules() if "Mamba" in type(module).__name__}
    assert kinds == {"MambaForCausalLM", "MambaModel", "KernelMambaBlock", "KernelMambaMixer", "KernelMambaRMSNorm"}
    run(model)


def test_transformers_own_kernels_are_not_asked(monkeypatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("transformers' own function was called")

    for name in (
        "mamba_inner_fn",
        "mamba_selective_scan",
        "mamba_selective_state_update",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    ):
        monkeypatch.setattr(modeling_mamba, name, forbidden)
    ids, _ = batch()
    model = use_cab_kernels(make("mamba"))
    run(model)
    model.eval().generate(ids, max_new_tokens=3)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, "expected a model with Mamba mixers, got GPT2LMHeadModel"),
        ("mamba", {"hidden_act": "gelu"}, "expected activation 'silu', got 'gelu'"),
    ],
)
def test_models_that_cannot(family: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_cab_kernels(make(family, **options))
