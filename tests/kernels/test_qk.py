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


def both(source, **options):
    return extract_qk(source, backend="triton", **options), extract_qk_ref(source, **options)


class TestKernels:
    @pytest.mark.parametrize("norm", [None, "rms", "layer"])
    @pytest.mark.parametrize("half", [0, 3, 6], ids=["unrotated", "partly rotated", "rotated"])
    @pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
    def test_agree_with_the_definition(self, norm, half, interleaved, device):
        source = draw(0, 2, 9, (4 + 2 * 2) * 12, device=device)
        source[..., 72:] = torch.nan  # V, which nobody reads
        kept = source.clone()
        rope = Rope(*tables(9, half, device), interleaved) if half else None
        norms = (None, None)
        if norm:
            weight, bias = draw(1, 12, device=device), draw(2, 12, device=device)
            norms = (HeadNorm(norm, weight, bias, 1e-5), HeadNorm(norm, None, None, 1e-3))
        index = torch.tensor([8, -1, 0, 3, 7], device=device)
        options = {"num_heads": 4, "num_kv_heads": 2, "q_norm": norms[0], "k_norm": norms[1], "rope": rope}
        for got, want in zip(*both(source, token_index=index, **options), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(source[..., :72], kept[..., :72])

    @pytest.mark.parametrize("layout", ["flat", "heads"])
    @pytest.mark.parametrize("repeat", [False, True], ids=["narrow", "repeated"])
    def test_moves_are_exact(self, layout, repeat, device):
        source = draw(0, 2, 9, (6 + 2 * 2) * 5, device=device).transpose(0, 1).contiguous().transpose(0, 1)
        index = torch.arange(9, device=device).flip(0).int()
        options = {"num_heads": 6, "num_kv_heads": 2, "repeat_kv": repeat, "out_layout": layout}
        for got, want in zip(*both(source, token_index=index, **options), strict=True):
            assert torch.equal(got, want)
            assert got.is_contiguous()

    @pytest.mark.parametrize("shape", [(1, 1), (2, 0), (3, 130)], ids=["one", "empty", "above two blocks"])
    def test_sizes(self, shape, device):
        for got, want in zip(*both(draw(0, *shape, 3 * 2 * 64, device=device), num_heads=2), strict=True):
            assert torch.equal(got, want)

    @pytest.mark.parametrize("pair", [False, True], ids=["packed", "pair"])
    def test_from_hidden_states(self, pair, device, monkeypatch):
        monkeypatch.setattr("cab_kernels.qk.kernels.BUFFER_BYTES", 2000)  # one batch entry at a time
        hidden, weight, bias = (draw(*shape, device=device) for shape in ((0, 3, 9, 10), (1, 64, 10), (2, 64)))
        weight[48:], bias[48:] = torch.nan, torch.nan  # V's rows
        if pair:
            weight, bias = (weight[:32], weight[32:48]), (bias[:32], bias[32:48])
        cos, sin = tables(9, 4, device)
        rope = Rope(torch.stack((cos, sin, cos)), torch.stack((sin, cos, sin)))  # of each batch entry
        options = {"num_heads": 4, "num_kv_heads": 2, "weight": weight, "bias": bias, "rope": rope}
        for got, want in zip(*both(hidden, **options), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_refuses_a_gradient(self, device):
        source = draw(0, 1, 3, 24, device=device).requires_grad_()
        with pytest.raises(ValueError, match="expected no gradient to be asked of backend 'triton'"):
            extract_qk(source, num_heads=2, backend="triton")
        with torch.no_grad():
            assert not extract_qk(source, num_heads=2, backend="triton")[0].requires_grad

    @pytest.mark.parametrize("flat", [False, True], ids=["heads", "flat"])
    def test_op_is_what_it_declares(self, flat, device):
        pytest.importorskip("cab_kernels.qk.kernels")  # registers it
        source, weight, (cos, sin) = draw(0, 2, 9, 48, device=device), draw(1, 4, device=device), tables(9, 1, device)
        arguments = (source, None, None, 16, 2, 4, 2, 1, weight, None, 1e-6, cos, sin, False, None, flat)
        torch.library.opcheck(torch.ops.cab_kernels.extract_heads.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rounds_once(dtype, head_dim):
    source = draw(0, 4, 197, 3 * 6 * head_dim, dtype=dtype, device="cuda")
    norm, rope = HeadNorm("rms", draw(1, head_dim, device="cuda")), Rope(*tables(197, 32, "cuda"))
    got = extract_qk(source, num_heads=6, q_norm=norm, rope=rope)
    norm, rope = norm._replace(weight=norm.weight.double()), Rope(rope.cos.double(), rope.sin.double())
    want = extract_qk_ref(source.double(), num_heads=6, q_norm=norm, rope=rope)
    for one, other in zip(got, want, strict=True):
        eps = torch.finfo(dtype).eps  # float32's own error may tip a value that lies halfway to the other side
        assert ((one.double() - other).abs() <= 0.501 * eps * 2 ** other.abs().log2().floor() + 1e-6).all()


@pytest.mark.gpu
def test_memory_is_the_output():
    source = draw(0, 8, 1024, 3 * 768, dtype=torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q, k = extract_qk(source, num_heads=12)
    assert torch.cuda.max_memory_allocated() - before == q.nbytes + k.nbytes


def test_kernel_compiles_for_gpus_that_are_not_here(compile_offline):
    integers = "first_column out_tokens tokens heads_each head_dim half repeat stride_source_batch stride_source_token "
    integers += "stride_source_column stride_out_batch stride_out_head stride_out_token stride_table_batch "
    integers += "stride_table_token"
    tables = dict.fromkeys(("cos_ptr", "sin_ptr", "weight_ptr", "bias_ptr"), "*fp32")
    spec = {
        "module": "cab_kernels.qk.kernels",
        "kernel": "_extract_heads_kernel",
        "signature": {"source_ptr": "*bf16", "out_ptr": "*bf16", "index_ptr": "*i64", "eps": "fp32"}
        | dict.fromkeys(integers.split(), "i32")
        | tables,
        "options": {"num_warps": 4},
    }
    blocks = {"BLOCK_TOKENS": 32, "BLOCK_HALF": 32, "BLOCK_REST": 64}
    whole, parts = {"HAS_PAIRS": True, "HAS_REST": False}, {"HAS_PAIRS": True, "HAS_REST": True}
    plain = {"NORM": 0, "INTERLEAVED": False, "HAS_PAIRS": False, "HAS_REST": True, "index_ptr": None}
    constexprs = [{"NORM": 2, "INTERLEAVED": True, **whole}, {"NORM": 1, "INTERLEAVED": False, **parts}]
    constexprs.append(plain | dict.fromkeys(tables))
    log = compile_offline([spec | {"constexprs": blocks | choice} for choice in constexprs])
    assert log.count("sm_90") == 3
