import pytest
import torch
from language_models import make
from torch import Tensor, nn

from cab.students.from_teacher import start_from_teacher
from cab.students.language import LanguageStudent

# Heads and states of the teacher's size, so that everything fits: two groups of K repeated to four heads.
FITTING = {"expand": 1, "num_heads": 4, "head_dim": 8, "n_groups": 4, "state_size": 8}


def randomise_norms(model: nn.Module) -> None:
    """Away from 1, which all of them start at."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)


def of_attention(family: str, model: nn.Module, layer: int) -> list[Tensor]:
    """Weights of Q, K, V and O written out for each family, heads one after the other, K and V repeated."""
    if family == "llama":
        part = model.model.layers[layer].self_attn
        repeated = [
            torch.cat([matrix[8 * (head // 2) : 8 * (head // 2) + 8] for head in range(4)])
            for matrix in (part.k_proj.weight, part.v_proj.weight)
        ]
        return [part.q_proj.weight, *repeated, part.o_proj.weight]
    if family == "gpt2":
        part = model.transformer.h[layer].attn
        columns = [part.c_attn.weight[:, 32 * i : 32 * i + 32].T for i in range(3)]
        return [*columns, part.c_proj.weight.T]
    part = model.gpt_neox.layers[layer].attention
    rows = [
        torch.cat([part.query_key_value.weight[24 * head + 8 * i : 24 * head + 8 * i + 8] for head in range(4)])
        for i in range(3)
    ]
    return [*rows, part.dense.weight]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_all_that_fits_is_copied(family: str) -> None:
    student, teacher = make("mamba2", **FITTING), make(family, seed=1)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    copied = start_from_teacher(student, teacher, [1, 0])
    for layer, source in enumerate((1, 0)):
        query, key, value, out = of_attention(family, teacher, source)
        mixer = student.backbone.layers[layer].mixer
        gate, x, B, C, dt = mixer.in_proj.weight.split([32, 32, 32, 32, 4])
        assert all(map(torch.equal, (x, B, C, mixer.out_proj.weight), (value, key, query, out)))
        old_gate, *_, old_dt = before[f"backbone.layers.{layer}.mixer.in_proj.weight"].split([32, 32, 32, 32, 4])
        assert torch.equal(gate, old_gate)
        assert torch.equal(dt, old_dt)
        slots = {f"layers.{layer}.mixer.{name}" for name in ("out_proj", "in_proj.x", "in_proj.B", "in_proj.C")}
        assert slots <= set(copied)
    assert torch.equal(student.backbone.embeddings.weight, teacher.get_input_embeddings().weight)


def test_the_copied_layer_is_the_teachers_linear_attention() -> None:
    """By hand: with no convolution, no decay and no gate the mixer adds up C_t . B_s x_s, the teacher's Q, K and V."""
    student, teacher = make("mamba2", **FITTING, conv_kernel=1), make("llama", seed=1)
    start_from_teacher(student, teacher, [0, 1])
    attention, mixer = teacher.model.layers[0].self_attn, student.backbone.layers[0].mixer
    hidden = torch.randn(1, 5, 32)
    _, x, B, C, _ = nn.functional.linear(hidden, mixer.in_proj.weight).split([32, 32, 32, 32, 4], dim=-1)
    scores = torch.einsum("bthn,bshn->bhts", C.unflatten(-1, (4, 8)), B.unflatten(-1, (4, 8))).tril()
    mixed = torch.einsum("bhts,bshn->bthn", scores, x.unflatten(-1, (4, 8))).flatten(2)
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, 8)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = ((query @ key.mT).tril() @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer.out_proj(mixed), attention.o_proj(expected))


def test_discrete_mamba2_starts_as_its_teacher_with_linear_attention() -> None:
    """The whole model: the teacher's blocks, with Q K^T V, causal and without rotation, in the place of attention."""
    sizes = {"num_heads": 4, "head_dim": 8, "n_groups": 4, "state_size": 8, "tie_word_embeddings": False}
    student, teacher = make("discrete_mamba2", **sizes), make("llama", seed=1)
    randomise_norms(teacher)
    start_from_teacher(student, teacher, [0, 1])
    LanguageStudent(student).start_at_linear_attention()
    ids = torch.randint(48, (2, 19))
    hidden = teacher.model.embed_tokens(ids)
    for block in teacher.model.layers:
        inside, attention = block.input_layernorm(hidden), block.self_attn
        query, key, value = (
            projection(inside).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        hidden = hidden + attention.o_proj(((query @ key.mT).tril() @ value).transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    expected = teacher.lm_head(teacher.model.norm(hidden))
    torch.testing.assert_close(student(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_keeps_attention_starts_as_the_teachers_own() -> None:
    """Its attention, its norms and its MLP: the whole block computes what the teacher's computes."""
    sizes = {"mamba_expand": 1, "mamba_d_head": 8, "mamba_n_groups": 4, "mamba_d_state": 8}
    rotary = {"rope_type": "default", "rope_theta": 100.0}
    student, teacher = make("bamba", **sizes), make("llama", seed=1, num_hidden_layers=3, rope_parameters=rotary)
    randomise_norms(teacher)
    copied = start_from_teacher(student, teacher, [0, 1, 2])
    assert {f"layers.1.attention.{name}" for name in ("query", "key", "value", "out")} <= set(copied)
    assert {f"layers.0.mixer.{name}" for name in ("out_proj", "in_proj.x", "in_proj.B", "in_proj.C")} <= set(copied)
    hidden, positions = torch.randn(2, 9, 32), torch.arange(9)[None]
    out, expected = (
        model.layers[1](hidden, position_ids=positions, position_embeddings=model.rotary_emb(hidden, positions))
        for model in (student.model, teacher.model)
    )
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)
    for place, layer in enumerate(student.model.layers):  # their MLPs and norms, too
        of_teacher = teacher.model.layers[place]
        assert torch.equal(layer.input_layernorm.weight, of_teacher.input_layernorm.weight)
        out, expected = (
            part.mlp(part.norm(hidden))
            for part in (
                nn.ModuleDict({"norm": layer.pre_ff_layernorm, "mlp": layer.feed_forward}),
                nn.ModuleDict({"norm": of_teacher.post_attention_layernorm, "mlp": of_teacher.mlp}),
            )
        )
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_rms_norms_are_copied_and_others_are_not() -> None:
    student = make("mamba", expand=1)
    for family, expected in (("llama", True), ("gpt2", False), ("gemma", False)):
        teacher = make(family, seed=1)
        randomise_norms(teacher)
        copied = start_from_teacher(student, teacher, [0, 1])
        assert ({"norm_f", "layers.0.norm", "layers.1.norm"} <= set(copied)) is expected
    # B and C of Mamba are made of the convolved channels, not of the tokens: nothing of the teacher fits.
    assert {name for name in copied if name.startswith("layers.0.mixer")} == {
        "layers.0.mixer.out_proj",
        "layers.0.mixer.in_proj.x",
    }


def test_what_does_not_fit_keeps_its_own_start() -> None:
    student, teacher = make("mamba"), make("llama", seed=1, hidden_size=16, head_dim=8)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    assert start_from_teacher(student, teacher, [0, 1]) == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())


def test_vocabularies_that_differ_share_their_first_rows() -> None:
    student, teacher = make("mamba", vocab_size=56, tie_word_embeddings=False), make("llama", seed=1)
    own = student.backbone.embeddings.weight[48:].clone()
    copied = start_from_teacher(student, teacher, [0, 1])
    assert {"embeddings", "lm_head"} <= set(copied)
    assert torch.equal(student.lm_head.weight[:48], teacher.lm_head.weight)
    assert torch.equal(student.backbone.embeddings.weight[48:], own)


@pytest.mark.parametrize("why", ["quantised", "on the disk"])
def test_weights_that_are_not_numbers_in_memory_are_refused(why: str) -> None:
    teacher = make("llama")
    if why == "quantised":
        teacher.is_quantized = True
    else:
        teacher.lm_head.to("meta")
    with pytest.raises(ValueError, match="got one that is quantised or partly on the disk"):
        start_from_teacher(make("mamba2"), teacher, [0, 1])
