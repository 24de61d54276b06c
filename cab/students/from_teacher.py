"""Starting a Mamba language model from the weights of its Transformer teacher, as far as their shapes allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Attention(NamedTuple):
    """Weights of an attention layer as (out, in) matrices, heads one after the other, each as often as it is there."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor

    def repeated(self, heads: int) -> _Attention:
        """K and V with as many heads as Q."""
        return self._replace(key=_repeated(self.key, self.query, heads), value=_repeated(self.value, self.query, heads))


@torch.no_grad()
def start_from_teacher(student: nn.Module, teacher: nn.Module, layer_map: Sequence[int]) -> list[str]:
    """Copy weights of a Transformer to their counterparts in a Mamba model, and return the names of what was copied.

    Linear attention reads C B^T x where softmax attention reads softmax(Q K^T) V, so that Q starts C, K starts B, V
    starts the scanned input and O the output projection; embeddings, head, RMS norms and gated MLPs are the same thing
    on both sides. In Mamba-2 all of them are rows of ``in_proj``; in Mamba B and C do not see the tokens' width, and
    keep their own start. What has another shape keeps its own start, too; heads of K and V that several heads of Q
    share are repeated. Of the heads and embeddings, the rows that both vocabularies have are copied.

    Where a hybrid keeps attention, that starts from Q, K, V and O as they are, and takes over the rotary embedding of a
    teacher that has one.

    Args:
        student: ``MambaForCausalLM``, ``FalconMambaForCausalLM``, ``Mamba2ForCausalLM``, ``BambaForCausalLM`` or
            ``DiscreteMamba2ForCausalLM``.
        teacher: a causal language model of transformers. Attention weights are found in models that have ``q_proj``,
            ``k_proj``, ``v_proj`` and ``o_proj`` (or ``out_proj``, ``dense``), and in those built as GPT-2 or GPT-NeoX;
            gated MLPs where their parts are ``gate_proj``, ``up_proj`` and ``down_proj``.
        layer_map: the teacher layer of each student layer.

    Raises:
        ValueError: the teacher is quantised, or some of its weights are on the disk.

    Source: arXiv:2408.15237, section 2 (there for hybrid models).
    """
    if getattr(teacher, "is_quantized", False) or any(weight.is_meta for weight in teacher.parameters()):
        raise ValueError(
            "start_from_teacher: expected a teacher whose weights are in memory as they are, got one that is quantised "
            "or partly on the disk"
        )
    copied: list[str] = []
    student_model: Any = student
    teacher_model: Any = teacher
    backbone = student_model.base_model
    decoder = _part(teacher_model.base_model, "decoder") or teacher_model.base_model
    heads = teacher_model.config.get_text_config().num_attention_heads

    def copy(name: str, target: Tensor, source: Tensor | None) -> None:
        if source is not None and target.shape == source.shape:
            target.copy_(source)
            copied.append(name)

    def copy_rows(name: str, target: Tensor, source: Tensor) -> None:
        rows = min(len(target), len(source))
        copy(name, target[:rows], source[:rows])

    embeddings, head = student_model.get_input_embeddings().weight, student_model.get_output_embeddings().weight
    copy_rows("embeddings", embeddings, teacher_model.get_input_embeddings().weight)
    if head is not embeddings:
        copy_rows("lm_head", head, teacher_model.get_output_embeddings().weight)
    final_norm = _part(backbone, "norm_f", "final_layernorm")
    copy("norm_f", final_norm.weight, _rms_weight(decoder, "norm", "ln_f", "final_layer_norm"))
    blocks = _part(decoder, "layers", "h")
    for index, layer in enumerate(backbone.layers):
        block = blocks[layer_map[index]]
        for name, target, source in _block_slots(layer, block, _attention(block, heads), heads):
            copy(f"layers.{index}.{name}", target, source)
    rotary, parameters = _part(backbone, "rotary_emb"), getattr(decoder.config, "rope_parameters", None)
    if rotary is not None and parameters and "rope_type" in parameters:  # else each kind of layer has its own
        config = student_model.config
        config.rope_parameters = {"partial_rotary_factor": 1.0, **parameters}
        backbone.rotary_emb = type(rotary)(config).to(embeddings.device)
    return copied


def _block_slots(
    layer: Any, block: Any, attention: _Attention | None, heads: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, place and source of what a block of the teacher gives a layer of the student."""
    norm, mixer = _part(layer, "norm", "input_layernorm"), _part(layer, "mixer", "mamba")
    yield "norm", norm.weight, _rms_weight(block, "input_layernorm", "ln_1")
    if attention is not None and mixer is not None:
        for name, target, source in _mixer_slots(mixer, attention.repeated(heads)):
            yield f"mixer.{name}", target, source
    elif attention is not None:
        own = _attention(layer, heads)
        for name, target, source in zip(_Attention._fields, own or (), attention, strict=True):
            yield f"attention.{name}", target, source
    mlp, teachers_mlp = _part(layer, "feed_forward"), _part(block, "mlp")
    if mlp is None:
        return
    if hasattr(block, "input_layernorm"):  # else the next norm may be one behind the attention
        names = ("pre_feedforward_layernorm", "post_attention_layernorm")
        yield "mlp.norm", layer.pre_ff_layernorm.weight, _rms_weight(block, *names)
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"mlp.{name}", getattr(mlp, name).weight, getattr(_part(teachers_mlp, name), "weight", None)


def _mixer_slots(mixer: Any, attention: _Attention) -> list[tuple[str, Tensor, Tensor]]:
    """Name, place and source of what an attention layer gives a mixer."""
    inner, weight = mixer.intermediate_size, mixer.in_proj.weight
    slots = [("out_proj", mixer.out_proj.weight, attention.out)]
    if not hasattr(mixer, "n_groups"):
        return [*slots, ("in_proj.x", weight[:inner], attention.value)]
    width = mixer.n_groups * mixer.ssm_state_size
    _, x, B, C, _ = weight.split([inner, inner, width, width, mixer.num_heads])
    return [
        *slots,
        ("in_proj.x", x, attention.value),
        ("in_proj.B", B, attention.key),
        ("in_proj.C", C, attention.query),
    ]


def _attention(block: nn.Module, heads: int) -> _Attention | None:
    """The weights of a block's attention; None where they are not found."""
    attention = _part(block, "self_attn", "attn", "attention")
    out = _part(attention, "o_proj", "out_proj", "dense", "c_proj")
    projections = [_part(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    if out is not None and all(projection is not None for projection in projections):
        query, key, value = (projection.weight for projection in projections)
        return _Attention(query, key, value, out.weight)
    gpt2, neox = _part(attention, "c_attn"), _part(attention, "query_key_value")
    if gpt2 is not None and out is not None:  # a Conv1D: (in, out)
        query, key, value = gpt2.weight.T.chunk(3)
        return _Attention(query, key, value, out.weight.T)
    if neox is not None and out is not None and len(neox.weight) == 3 * neox.weight.shape[1]:
        query, key, value = (part.flatten(0, 1) for part in neox.weight.unflatten(0, (heads, 3, -1)).unbind(1))
        return _Attention(query, key, value, out.weight)
    return None


def _repeated(matrix: Tensor, query: Tensor, heads: int) -> Tensor:
    by_head = matrix.unflatten(0, (-1, len(query) // heads))
    return by_head.repeat_interleave(heads // len(by_head), dim=0).flatten(0, 1)


def _rms_weight(owner: Any, *names: str) -> Tensor | None:
    """The weight of a norm that is w x / rms(x); not of one that also centres, or that adds 1 to w."""
    norm = _part(owner, *names)
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None:
        return None
    x = torch.linspace(1, 2, len(weight), dtype=weight.dtype, device=weight.device)
    expected = weight * nn.functional.rms_norm(x, x.shape)
    return weight if torch.allclose(norm(x[None])[0], expected, rtol=1e-2, atol=1e-3) else None


def _part(owner: Any, *names: str) -> Any:
    """The first attribute of these names that ``owner`` has, or None."""
    return next((part for name in names if (part := getattr(owner, name, None)) is not None), None)
