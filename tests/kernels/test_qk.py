import pytest
import torch
import torch.nn.functional as F

from cab_kernels import HeadNorm, Rope, extract_qk, extract_qk_ref


def draw(seed, *shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def tables(tokens, half, device="cpu"):
    angle = torch.arange(tokens, device=device)[:, None] * 0.7 ** torch.arange(half, device=device)
    return angle.cos(), angle.sin()


class TestReference:
    def test_packed_is_a_split(self):
        source = draw(0, 2, 7, 3 * 4 * 6)
        q, k = extract_qk_ref(source, num_heads=4)
        assert torch.equal(q, source[..., :24])
        assert torch.equal(k, source[..., 24:48])

    @pytest.mark.parametrize("pair", [False, True], ids=["packed", "pair"])
    def test_projects_hidden_states(self, pair):
        hidden, weight, bias = draw(0, 2, 7, 10), draw(1, 3 * 24, 10), draw(2, 3 * 24)
        want_q, want_k, _ = F.linear(hidden, weight, bias).chunk(3, -1)
        if pair:
            weight, bias = (weight[:24], weight[24:48]), (bias[:24], bias[24:48])
        q, k = extract_qk_ref(hidden, num_heads=4, weight=weight, bias=bias)
        torch.testing.assert_close(q, want_q)
        torch.testing.assert_close(k, want_k)

    @pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
    def test_rotates_pairs_as_complex_numbers(self, interleaved):
        source = draw(0, 1, 7, 3 * 2 * 8, dtype=torch.float64)
        cos, sin = tables(7, 2)  # half of each head passes through
        q, _ = extract_qk_ref(source, num_heads=2, rope=Rope(cos.double(), sin.double(), interleaved))
        heads = source[..., :16].unflatten(-1, (2, 8))
        first, second = (heads[..., :4:2], heads[..., 1:4:2]) if interleaved else (heads[..., :2], heads[..., 2:4])
        turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
        got = q.unflatten(-1, (2, 8))
        got_first, got_second = (got[..., :4:2], got[..., 1:4:2]) if interleaved else (got[..., :2], got[..., 2:4])
        torch.testing.assert_close(torch.complex(got_first, got_second), turned)
        assert torch.equal(got[..., 4:], heads[..., 4:])

    def test_norms_are_per_head(self):
        source, weight, bias = draw(0, 2, 7, 3 * 4 * 6), draw(1, 6), draw(2, 6)
        q, k = extract_qk_ref(
            source, num_heads=4, q_norm=HeadNorm("layer", weight, bias, 1e-5), k_norm=HeadNorm("rms", weight, eps=1e-5)
        )
        heads = source.unflatten(-1, (3, 4, 6))
        torch.testing.assert_close(q, F.layer_norm(heads[:, :, 0], (6,), weight, bias, 1e-5).flatten(2))
        torch.testing.assert_close(k, F.rms_norm(heads[:, :, 1], (6,), weight, 1e-5).flatten(2))

    def test_repeats_the_heads_of_k(self):
        source = draw(0, 2, 7, (6 + 2 * 2) * 4)
        _, wide = extract_qk_ref(source, num_heads=6, num_kv_heads=2, out_layout="heads")
        _, narrow = extract_qk_ref(source, num_heads=6, num_kv_heads=2, repeat_kv=False, out_layout="heads")
        assert torch.equal(wide, narrow.repeat_interleave(3, dim=1))

    def test_places_tokens_after_the_rotation(self):
        source, rope = draw(0, 2, 7, 3 * 2 * 4), Rope(*tables(7, 2))
        index = torch.tensor([6, -1, 0, 3])
        plain, _ = extract_qk_ref(source, num_heads=2, rope=rope)
        moved, _ = extract_qk_ref(source, num_heads=2, rope=rope, token_index=index)
        assert torch.equal(moved[:, [0, 2, 3]], plain[:, [6, 0, 3]])
        assert not moved[:, 1].any()

    def test_gradients(self):
        hidden = draw(0, 1, 3, 4, dtype=torch.float64).requires_grad_()
        weight = draw(1, 3 * 8, 4, dtype=torch.float64).requires_grad_()
        cos, sin = (table.double() for table in tables(3, 2))

        def extract(hidden, weight):
            norm = HeadNorm("layer", draw(2, 4, dtype=torch.float64))
            index = torch.tensor([2, -1, 0])
            return extract_qk_ref(
                hidden, num_heads=2, weight=weight, q_norm=norm, rope=Rope(cos, sin), token_index=index
            )

        assert torch.autograd.gradcheck(extract, (hidden, weight))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_heads": 0}, "expected num_heads of at least 1, got 0"),
            ({"num_heads": 4, "num_kv_heads": 3}, "expected num_kv_heads to divide num_heads = 4, got 3"),
            ({"num_heads": 5}, r"a multiple of num_heads \+ 2 \* num_kv_heads = 15, got 48"),
            ({"bias": torch.zeros(48)}, "expected bias only with a weight, got a bias alone"),
            ({"weight": torch.zeros(50, 48)}, "expected weight's rows to be a multiple of 12, got 50"),
            ({"weight": torch.zeros(48, 40)}, r"expected weight of shape .* got \(48, 40\)"),
            (
                {"weight": (torch.zeros(16, 48), torch.zeros(12, 48))},
                r"expected weight\[1\] of num_kv_heads \* head_dim = 16 rows, got 12",
            ),
            (
                {"weight": torch.zeros(48, 48), "bias": (torch.zeros(16), torch.zeros(16))},
                "expected bias packed or as a pair like weight, got a pair",
            ),
            ({"rope": Rope(torch.zeros(7, 3), torch.zeros(7, 3))}, "at most head_dim / 2 = 2 channels, got 3"),
            ({"rope": Rope(torch.zeros(6, 2), torch.zeros(6, 2))}, r"expected rope.cos of shape .* got \(6, 2\)"),
            ({"q_norm": HeadNorm("batch")}, "expected q_norm.kind 'rms' or 'layer', got 'batch'"),
            ({"k_norm": HeadNorm("rms", torch.ones(5))}, r"expected k_norm.weight of shape \(head_dim\) = \(4,\)"),
            ({"out_layout": "packed"}, "expected out_layout 'flat' or 'heads', got 'packed'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_is_named(self, change, message):
        arguments = {"source": torch.zeros(2, 7, 48), "num_heads": 4} | change
        with pytest.raises(ValueError, match="extract_qk: .*" + message):
            extract_qk(**arguments)
