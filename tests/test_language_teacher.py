from pathlib import Path

import pytest
import torch
from language_models import VOCABULARY, make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from cab.distill.language import LanguageTask
from cab.students.language import LanguageStudent, PlainLanguageModel
from cab.teachers.huggingface import HuggingFaceTeacher

# Scale of the scores where it is not 1 / sqrt(head_dim) = 8 ** -0.5.
SCALES = {"opt": 1.0, "xglm": 1.0, "gpt_neo": 1.0, "granite": 1.0, "gemma2": 1 / 16, "gemma3_text": 1 / 16}
# Heads of K where they are fewer than the four of Q.
KEY_HEADS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo2", "smollm3", "cohere", "granite"), 2),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt_oss", "stablelm", "starcoder2"), 2),
    "falcon": 1,
}
# Those whose scores are more than scale * Q K^T: biased by distance, capped, or joined by a sink.
OTHER_SCORES = ("bloom", "mpt", "gemma2", "gpt_oss")
# Those that positions do not keep packed documents apart in, falcon before transformers 5.24.
CROSSING = ("opt", "bloom", "gpt_oss", "falcon", "mpt", "xglm")
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt2", "opt", "gpt_neox", "gemma", "gemma2", "gemma3_text"),
    *(
        "olmo2",
        "smollm3",
        "cohere",
        "granite",
        "gpt_oss",
        "gptj",
        "gpt_neo",
        "codegen",
        "bloom",
        "falcon",
        "mpt",
        "xglm",
        "gpt_neox_japanese",
        "stablelm",
        "starcoder2",
    ),
)


def batch() -> tuple[Tensor, Tensor]:
    """Two sequences, the second with three tokens of padding on its left."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def layers_of(teacher: HuggingFaceTeacher, ids: Tensor, mask: Tensor | None = None) -> list[tuple[int, Tensor, Tensor]]:
    seen: list[tuple[int, Tensor, Tensor]] = []
    teacher(ids, mask, lambda *layer: seen.append(layer))
    return seen


@pytest.mark.parametrize("name", ["is_quantized", "hf_device_map"])
def test_a_quantised_or_spread_model_stays_as_it_is(name: str) -> None:
    model = make("llama")
    setattr(model, name, True)
    teacher, student = HuggingFaceTeacher(model), LanguageStudent(make("mamba"))
    task = LanguageTask(student, teacher).double().to("meta")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float64}
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in task.teacher.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in task.teacher.parameters()} == {"cpu"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_model_that_stays_gives_comes_to_where_the_tokens_are(family: str) -> None:
    """On tensors without values, which know their device all the same; the model lies on the CPU."""
    teacher, seen = HuggingFaceTeacher(make(family)), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 9, dtype=torch.long, device="cuda")
        given = [{"attention_mask": torch.ones_like(ids)}]
        if teacher.packs:
            given.append({"position_ids": torch.arange(9, device="cuda").expand(2, 9)})
        for options in given:
            hidden = teacher(ids, **options, on_layer=lambda layer, *q_and_k: seen.extend(q_and_k))
            seen.extend((hidden, teacher.logits(hidden)))
    assert len(seen) == 6 * len(given)
    assert {tensor.device.type for tensor in seen} == {"cuda"}


def test_a_model_that_stays_is_measured_where_it_is() -> None:
    model = make("llama")
    model.is_quantized = True
    plain = PlainLanguageModel(model).double().to("meta")
    kept = {(parameter.dtype, parameter.device.type) for parameter in plain.parameters()}
    assert kept == {(torch.float32, "cpu")}
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 9, dtype=torch.long, device="cuda")
        hidden = plain(ids, torch.ones_like(ids))
        assert hidden.device.type == plain.logits(hidden).device.type == "cuda"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_whose_weights_lie_on_the_disk_teaches_as_one_in_memory(family: str, tmp_path: Path) -> None:
    whole = make(family)
    whole.save_pretrained(tmp_path / "model")
    parts = ["lm_head", *(f"{whole.base_model_prefix}.{name}" for name, _ in whole.base_model.named_children())]
    options = {"device_map": dict.fromkeys(parts, "disk"), "offload_folder": str(tmp_path / "disk")}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert spread.get_input_embeddings().weight.is_meta
    teacher, other = HuggingFaceTeacher(spread), HuggingFaceTeacher(whole)
    task = LanguageTask(LanguageStudent(make("mamba")), teacher).to("cpu")
    ids, mask = batch()
    assert teacher.logits(teacher(ids, mask))[mask.bool()].equal(other.logits(other(ids, mask))[mask.bool()])
    assert len(layers_of(teacher, ids, mask)) == 2
    for (_, *got), (_, *expected) in zip(layers_of(teacher, ids, mask), layers_of(other, ids, mask), strict=True):
        assert all(map(torch.equal, got, expected))
    assert torch.isfinite(task(ids)["loss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_q_and_k_and_keeps_its_logits(family: str) -> None:
    teacher, (ids, mask) = HuggingFaceTeacher(make(family)), batch()
    seen: list[tuple[int, Tensor, Tensor]] = []
    logits = teacher.logits(teacher(ids, mask, lambda *layer: seen.append(layer)))
    with torch.no_grad():
        # Padding included: an attention function without its mask function silently attends to it.
        expected = make(family)(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
        assert (logits[1, -1] - teacher.logits(teacher(ids))[1, -1]).abs().max() > 1e-3
    heads = KEY_HEADS.get(family, 4)
    assert [layer for layer, _, _ in seen] == [0, 1]
    assert all(query.shape == (2, 4, 9, 8) and key.shape == (2, heads, 9, 8) for _, query, key in seen)
    assert not any(tensor.requires_grad for layer in seen for tensor in layer[1:])
    assert (teacher.num_layers, teacher.query_width, teacher.key_width) == (2, 32, 8 * heads)
    assert teacher.vocab_size == VOCABULARY


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OTHER_SCORES])
def test_q_and_k_are_those_of_the_scores(family: str) -> None:
    """After rotary embedding and normalisation: the attention maps of the untouched model come out of them."""
    teacher, (ids, _) = HuggingFaceTeacher(make(family)), batch()
    untouched = make(family, attn_implementation="eager")
    with torch.no_grad():
        maps = untouched(ids, output_attentions=True).attentions
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for layer, query, key in layers_of(teacher, ids):
        key = key.repeat_interleave(4 // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * SCALES.get(family, 8**-0.5)
        torch.testing.assert_close(
            scores.masked_fill(future, -torch.inf).softmax(-1), maps[layer], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", OTHER_SCORES)
def test_q_and_k_are_the_projections_by_hand(family: str) -> None:
    """Of the first layer, where the scores are more than their product: projected, split, and rotated where it is."""
    teacher, (ids, _) = HuggingFaceTeacher(make(family)), batch()
    backbone = teacher.model.base_model
    block = getattr(backbone, {"bloom": "h", "mpt": "blocks"}.get(family, "layers"))[0]
    attention = getattr(block, {"bloom": "self_attention", "mpt": "attn"}.get(family, "self_attn"))
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    _, query, key = layers_of(teacher, ids)[0]
    (hidden,) = inputs
    if family == "bloom":  # of each head Q, K and V
        by_hand = attention.query_key_value(hidden).unflatten(-1, (4, 3, 8)).unbind(-2)[:2]
    elif family == "mpt":
        by_hand = [part.unflatten(-1, (4, 8)) for part in attention.Wqkv(hidden).chunk(3, dim=-1)[:2]]
    else:
        cos, sin = (table[..., None, :4] for table in backbone.rotary_emb(hidden, torch.arange(9)[None]))
        by_hand = []
        for projection in (attention.q_proj, attention.k_proj):
            first, second = projection(hidden).unflatten(-1, (-1, 8)).chunk(2, dim=-1)
            by_hand.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    for got, expected in zip((query, key), by_hand, strict=True):
        torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bamba", "mamba2"])
def test_models_that_lack_attention_in_a_layer_are_refused_by_name(family: str) -> None:
    reason = {"bamba": "expected Q and K of 3 layers, got 1", "mamba2": "it has no attention heads"}[family]
    with pytest.raises(ValueError, match=f"cannot read Q and K of {type(make(family)).__name__}: {reason}"):
        HuggingFaceTeacher(make(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_tokens_as_a_head_is_wide(family: str) -> None:
    """The weighted sum of the values is then as square as the scores, and was counted as a layer of its own."""
    seen = layers_of(HuggingFaceTeacher(make(family)), batch()[0][:, :8])
    assert [layer for layer, _, _ in seen] == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_kept_apart_or_refused(family: str) -> None:
    """Logits, Q and K of packed documents are those of the documents by themselves."""
    teacher, (ids, _) = HuggingFaceTeacher(make(family)), batch()
    assert teacher.packs or family in CROSSING
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
    if not teacher.packs:
        with pytest.raises(ValueError, match="expected packed documents that are kept apart, .* which crosses them"):
            teacher(ids, position_ids=positions)
        return
    packed: list[tuple[int, Tensor, Tensor]] = []
    hidden = teacher(ids, on_layer=lambda *layer: packed.append(layer), position_ids=positions)
    for row, start, stop in ((0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 1), (1, 1, 9)):
        document = ids[row : row + 1, start:stop]
        torch.testing.assert_close(hidden[row, start:stop], teacher(document)[0], rtol=1e-4, atol=1e-5)
        for (_, *both), (_, *alone) in zip(packed, layers_of(teacher, document), strict=True):
            cut = [side[row : row + 1, :, start:stop] for side in both]
            torch.testing.assert_close(cut, alone, rtol=1e-4, atol=1e-5)


def test_packed_documents_and_padding_exclude_each_other() -> None:
    teacher, (ids, mask) = HuggingFaceTeacher(make("llama")), batch()
    with pytest.raises(ValueError, match="expected packed documents .*, without padding, got both"):
        teacher(ids, mask, position_ids=torch.arange(9).expand(2, 9))


def test_teacher_is_frozen_and_stays_in_evaluation_mode() -> None:
    teacher, (ids, mask) = HuggingFaceTeacher(make("gpt2", resid_pdrop=0.9)), batch()
    teacher.train()
    assert torch.equal(teacher(ids, mask), teacher(ids, mask))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_callback_runs_with_the_callers_gradient_mode() -> None:
    teacher, (ids, mask), modes = HuggingFaceTeacher(make("llama")), batch(), []
    teacher(ids, mask, lambda *layer: modes.append(torch.is_grad_enabled()))
    with torch.no_grad():
        teacher(ids, mask, lambda *layer: modes.append(torch.is_grad_enabled()))
    assert modes == [True, True, False, False]


def test_sixteen_bit_teacher() -> None:
    teacher, (ids, mask) = HuggingFaceTeacher(make("qwen3").bfloat16()), batch()
    assert [query.dtype for _, query, _ in layers_of(teacher, ids, mask)] == [torch.bfloat16] * 2


def test_model_generates_as_before() -> None:
    ids, _ = batch()
    model = make("llama")
    HuggingFaceTeacher(model)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), make("llama").generate(ids, **settings))


def test_longer_than_its_positions() -> None:
    teacher = HuggingFaceTeacher(make("gpt2"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel expected at most 64 tokens, got 65"):
        teacher(torch.zeros(1, 65, dtype=torch.int64))


def test_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read Q and K of MambaForCausalLM: it has no attention heads"):
        HuggingFaceTeacher(make("mamba"))


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a causal language model, got LlamaModel, which has no head"):
        HuggingFaceTeacher(make("llama").model)


def test_model_whose_tokens_see_those_behind_them_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.5}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **sizes))
    with pytest.raises(ValueError, match="expected a causal language model, got BertForMaskedLM, whose tokens see"):
        HuggingFaceTeacher(model)


def test_model_whose_rounding_follows_what_comes_behind_is_causal() -> None:
    """As that of LLM.int8 does, by a few per cent."""
    model, (ids, _) = make("llama"), batch()
    model.model.norm.register_forward_hook(lambda norm, inputs, hidden: hidden + 0.1 * hidden[:, 3:].mean(1, True))
    other = torch.cat((ids[:, :3], ids[:, 3:].flip(0)), dim=1)
    with torch.no_grad():
        before, after = (model(tokens).logits[:, :3] for tokens in (ids, other))
    assert 0.01 < (before - after).abs().max() / before.abs().max() < 0.1
    assert HuggingFaceTeacher(model).num_layers == 2


def test_a_layer_that_shows_nothing_is_counted() -> None:
    model = make("llama")
    model.model.layers[1].self_attn = Nothing()
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected Q and K of 2 layers, got 1"):
        HuggingFaceTeacher(model)


def test_layers_of_different_sizes_are_refused() -> None:
    model = make("opt")
    model.model.decoder.layers[1].self_attn = make("opt", num_attention_heads=2).model.decoder.layers[1].self_attn
    with pytest.raises(ValueError, match="its layers have Q and K of different sizes"):
        HuggingFaceTeacher(model)


def test_logits_that_are_made_otherwise_are_refused() -> None:
    model = make("llama")
    model.config.final_logit_softcapping = 0.1  # of other families; this one knows nothing of it
    with pytest.raises(ValueError, match="its logits are not its last hidden states times its output embeddings"):
        HuggingFaceTeacher(model)


class Nothing(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return hidden_states, None
