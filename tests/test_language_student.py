import pytest
import torch
import torch.nn.functional as F
from language_models import VOCABULARY, checkpoint_blocks, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.bamba import modeling_bamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from cab.students import discrete_mamba2
from cab.students.language import LanguageStudent, attention_blocks
from cab_kernels.inner import reference

FAMILIES = {"mamba": 4, "falcon_mamba": 4, "mamba2": 8, "bamba": 8, "discrete_mamba2": 8}  # with the width of B and C
OF_MAMBA2 = {"mamba2": (modeling_mamba2, "n_groups"), "bamba": (modeling_bamba, "mamba_n_groups")}


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def mixers_of(student: LanguageStudent) -> list[nn.Module]:
    blocks = student.model.base_model.layers
    return [block.mamba for block in blocks if hasattr(block, "mamba")] or [block.mixer for block in blocks]


def rows_of_b_and_c(mixer: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """The gradient of the rows that make B, and of those that make C."""
    if hasattr(mixer, "x_proj"):
        return mixer.x_proj.weight.grad[-2 * n : -n], mixer.x_proj.weight.grad[-n:]
    inner = mixer.intermediate_size
    return mixer.in_proj.weight.grad[2 * inner :][:n], mixer.in_proj.weight.grad[2 * inner + n :][:n]


def fused_mamba2(
    projected, weight, bias, dt_bias, A, *, D, chunk_size, rmsnorm_weight, rmsnorm_eps, **options
) -> Tensor:
    """What mamba_ssm's fused call does where it is installed: everything behind in_proj, B and C inside."""
    batch, length, _ = projected.shape
    heads, head_dim, groups = len(dt_bias), options["headdim"], options["ngroups"]
    gate, x, dt = projected.split([heads * head_dim, len(weight), heads], dim=-1)
    x = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=len(weight))).transpose(1, 2)
    state = (len(weight) - heads * head_dim) // 2
    u, B, C = x.split([heads * head_dim, state, state], dim=-1)
    B, C = (part.reshape(batch, length, groups, -1) for part in (B, C))
    u = u.reshape(batch, length, heads, head_dim)
    y = modeling_mamba2.mamba2_chunk_scan(u, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)
    gated = (y.flatten(2) * F.silu(gate)).unflatten(-1, (groups, -1))
    normalised = (gated * (gated.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()).flatten(2)
    return F.linear(rmsnorm_weight * normalised, options["outproj_weight"], options["outproj_bias"])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "mamba_ssm"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_b_and_c_carry_their_gradient_to_every_layer(family, checkpointing, fused, monkeypatch) -> None:
    """Also where one fused call hides them, and where the backward pass runs every block a second time."""
    # Versions of transformers differ in the norm of several groups.
    groups = {OF_MAMBA2[family][1]: 1} if family in OF_MAMBA2 else {}
    student, plain = LanguageStudent(make(family, **groups)), LanguageStudent(make(family, **groups))
    if fused:
        monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", None)  # our mixer does not call it
        for module, _ in OF_MAMBA2.values():
            monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", fused_mamba2)
    student.train()
    if checkpointing:
        checkpoint_blocks(student.model)
    hidden, projections = student.forward_with_projections(ids())
    expected_hidden, expected = plain.eval().forward_with_projections(ids())
    torch.testing.assert_close(hidden, expected_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projections, expected, rtol=1e-4, atol=1e-6)
    for name, side in (("B", 0), ("C", 1)):
        seen = [getattr(layer, name).square().sum() for layers in projections for layer in layers]
        torch.stack(seen).sum().backward(retain_graph=True)
        mixers = mixers_of(student)
        assert len(seen) == len(mixers) == student.mamba_layers == 2
        for layer, mixer in enumerate(mixers):
            rows = rows_of_b_and_c(mixer, student.d_state)
            assert (rows[side].abs().sum(dim=1) > 0).all(), (name, layer)
        student.zero_grad()
    assert student._seen is None  # what the repeated blocks show is kept by no one


@pytest.mark.parametrize("family", FAMILIES)
def test_b_and_c_are_those_of_the_scan(family, monkeypatch) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    ours = (reference, "selective_scan_ref")
    module, name = (OF_MAMBA2[family][0], "mamba2_chunk_scan") if family in OF_MAMBA2 else ours
    if family == "discrete_mamba2":
        module, name = discrete_mamba2, "discrete_scan"
    original = getattr(module, name)

    def watched(u, delta, A, B, C, *args, **kwargs):
        given.append((B.flatten(2), C.flatten(2)) if family in OF_MAMBA2 else (B.mT, C.mT))
        return original(u, delta, A, B, C, *args, **kwargs)

    def watched_discrete(x, log_decay, B, C, *args, **kwargs):
        given.append((B.flatten(2), C.flatten(2)))
        return original(x, log_decay, B, C, *args, **kwargs)

    monkeypatch.setattr(module, name, watched_discrete if family == "discrete_mamba2" else watched)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        _, projections = LanguageStudent(make(family)).forward_with_projections(ids(), mask)
    assert [len(layers) for layers in projections] == ([1, 0, 1] if family == "bamba" else [1, 1])
    for layer, (B, C) in zip([layer for layers in projections for layer in layers], given, strict=True):
        assert layer.B.shape == (2, 11, FAMILIES[family])
        torch.testing.assert_close((layer.B[mask.bool()], layer.C[mask.bool()]), (B[mask.bool()], C[mask.bool()]))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_same_with_and_without_projections(family: str) -> None:
    student = LanguageStudent(make(family))
    with torch.no_grad():
        hidden = student(ids())
        assert torch.equal(hidden, student.forward_with_projections(ids())[0])
        torch.testing.assert_close(student.logits(hidden), make(family)(ids()).logits, rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    student = LanguageStudent(make("mamba")).train()
    checkpoint_blocks(student.model, use_reentrant=True)
    with pytest.raises(RuntimeError, match="gradient checkpointing must run with .*'use_reentrant': False"):
        student.forward_with_projections(ids())


def test_packed_documents_that_cannot_be_kept_apart() -> None:
    positions = torch.arange(11).expand(2, 11)
    with pytest.raises(ValueError, match="expected Mamba blocks and no padding with packed documents, got Mamba2For"):
        LanguageStudent(make("mamba2"))(ids(), position_ids=positions)
    with pytest.raises(ValueError, match="expected Mamba blocks and no padding with packed documents, got both"):
        LanguageStudent(make("mamba"))(ids(), torch.ones(2, 11), positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_start_at_linear_attention(family: str) -> None:
    """With A ~ 0 the state forgets nothing: it is the sum of all that came in."""
    student = LanguageStudent(make(family))
    student.start_at_linear_attention()
    for mixer in mixers_of(student):
        decay = torch.exp(-mixer.A_log.exp() * 100)  # over a step a thousand times as long as they start
        assert torch.allclose(decay, torch.ones(()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_spared_from_decay(family: str) -> None:
    spared = [name.split(".")[-3:] for name in sorted(LanguageStudent(make(family)).no_weight_decay())]
    own = ("A_log", "D", "dt_bias") if family in OF_MAMBA2 else ("A_log", "D")
    own = ("A_log",) if family == "discrete_mamba2" else own
    layers, mixer = ("02", "mamba") if family == "bamba" else ("01", "mixer")
    assert spared == [[layer, mixer, name] for layer in layers for name in own]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_alone_and_generating(family: str, tmp_path) -> None:
    student = LanguageStudent(make(family))
    student.forward_with_projections(ids())
    student.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids(), **settings), student.model.generate(ids(), **settings))


def test_model_without_b_and_c() -> None:
    with pytest.raises(
        ValueError, match="expected a model with B and C, .* got LlamaForCausalLM of model_type 'llama'"
    ):
        LanguageStudent(make("llama"))


def test_hybrid_without_a_mamba_block() -> None:
    with pytest.raises(
        ValueError, match="expected a block with B and C, got BambaForCausalLM with attention in all of"
    ):
        LanguageStudent(make("bamba", attn_layer_indices=[0, 1, 2]))


def test_blocks_that_keep_attention() -> None:
    assert attention_blocks("every-4", 10) == [3, 7]
    assert attention_blocks("7, 0", 8) == [0, 7]
    for text in ("every-1", "every-9", "every-0", "8", "-1", "0,1,2,3,4,5,6,7", "", "some"):
        with pytest.raises(ValueError, match=f"expected every-K or some of the blocks from 0 to 7, .* got '{text}'"):
            attention_blocks(text, 8)
