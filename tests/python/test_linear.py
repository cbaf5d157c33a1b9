"""`cpumoe.Linear`: a dense layer in a weight format, in place of `torch.nn.Linear`."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import cpumoe
from cpumoe import Linear, QuantizedMatrix, weight_format

FORMATS = list(cpumoe.WEIGHT_FORMATS)
SIZES = [(1, 32), (48, 2), (100, 150), (257, 384), (37, 78)]


def weights(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5


def module(n=48, k=64, bias=True, dtype=torch.bfloat16):
    made = torch.nn.Linear(k, n, bias=bias).requires_grad_(False)
    made.weight.copy_(weights(n, k))
    return made.to(dtype)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("isa", cpumoe.supported_isas())
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_those_of_dequantized_weights(name, isa):
    fmt = weight_format(name)
    for n, k in SIZES:
        bias = torch.randn(n)
        matrix = fmt.quantized(weights(n, k))
        layer = Linear.from_tensors(matrix, format=name, bias=bias, isa=isa)
        dense = fmt.dense(matrix, torch.float64)
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, k)
            narrow = x.bfloat16()
            for inputs, results, tolerance in (
                (x, layer(x), 4e-6),
                (narrow, layer(narrow), 4e-3),
                (narrow, layer(narrow, out_dtype=torch.float32), 4e-3),
            ):
                expected = inputs.double() @ dense.T + bias.double()
                sizes = inputs.double().abs() @ dense.T.abs() + bias.double().abs()
                assert ((results.double() - expected).abs() <= tolerance * sizes).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_module_keeps_its_weights(dtype, bias):
    original = module(bias=bias, dtype=dtype)
    layer = Linear.from_module(original)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert torch.equal(layer.export().codes, original.weight)
    assert layer.format == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if bias:
        assert torch.equal(layer.bias, original.bias)
        assert layer.bias.dtype == dtype
    else:
        assert layer.bias is None
    x = torch.randn(5, 64)
    expected = original.double()(x.double())
    assert relative_error(layer(x), expected) < 4e-6


def test_a_modules_weights_are_rounded_to_a_format_on_request():
    original = module(dtype=torch.float32)
    layer = Linear.from_module(original, format="mxfp4")
    expected = weight_format("mxfp4").quantized(original.weight)
    exported = layer.export()
    assert torch.equal(exported.codes, expected.codes)
    assert torch.equal(exported.scales, expected.scales)
    with pytest.raises(
        TypeError, match=r"^module\.weight: expected bfloat16 or float16, or float32 w"
    ):
        Linear.from_module(original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights_that_are_narrower_numbers_are_packed_as_such(dtype):
    original = module(dtype=dtype)
    layer = Linear.from_module(original.float())
    assert layer.format == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert torch.equal(layer.export().codes.float(), original.weight)


def test_a_transposed_weight_is_packed():
    original = module(64, 64)
    expected = Linear.from_module(original).export().codes
    original.weight = torch.nn.Parameter(original.weight.T.contiguous().T, requires_grad=False)
    assert torch.equal(Linear.from_module(original).export().codes, expected)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    made = module()
    made.register_forward_pre_hook(lambda *_: None)
    return made


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [160, 150, 10])
def test_export_returns_what_was_packed(name, k):
    matrix = weight_format(name).quantized(weights(100, k))
    exported = Linear.from_tensors(matrix, format=name).export()
    for part in ("codes", "scales", "factor"):
        given, got = getattr(matrix, part), getattr(exported, part)
        assert (given is None) == (got is None)
        if given is not None:
            assert torch.equal(given, got), part


def test_any_leading_dimensions_and_strides():
    layer = Linear.from_module(module())
    x = torch.randn(2, 3, 64)
    rows = layer(x.view(6, 64))
    assert torch.equal(layer(x).view(6, 48), rows)
    assert layer(x[0, 0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 3, 48)
    wide = torch.randn(6, 100)
    wide[:, 10:74] = x.view(6, 64)
    assert torch.equal(layer(wide[:, 10:74]), rows)
    assert torch.equal(layer(x.view(6, 64).T.contiguous().T), rows)
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    assert torch.equal(layer(x[:, 1]), layer(x)[:, 1])


def test_dtypes_of_results():
    layer = Linear.from_module(module())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(3, 64).to(dtype)
        assert layer(x).dtype == dtype
        for out_dtype in (torch.bfloat16, torch.float16, torch.float32):
            result = layer(x, out_dtype=out_dtype)
            assert result.dtype == out_dtype
            assert torch.equal(result, layer(x, out_dtype=torch.float32).to(out_dtype))


def test_the_layer_stands_in_for_a_module():
    original = torch.nn.Sequential(module(64, 64), torch.nn.ReLU(), module(32, 64))
    model = copy.deepcopy(original)
    for i in (0, 2):
        model[i] = Linear.from_module(model[i])
    x = torch.randn(4, 64)
    assert relative_error(model(x), original.double()(x.double())) < 1e-5
    assert not list(model.parameters())
    assert not model.state_dict()
    assert "in_features=64, out_features=32, bias=True, format=bf16" in repr(model)
    assert model.to(torch.float16).eval()[2](x).dtype == torch.float32
    assert torch.equal(model[2](input=x), model[2](x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hooks_run_once_in_compiled_code():
    layer = Linear.from_module(module())
    x = torch.randn(3, 64)
    plain = layer(x)
    layer.register_forward_hook(lambda _module, _inputs, y: y + 1)
    assert torch.equal(layer(x), plain + 1)
    assert torch.equal(torch.ops.cpumoe.linear(x, layer.handle, 48), plain)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager")
        assert torch.equal(compiled(x), plain + 1)


def test_options_are_those_of_experts():
    runtime = cpumoe.Runtime(threads=1)
    isa = cpumoe.supported_isas()[0]
    options = cpumoe.ExpertsOptions(runtime=runtime, isa=isa)
    layer = Linear.from_module(module(), options=options, precision="int8")
    assert (layer.isa, layer.precision, layer.runtime) == (isa, "int8", runtime)
    with pytest.raises(TypeError, match=r"^Linear\.from_module\(\) got an unexpected keyword"):
        Linear.from_module(module(), threads=2)
    x = torch.randn(3, 64)
    invariant = Linear.from_module(module(), batch_invariant=True)
    assert torch.equal(invariant(x)[:1], invariant(x[:1]))


def test_fp32_follows_pytorchs_setting():
    layer = Linear.from_module(module(), isa=cpumoe.supported_isas()[-1])
    x = torch.randn(40, 64)
    exact = layer(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert relative_error(layer(x), exact.double()) < 1e-2
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(layer(x), exact)


class _Observer(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_calls_under_a_mode_that_observes_give_equal_results():
    layer = Linear.from_module(module())
    x = torch.randn(3, 64)
    expected = layer(x)
    with _Observer():
        assert torch.equal(layer(x), expected)


def test_compiled_and_exported_code_records_the_operator():
    layer = Linear.from_module(module(), runtime=cpumoe.Runtime(threads=1))
    x = torch.randn(3, 64)
    expected = layer(x) * 2

    def double(x):
        return layer(x) * 2

    with torch.no_grad():
        compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(torch.nn.Sequential(layer), (x,))
        assert "cpumoe.linear" in str(program.graph)
        assert torch.equal(program.module()(x) * 2, expected)
    assert torch.equal(torch.ops.cpumoe.linear(x, layer.handle, 48) * 2, expected)
    assert layer(x.to("meta")).shape == (3, 48)


def test_the_operator_refuses_what_is_no_layer():
    layer = Linear.from_module(module())
    x = torch.randn(3, 64)
    operator = torch.ops.cpumoe.linear
    with pytest.raises(
        ValueError, match=r"^out_features: expected 48, which the layer has, got 47$"
    ):
        operator(x, layer.handle, 47)
    with pytest.raises(TypeError, match=r"^layer: expected Linear\.handle, an int64 scalar"):
        operator(x, torch.zeros(2), 48)
    handle = layer.handle
    del layer
    with pytest.raises(RuntimeError, match=r"^layer: expected the handle of a Linear in this"):
        operator(x, handle, 48)


def test_opcheck_accepts_the_operator():
    layer = Linear.from_module(module())
    arguments = (torch.randn(3, 64), layer.handle, 48)
    torch.library.opcheck(torch.ops.cpumoe.linear.default, arguments)


def test_there_are_no_gradients():
    layer = Linear.from_module(module())
    x = torch.randn(3, 64, requires_grad=True)
    result = layer(x)
    assert result.requires_grad
    with pytest.raises(RuntimeError, match=r"^cpumoe's layers compute no gradients; call them"):
        result.sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="compute no gradients"):
        layer(forward_ad.make_dual(torch.randn(3, 64), torch.ones(3, 64)))
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(3, 64))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 63), ValueError, r"input: expected \[\.\.\., 64\], got \[3, 63\]"),
        (torch.zeros(()), ValueError, r"input: expected \[\.\.\., 64\], got \[\]"),
        (
            torch.zeros(3, 64, dtype=torch.int64),
            TypeError,
            "input: expected bfloat16, float16 or float",
        ),
        (
            torch.zeros(3, 64, dtype=torch.float64),
            TypeError,
            "input: expected bfloat16, float16 or fl",
        ),
        (torch.zeros(3, 64).to_sparse(), TypeError, "input: expected a dense tensor"),
        ([[0.0] * 64], TypeError, r"input: expected a torch\.Tensor, got list"),
    ],
)
def test_wrong_inputs_are_refused(x, error, message):
    layer = Linear.from_module(module())
    with pytest.raises(error, match=f"^{message}"):
        layer(x)


def test_wrong_dtypes_of_results_are_refused():
    layer = Linear.from_module(module())
    with pytest.raises(TypeError, match=r"^out_dtype: expected torch\.bfloat16, torch\.float16 or"):
        layer(torch.zeros(3, 64), out_dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Linear.from_module(Doubled(64, 64)),
            TypeError,
            "module: expected exactly a torch.nn.Linear, got Doubled, which may compute something",
        ),
        (
            lambda: Linear.from_module(hooked()),
            ValueError,
            "module: expected no hooks, which would be lost",
        ),
        (
            lambda: Linear.from_module(module().to("meta")),
            TypeError,
            "module.weight: expected a CPU tensor, got device meta",
        ),
        (
            lambda: Linear.from_module(torch.nn.ReLU()),
            TypeError,
            "module: expected exactly a torch.nn.Linear",
        ),
        (
            lambda: Linear.from_module(module(48, 33), format="mxfp4"),
            ValueError,
            "mxfp4: K must be a multiple of 2, because a byte has 2 codes, got 33",
        ),
        (lambda: Linear.from_module(module(), format="q4"), ValueError, "q4"),
        (
            lambda: Linear.from_tensors(weights(48, 64), format="bf16"),
            TypeError,
            "weight codes: expected bfloat16, got float32",
        ),
        (
            lambda: Linear.from_tensors(weights(48, 64).bfloat16(), format="mxfp4"),
            TypeError,
            "weight: expected a QuantizedMatrix or a tuple",
        ),
        (
            lambda: Linear.from_tensors(
                weights(48, 64).bfloat16(), format="bf16", bias=torch.zeros(47)
            ),
            ValueError,
            r"bias: expected \[48\], got \[47\]",
        ),
        (
            lambda: Linear.from_tensors(
                weights(48, 64).bfloat16(), format="bf16", bias=torch.zeros(48).long()
            ),
            TypeError,
            "bias: expected bfloat16, float16 or float32, got int64",
        ),
        (
            lambda: Linear.from_tensors(torch.full((48, 64), torch.nan).bfloat16(), format="bf16"),
            ValueError,
            r"weight: weight \[0, 0\] is nan",
        ),
        (
            lambda: Linear.from_tensors(weights(96, 64).bfloat16().view(2, 48, 64), format="bf16"),
            ValueError,
            r"weight codes: expected \[N, K\]",
        ),
        (
            lambda: Linear(QuantizedMatrix(weights(48, 64).bfloat16()), format="bf16", few=1),
            TypeError,
            r"Linear\(\) got an unexpected keyword argument 'few'",
        ),
    ],
)
def test_wrong_weights_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_copies_and_pickles_are_refused():
    layer = Linear.from_module(module())
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^Linear cannot be pickled or copied"):
            act(layer)


def test_a_closed_runtime_is_an_error():
    runtime = cpumoe.Runtime(threads=1)
    layer = Linear.from_module(module(), runtime=runtime)
    runtime.close()
    with pytest.raises(RuntimeError, match="this Runtime is closed"):
        layer(torch.zeros(3, 64))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.zeros(32, 64), torch.nn.Parameter(torch.zeros(32, 64))])
def test_packed_weights_cannot_be_replaced(name, value):
    layer = cpumoe.Linear.from_module(torch.nn.Linear(64, 32).bfloat16())
    with pytest.raises(AttributeError, match=rf"^{name}: the weights of a cpumoe"):
        setattr(layer, name, value)


@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_sizes_cannot_be_changed(name):
    layer = cpumoe.Linear.from_module(module(n=48, k=64))
    x = torch.randn(3, 64)
    expected = layer(x)
    with pytest.raises(AttributeError, match=rf"^{name}: the size of a cpumoe\.Linear is that of"):
        setattr(layer, name, 8)
    with pytest.raises(AttributeError):
        delattr(layer, name)
    vars(layer)[name] = 8
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert torch.equal(layer(x), expected)


def test_there_is_no_weight_to_read():
    layer = cpumoe.Linear.from_module(torch.nn.Linear(64, 32).bfloat16())
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"^weight: a cpumoe\.Linear has no such tensor"):
        _ = layer.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_float32_weights_that_are_not_finite_are_named_so(value):
    module = torch.nn.Linear(64, 32)
    with torch.no_grad():
        module.weight[1, 2] = value
    with pytest.raises(ValueError, match=r"^module\.weight: expected finite weights, got NaN"):
        cpumoe.Linear.from_module(module)
