"""`cpumoe.attention`: grouped heads, masks, sinks, any sizes and strides, on every variant."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import cpumoe
from cpumoe.numerics.attention import reference_attention, visible_keys

ISAS = cpumoe.supported_isas()


def random_inputs(
    heads=8, kv_heads=2, queries=1, keys=100, size=64, values=None, batch=1, dtype=None, seed=0
):
    rng = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, size),
        (batch, kv_heads, keys, size),
        (batch, kv_heads, keys, values or size),
    )
    return [torch.randn(shape, generator=rng).to(dtype or torch.float32) for shape in shapes]


def check(q, k, v, isa=None, **settings):
    actual = cpumoe.attention(q, k, v, isa=isa, **settings)
    expected, bound = reference_attention(q, k, v, **settings)
    assert actual.shape == expected.shape
    assert actual.dtype == q.dtype
    excess = (actual.double() - expected).abs() - bound
    assert not (excess > 0).any(), f"{excess.max().item()} above the bound"
    return actual


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_and_prefill_of_every_dtype(isa, dtype):
    for queries, keys in ((1, 1), (1, 17), (1, 700), (3, 300), (40, 40), (70, 333)):
        check(*random_inputs(queries=queries, keys=keys, dtype=dtype), isa=isa, causal=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "values"),
    [(1, 1), (5, 3), (33, 17), (64, 80), (96, 96), (192, 128), (576, 512), (7, 40)],
)
def test_heads_of_any_size(isa, size, values):
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys in ((1, 200), (19, 50)):
            inputs = random_inputs(
                queries=queries, keys=keys, size=size, values=values, heads=6, dtype=dtype
            )
            check(*inputs, isa=isa, causal=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (3, 1), (16, 1), (14, 2), (65, 5)])
def test_heads_share_keys(isa, heads, kv_heads):
    for queries in (1, 2, 9):
        inputs = random_inputs(heads, kv_heads, queries, keys=150, size=32, batch=2)
        check(*inputs, isa=isa, causal=True)


@pytest.mark.parametrize("isa", ISAS)
def test_windows_and_the_lower_right_corner(isa):
    for queries, keys, window in (
        (1, 300, 100),
        (50, 300, 20),
        (300, 300, 128),
        (5, 300, 1),
        (64, 64, 1000),
        (30, 10, 4),
        (30, 10, 0),
    ):
        inputs = random_inputs(queries=queries, keys=keys, size=16)
        result = check(*inputs, isa=isa, causal=True, window=window)
        # The first queries come before the first key, and see none.
        assert (result[:, :, : max(queries - keys, 0)] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_masks_sinks_and_soft_caps(isa):
    q, k, v = random_inputs(queries=7, keys=90, batch=2, heads=4, size=24)
    rng = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 7, 90, generator=rng) < 0.3
    seen[0, 0, 3] = False
    sinks = torch.randn(4, generator=rng)
    added = torch.randn(1, 4, 7, 90, generator=rng)
    for mask in (
        seen,
        added,
        added.bfloat16(),
        added.half(),
        seen[:1],
        seen[:, :, :1],
        seen.transpose(2, 3).contiguous().transpose(2, 3),
        torch.where(seen, 0.0, -torch.inf),
        torch.where(seen[:, :, :2], 0.0, torch.finfo(torch.float32).min)[:, :, :1],
    ):
        check(q, k, v, isa=isa, mask=mask)
        check(q, k, v, isa=isa, mask=mask, causal=True, window=50, sinks=sinks)
    assert (cpumoe.attention(q, k, v, mask=seen, isa=isa)[0, :, 3] == 0).all()
    check(q, k, v, isa=isa, softcap=5.0, scale=2.0, causal=True)
    check(q, k, v, isa=isa, sinks=sinks.bfloat16(), scale=3.0)
    check(q, k, v, isa=isa, sinks=torch.full((4,), -torch.inf))


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_neither_overflow_nor_vanish(isa):
    q, k, v = random_inputs(queries=3, keys=400, size=16)
    result = check(1000 * q, k, v, isa=isa, causal=True)
    assert result.isfinite().all()
    check(q, k, v, isa=isa, sinks=torch.full((8,), 500.0))
    assert (cpumoe.attention(q, k, v, isa=isa, sinks=torch.full((8,), 1e5)) == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_with_its_query(isa):
    q, k, v = random_inputs(queries=20, keys=20, size=16)
    expected = cpumoe.attention(q, k, v, isa=isa, causal=True)
    k[:, 0, 12] = torch.nan
    actual = cpumoe.attention(q, k, v, isa=isa, causal=True)
    assert actual[:, :4, 12:].isnan().all()
    assert torch.equal(actual[:, 4:], expected[:, 4:])
    assert torch.equal(actual[:, :, :12], expected[:, :, :12])


def test_the_same_bits_for_any_number_of_threads():
    with cpumoe.Runtime(threads=1) as one:
        for queries, keys in ((1, 5000), (4, 900), (130, 130)):
            inputs = random_inputs(queries=queries, keys=keys, dtype=torch.bfloat16)
            expected = cpumoe.attention(*inputs, causal=True, runtime=one)
            with pytest.warns(RuntimeWarning):
                many = cpumoe.Runtime(threads=65)
            with many:
                for _ in range(3):
                    actual = cpumoe.attention(*inputs, causal=True, runtime=many)
                    assert torch.equal(actual, expected)


def test_views_are_read_in_place():
    q, k, v = random_inputs(queries=6, keys=40, batch=2, size=24)
    expected = cpumoe.attention(q, k, v, causal=True)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), 2)[:, :, : t.shape[2]],
        lambda t: torch.cat((t, t), 3)[..., : t.shape[3]],
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.nn.Parameter(t, requires_grad=False),
    ):
        assert torch.equal(cpumoe.attention(*map(change, (q, k, v)), causal=True), expected)
    one = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        cpumoe.attention(q, one, v, causal=True),
        cpumoe.attention(q, one.contiguous(), v, causal=True),
    )
    assert cpumoe.attention(q, k, v).transpose(1, 2).is_contiguous()


def test_nothing_to_compute():
    q, k, v = random_inputs(queries=2, keys=3, size=8)
    assert cpumoe.attention(q[:, :, :0], k, v).shape == (1, 8, 0, 8)
    assert cpumoe.attention(q[:0], k[:0], v[:0]).shape == (0, 8, 2, 8)
    assert (cpumoe.attention(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert (cpumoe.attention(q, k[:, :, :0], v[:, :, :0], sinks=torch.ones(8)) == 0).all()


Q, K, V = random_inputs(queries=2, keys=3, size=8)
WRONG = [
    (ValueError, "q: expected [batch, heads, rows, size], got float32 [8, 2, 8]", {"q": Q[0]}),
    (TypeError, "q: expected bfloat16, float16 or float32, got float64", {"q": Q.double()}),
    (TypeError, "k: expected the dtype of q, torch.float32, got bfloat16", {"k": K.bfloat16()}),
    (ValueError, "k: expected [1, kv_heads, keys, 8] like q, got [1, 2, 3, 7]", {"k": K[..., :7]}),
    (ValueError, "k: expected a number of heads that divides 7, got", {"q": Q[:, :7]}),
    (ValueError, "v: expected [1, 2, 3, value_size] like k, got [1, 2, 2, 8]", {"v": V[:, :, :2]}),
    (TypeError, "v: expected a CPU tensor, got device meta", {"v": V.to("meta")}),
    (TypeError, "mask: expected bool, bfloat16, float16 or float32, got int64 [1, 1, 2, 3]",
     {"mask": torch.ones(1, 1, 2, 3, dtype=torch.int64)}),
    (ValueError, "mask: expected [1 or 1, 8 or 1, 2 or 1, 3], got [1, 1, 2, 2]",
     {"mask": torch.ones(1, 1, 2, 2)}),
    (ValueError, "sinks: expected [8], one for each head, got [2]", {"sinks": torch.ones(2)}),
    (TypeError, "sinks: expected floating point numbers, got int64 [8]",
     {"sinks": torch.ones(8, dtype=torch.int64)}),
    (ValueError, "window: expected 0 without causal, got 3", {"window": 3}),
    (ValueError, "window: expected 0 to 2147483648, got -1", {"window": -1, "causal": True}),
    (ValueError, "window: expected 0 to 2147483648, got 2147483649",
     {"window": 2**31 + 1, "causal": True}),
    (ValueError, "window: expected 0 to 2147483648, got 9223372036854775808",
     {"window": 2**63, "causal": True}),
    (ValueError, "scale: expected a finite number of fp32, got inf", {"scale": float("inf")}),
    (ValueError, "scale: expected a finite number of fp32, got nan", {"scale": float("nan")}),
    (ValueError, "scale: expected a finite number of fp32, got -1e+300", {"scale": -1e300}),
    (ValueError, "scale: expected a finite number of fp32, got 1000", {"scale": 10**400}),
    (TypeError, "scale: expected a number, got 'x'", {"scale": "x"}),
    (TypeError, "scale: expected a number, got True", {"scale": True}),
    (TypeError, "scale: expected a number, got tensor([1., 1.])", {"scale": torch.ones(2)}),
    (TypeError, "softcap: expected a number, got None", {"softcap": None}),
    (TypeError, "softcap: expected a number, got 1j", {"softcap": 1j}),
    (ValueError, "softcap: expected 0, or a number from 1.175e-38 to 3.403e+38, which fp32 holds, "
     "got -1.0", {"softcap": -1.0}),
    *((ValueError, "softcap: expected 0, or a number from", {"softcap": cap})
      for cap in (1e-50, 1e-40, 1e39, float("inf"), float("nan"))),
    (TypeError, "runtime: expected a cpumoe.Runtime, or None for the shared one, got 2",
     {"runtime": 2}),
    (TypeError, "isa: expected a variant's name, or None for the best one, got ['avx2']",
     {"isa": ["avx2"]}),
    (TypeError, "causal: expected a bool, got 1", {"causal": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "arguments"), WRONG)
def test_errors_name_argument_and_remedy(kind, message, arguments):
    with pytest.raises(kind) as raised:
        cpumoe.attention(**{"q": Q, "k": K, "v": V, **arguments})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cap", [torch.finfo(torch.float32).tiny, 1e-30, 1e30, 3.4e38])
def test_soft_caps_of_any_size(cap, isa):
    q, k, v = random_inputs(queries=2, keys=3, size=8)
    for given in (q, torch.zeros_like(q)):  # without NaN where a score is zero
        actual = cpumoe.attention(given, k, v, softcap=cap, isa=isa)
        expected, _ = reference_attention(given, k, v, softcap=cap)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_numbers_of_any_type():
    expected = cpumoe.attention(Q, K, V, scale=2.0, softcap=3.0)
    actual = cpumoe.attention(Q, K, V, scale=torch.tensor(2.0), softcap=3)
    assert torch.equal(actual, expected)


def test_gradients_are_refused():
    q = Q.clone().requires_grad_()
    result = cpumoe.attention(q, K, V)
    with pytest.raises(RuntimeError, match="compute no gradients"):
        result.sum().backward()
    with torch.no_grad():
        assert not cpumoe.attention(q, K, V).requires_grad


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks"])
@pytest.mark.parametrize("function", [cpumoe.attention, torch.ops.cpumoe.attention])
def test_gradients_of_every_input_are_refused(name, function):
    arguments = {"q": Q, "k": K, "v": V, "mask": torch.randn(1, 1, 2, 3), "sinks": torch.randn(8)}
    arguments[name] = arguments[name].clone().requires_grad_()
    wanted = {each: arguments[each] for each in ("q", "k", "v", name)}
    result = function(**wanted)
    assert result.requires_grad
    with pytest.raises(RuntimeError, match="compute no gradients"):
        result.sum().backward()


def test_a_closed_runtime_is_an_error():
    runtime = cpumoe.Runtime(threads=1)
    cpumoe.attention(Q, K, V, runtime=runtime)
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        cpumoe.attention(Q, K, V, runtime=runtime)


def test_the_operator_records_and_computes():
    mask, sinks = torch.randn(1, 1, 2, 3), torch.randn(8)
    arguments = (Q, K, V, mask, sinks)
    settings = {"scale": 0.5, "causal": True, "window": 2, "softcap": 3.0}
    expected = cpumoe.attention(Q, K, V, mask=mask, sinks=sinks, **settings)
    operator = torch.ops.cpumoe.attention.default
    assert torch.equal(operator(*arguments, **settings), expected)
    torch.library.opcheck(operator, arguments, settings)

    def function(q, k, v):
        return cpumoe.attention(q, k, v, mask=mask, sinks=sinks, **settings)

    assert torch.equal(make_fx(function)(Q, K, V)(Q, K, V), expected)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(Q, K, V), expected)
    on_meta = cpumoe.attention(*(t.to("meta") for t in (Q, K, V)))
    assert on_meta.shape == expected.shape
    assert on_meta.stride() == expected.stride()


def test_settings_of_the_process_do_not_matter():
    inputs = random_inputs(queries=3, keys=20, size=8)
    expected = cpumoe.attention(*inputs, causal=True)
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(cpumoe.attention(*inputs, causal=True), expected)
    finally:
        torch.set_flush_denormal(False)


def test_which_keys_a_query_sees():
    assert visible_keys(2, 3).tolist() == [[True, True, False], [True, True, True]]
    assert visible_keys(1, 4, 2).tolist() == [[False, False, True, True]]
