import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab.distill.token_losses import Divergence, shared_vocabulary, token_losses

VOCABULARY = 11


class Batch:
    """Hidden states of both models and labels of which five of twelve predictions do not count."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(2, 7, 4, dtype=dtype, requires_grad=True)
        self.head = nn.Linear(4, VOCABULARY, bias=False, dtype=dtype)
        self.teacher_hidden = torch.randn(2, 7, 5, dtype=dtype)
        self.teacher_head = nn.Linear(5, VOCABULARY, dtype=dtype)
        self.labels = torch.randint(VOCABULARY, (2, 7))
        self.labels[0, :4] = -100
        self.labels[1, 5:] = -100

    def losses(self, **options: object):
        teacher = {"teacher_hidden": self.teacher_hidden, "teacher_head": self.teacher_head}
        return token_losses(self.hidden, self.head, self.labels, **{**teacher, **options})

    def counted(self, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
        """Student's and teacher's logits of the predictions that count, and what they should have predicted."""
        student, teacher = self.head(self.hidden)[..., :vocabulary], self.teacher_head(self.teacher_hidden)
        places = [(0, t) for t in range(3, 6)] + [(1, t) for t in range(4)]
        pick = tuple(torch.tensor(axis) for axis in zip(*places, strict=True))
        following = (pick[0], pick[1] + 1)
        return student[pick], teacher[..., :vocabulary].detach()[pick], self.labels[following]


def written_out(kind: str, student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    terms = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "jsd": beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }
    return terms[kind].sum(-1).mean()


@pytest.mark.parametrize("chunk", [3, 14, 100], ids=["ragged", "whole", "larger"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_losses_and_gradients_are_those_of_the_plain_formula(kind: str, chunk: int) -> None:
    batch = Batch()
    kl, ce = batch.losses(divergence=Divergence(kind, beta=0.3), temperature=2.0, chunk=chunk)
    student, teacher, following = batch.counted()
    expected_kl, expected_ce = 4 * written_out(kind, student / 2, teacher / 2, 0.3), F.cross_entropy(student, following)
    torch.testing.assert_close(kl, expected_kl)
    torch.testing.assert_close(ce, expected_ce)
    leaves = (batch.hidden, batch.head.weight)
    gradients = torch.autograd.grad(kl + 3 * ce, leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected_kl + 3 * expected_ce, leaves))


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_gradcheck(kind: str, top_k: int | None) -> None:
    batch = Batch()

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = token_losses(
            hidden,
            lambda rows: rows @ weight.T,
            batch.labels,
            teacher_hidden=batch.teacher_hidden,
            teacher_head=batch.teacher_head,
            divergence=Divergence(kind, top_k=top_k),
            chunk=4,
        )
        return losses.kl + losses.ce

    assert torch.autograd.gradcheck(total, (batch.hidden, batch.head.weight.detach().requires_grad_()))


def test_top_k_takes_all_other_tokens_as_one() -> None:
    batch = Batch()
    kl, _ = batch.losses(divergence=Divergence(top_k=2))
    student, teacher, _ = batch.counted()
    likely = teacher.topk(2).indices

    def with_rest(logits: Tensor) -> Tensor:
        chosen = logits.softmax(-1).gather(-1, likely)
        return torch.cat((chosen, 1 - chosen.sum(-1, keepdim=True)), -1).log()

    torch.testing.assert_close(kl, written_out("forward", with_rest(student), with_rest(teacher)))
    full, _ = batch.losses(divergence=Divergence(top_k=VOCABULARY))
    torch.testing.assert_close(full, written_out("forward", student, teacher))


def test_padding_of_the_vocabulary_is_left_out() -> None:
    batch = Batch()
    batch.labels.clamp_(max=7)
    kl, ce = batch.losses(divergence=Divergence(), vocab_size=8)
    student, teacher, following = batch.counted(vocabulary=8)
    torch.testing.assert_close(kl, written_out("forward", student, teacher))
    torch.testing.assert_close(ce, F.cross_entropy(student, following))


def test_what_does_not_count_may_be_anything() -> None:
    batch = Batch()
    expected = torch.stack(batch.losses(divergence=Divergence()))
    teacher_hidden = batch.teacher_hidden.clone()
    teacher_hidden[0, :3] = torch.nan
    got = torch.stack(batch.losses(divergence=Divergence(), teacher_hidden=teacher_hidden))
    torch.testing.assert_close(got, expected)


def test_nothing_counts() -> None:
    batch = Batch()
    batch.labels.fill_(-100)
    kl, ce = batch.losses(divergence=Divergence())
    (kl + ce).backward()
    assert (kl, ce) == (0, 0)
    assert not batch.hidden.grad.any()


def test_only_what_is_asked_for() -> None:
    batch = Batch()
    assert batch.losses(ce=True).kl is None
    assert batch.losses(divergence=Divergence(), ce=False).ce is None
    assert batch.losses(ce=False) == (None, None)


def test_logits_of_all_tokens_never_exist() -> None:
    """Neither forward nor backward makes a tensor with more than a chunk of rows of the vocabulary."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 64, 4, requires_grad=True)
    head, teacher_head = nn.Linear(4, 50), nn.Linear(4, 50)
    rows: list[int] = []

    def watched(layer: nn.Module):
        def run(part: Tensor) -> Tensor:
            rows.append(part.shape[0])
            return layer(part)

        return run

    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        losses = token_losses(
            hidden,
            watched(head),
            torch.randint(50, (1, 64)),
            teacher_hidden=hidden.detach(),
            teacher_head=watched(teacher_head),
            divergence=Divergence(),
            chunk=8,
        )
    (losses.kl + losses.ce).backward()
    assert rows == [8] * 32  # eight parts, two heads, forward and backward
    assert not any(shape[-1:] == (50,) for shape in saved)


def test_sixteen_bit_hidden_states_give_a_float32_loss() -> None:
    batch = Batch(torch.bfloat16)
    losses = batch.losses(divergence=Divergence())
    assert {loss.dtype for loss in losses} == {torch.float32}
    torch.stack(losses).sum().backward()
    assert batch.hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hellinger"}, "expected kind 'forward', 'reverse' or 'jsd', got 'hellinger'"),
        ({"beta": 1.0}, r"expected beta in \(0, 1\), got 1.0"),
        ({"top_k": 0}, "expected top_k of at least 1, got 0"),
    ],
    ids=["kind", "beta", "top_k"],
)
def test_bad_divergences(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


@pytest.mark.parametrize(
    ("student", "teacher", "tokens", "expected"),
    [(256, 256, None, 256), (50280, 50304, 50277, 50277), (51200, 50257, 50257, 50257)],
    ids=["equal", "both padded", "one padded"],
)
def test_vocabularies_that_differ_by_padding(student: int, teacher: int, tokens: int | None, expected: int) -> None:
    assert shared_vocabulary(student, teacher, tokens) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "tokens", "reason"),
    [
        (50280, 50304, None, "and no tokenizer is known"),
        (50280, 151936, 50277, "for a tokenizer of 50277 tokens: they differ by more than padding"),
        (256, 50257, 50257, "for a tokenizer of 50257 tokens: they differ by more than padding"),
    ],
    ids=["no tokenizer", "another tokenizer", "too few"],
)
def test_vocabularies_that_are_not_shared(student: int, teacher: int, tokens: int | None, reason: str) -> None:
    with pytest.raises(ValueError, match=f"got {student} logits of the student and {teacher} of the teacher, {reason}"):
        shared_vocabulary(student, teacher, tokens)
