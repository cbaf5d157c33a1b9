"""``torch.ops.cpumoe.experts``: what compilers and tracers record computes what a call does."""

import gc
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_tools import EVERYTHING, IN_FULL_RUNS, inputs, layer, output_with_torch, refused
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from cpumoe import Runtime

operator = torch.ops.cpumoe.experts
NO_GRADIENTS = r"^cpumoe's layers compute no gradients; call them under torch\.no_grad\(\)"


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4")


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


@pytest.fixture
def args(weights):
    return tuple(inputs(weights, tokens=3))


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    counters.clear()


class Block(torch.nn.Module):
    """Experts between other operations."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, ids, w):
        return 3 * self.experts(2 * x, ids, w)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def on_meta(args):
    return tuple(tensor.to("meta") for tensor in args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
def test_the_operator_computes_what_a_call_does(weights, experts, dtype, out_dtype):
    args = tuple(inputs(weights, tokens=3, dtype=dtype))
    result = operator(*args, experts.handle, out_dtype=out_dtype)
    assert torch.equal(result, experts(*args, out_dtype=out_dtype))
    assert result.dtype == (out_dtype or dtype)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_opcheck(weights, experts, tokens, out_dtype):
    args = tuple(inputs(weights, tokens=tokens))
    torch.library.opcheck(operator.default, (*args, experts.handle), {"out_dtype": out_dtype})


def test_opcheck_with_gradients(experts, args):
    x, ids, w = args
    given = (x.requires_grad_(), ids, w.requires_grad_(), experts.handle)
    # The fourth check makes a backward pass, which must fail.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.default, given, test_utils=checks)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=IN_FULL_RUNS)]
)
def test_compiled_code_has_one_graph_for_any_number_of_tokens(weights, experts, backend):
    block = Block(experts)
    function = compiled(block, backend, dynamic=True)
    for tokens in (3, 5, 17):
        args = tuple(inputs(weights, tokens=tokens))
        with torch.no_grad():
            assert torch.equal(function(*args), block(*args))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_layers_of_equal_shape_share_a_graph(weights, experts, args):
    function = compiled(lambda layer, *given: layer(*given))
    others = layer("mxfp4", seed=1).pack()
    assert torch.equal(function(experts, *args), experts(*args))
    assert torch.equal(function(others, *args), others(*args))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_code_follows_masks_and_runtimes(weights, args):
    mask = torch.zeros(weights.num_experts, dtype=torch.bool)
    experts = weights.pack(expert_mask=mask)
    function = compiled(experts.__call__)
    function(*args)
    mask[:2] = True
    expected = weights.pack(expert_mask=mask)(*args)
    assert torch.equal(function(*args), expected)
    with Runtime(1) as runtime:
        experts.runtime = runtime
        assert torch.equal(function(*args), expected)
    with refused(RuntimeError, "this Runtime is closed; create a new one"):
        function(*args)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("accumulate", [False, True])
def test_compiled_code_may_write_a_callers_buffer(experts, args, accumulate):
    buffer = torch.ones(args[0].shape)
    expected = experts(*args, out=buffer.clone(), accumulate=accumulate)

    @compiled
    def function(out, *given):
        return experts(*given, out=out, accumulate=accumulate)

    assert torch.equal(function(buffer, *args), expected)
    assert torch.equal(buffer, expected)


def test_submitting_breaks_a_graph(experts, args):
    function = torch.compile(lambda *given: experts.submit(*given).result(), backend="eager")
    assert torch.equal(function(*args), experts(*args))
    assert counters["graph_break"]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_take_any_number_of_tokens(weights, experts, args, strict, tmp_path):
    block = Block(experts)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    shapes = ({0: tokens},) * 3
    program = torch.export.export(block, args, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for given in (args, tuple(inputs(weights, tokens=7))):
        assert torch.equal(program.module()(*given), block(*given))
        assert torch.equal(loaded(*given), block(*given))


LOAD = """
import sys
import torch
import cpumoe.experts
program = torch.export.load(sys.argv[1]).module()
try:
    program(torch.zeros(3, 160).bfloat16(), torch.zeros(3, 2).long(), torch.zeros(3, 2))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("strict", [False, True])
def test_another_process_says_which_layer_is_missing(experts, args, strict, tmp_path):
    program = torch.export.export(Block(experts), args, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    said = output_with_torch(LOAD, str(tmp_path / "program.pt2"))
    number = int(experts.handle)
    assert said.startswith(
        f"layer: expected the handle of an Experts in this process, got {number}"
    )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_the_operator(experts, args, mode, pre_dispatch):
    trace = make_fx(Block(experts), tracing_mode=mode, pre_dispatch=pre_dispatch)
    recorded = trace(*args)
    assert "cpumoe.experts.default" in recorded.code
    assert torch.equal(recorded(*args), Block(experts)(*args))


def test_functionalization_keeps_the_operator(experts, args):
    recorded = make_fx(torch.func.functionalize(Block(experts)))(*args)
    assert torch.equal(recorded(*args), Block(experts)(*args))


def test_jit_trace_records_the_operator(experts, args):
    traced = torch.jit.trace(Block(experts), args)
    assert "cpumoe::experts" in str(traced.graph)
    assert torch.equal(traced(*args), Block(experts)(*args))


def test_tensors_without_values_give_a_result_without_values(experts, args):
    result = experts(*on_meta(args), out_dtype=torch.float32)
    assert result.is_meta
    assert (result.shape, result.dtype) == (args[0].shape, torch.float32)
    assert operator(*on_meta(args), experts.handle).is_meta
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor) for tensor in args]
    for result in (experts(*fakes), operator(*fakes, mode.from_tensor(experts.handle))):
        assert type(result).__name__ == "FakeTensor"
        assert (result.shape, result.dtype) == (args[0].shape, args[0].dtype)
    with mode:
        assert experts(*fakes).device == args[0].device


BAD = {
    "dtype": lambda x, ids, w: (x.double(), ids, w),
    "dimensions": lambda x, ids, w: (x[None], ids, w),
    "ids' dtype": lambda x, ids, w: (x, ids.short(), w),
    "ids' shape": lambda x, ids, w: (x, ids[:2], w),
    "ids' dimensions": lambda x, ids, w: (x, ids[0], w),
    "weights' dtype": lambda x, ids, w: (x, ids, w.double()),
    "weights' shape": lambda x, ids, w: (x, ids, w[:, :1]),
    "hidden size": lambda x, ids, w: (x[:, :32], ids, w),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_errors_are_those_of_a_call(experts, args, damage):
    with pytest.raises((TypeError, ValueError)) as eager:
        experts(*damage(*args))
    message = re.escape(str(eager.value))
    with pytest.raises(eager.type, match=f"^{message}$"):
        experts(*on_meta(damage(*args)))
    with pytest.raises(eager.type, match=f"^{message}$"):
        operator(*damage(*args), experts.handle)


# Compilers reach all errors in one way.
@pytest.mark.parametrize("name", BAD if EVERYTHING else ["dtype", "weights' shape"])
def test_errors_of_compiled_code_are_those_of_a_call(experts, args, name):
    damage = BAD[name]
    with pytest.raises((TypeError, ValueError)) as eager:
        experts(*damage(*args))
    message = re.escape(str(eager.value))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        compiled(experts.__call__)(*damage(*args))
    torch._dynamo.reset()
    with pytest.raises(eager.type, match=f"^{message}$"):  # the graph breaks before the error
        torch.compile(lambda *given: experts(*given), backend="eager")(*damage(*args))


def test_errors_of_options_are_those_of_a_call(experts, args):
    x = args[0]
    for options in (
        {"out_dtype": torch.float64},
        {"accumulate": True},
        {"out": x.double()},
        {"out": torch.ones(2, 3)},
        {"out": x.float(), "out_dtype": torch.bfloat16},
        {"out": x.clone(), "accumulate": True},
    ):
        with pytest.raises((TypeError, ValueError)) as eager:
            experts(*args, **options)
        with pytest.raises(eager.type, match=f"^{re.escape(str(eager.value))}$"):
            experts(*on_meta(args), **options)


def test_errors_of_values_come_when_compiled_code_runs(experts, args):
    x, ids, w = args
    with pytest.raises(IndexError, match=r"^topk_ids\[0, 0\]: expert ids must be in \[0, 4\)"):
        compiled(experts.__call__)(x, ids + 100, w)


def test_tensors_elsewhere_are_refused_by_name(experts, args):
    x, ids, w = args
    with pytest.raises(TypeError, match=r"^topk_ids: expected a CPU tensor, got device meta"):
        operator(x, ids.to("meta"), w, experts.handle)
    with pytest.raises(TypeError, match=r"^topk_weights: expected a meta tensor, got device cpu"):
        operator(x.to("meta"), ids.to("meta"), w, experts.handle)


@pytest.mark.parametrize("handle", [torch.ones(()), torch.ones(2, dtype=torch.int64)])
def test_what_is_no_handle_is_refused(args, handle):
    with pytest.raises(TypeError, match=r"^layer: expected Experts\.handle, an int64 scalar, got"):
        operator(*args, handle)
    with pytest.raises(TypeError, match=r"^layer: expected Experts\.handle, an int64 scalar, got"):
        operator(*on_meta(args), handle)


def test_a_handle_keeps_no_layer_alive(weights, args):
    experts = weights.pack()
    handle = experts.handle
    exported = torch.export.export(Block(experts), args).module()
    del experts
    gc.collect()
    for call in (lambda: operator(*args, handle), lambda: exported(*args)):
        with pytest.raises(RuntimeError, match=r"^layer: expected the handle .* was deleted"):
            call()


def test_handles_are_never_used_again(weights):
    seen = {int(weights.pack().handle) for _ in range(20)}
    assert len(seen) == 20
    assert all(0 <= number < 2**53 for number in seen)


def test_a_forked_child_computes_and_makes_handles_of_its_own(weights, experts, args):
    expected = experts(*args)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            same = torch.equal(operator(*args, experts.handle), expected)
            os.write(writing, f"{same} {int(weights.pack().handle)}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    answer = os.read(reading, 100).decode()
    os.waitpid(child, 0)
    os.close(reading)
    same, number = answer.split()
    assert same == "True"
    with pytest.raises(RuntimeError, match=f"got {number}; its Experts was deleted, or another"):
        operator(*args, torch.tensor(int(number)))


def test_threads_may_run_compiled_code_together(experts, args):
    function = compiled(Block(experts))
    expected = function(*args)

    def work(_):
        with torch.no_grad():
            return all(torch.equal(function(*args), expected) for _ in range(50))

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(work, range(3))) == [True] * 3


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("argument", [0, 2], ids=["hidden_states", "topk_weights"])
def test_the_backward_pass_is_refused(experts, args, backend, argument):
    expected = experts(*args)
    args[argument].requires_grad_()

    def call(*given):
        return operator(*given, experts.handle)

    result = (call if backend is None else compiled(call, backend))(*args)
    assert result.requires_grad
    assert torch.equal(result, expected)
    with pytest.raises(RuntimeError, match=NO_GRADIENTS):
        result.sum().backward()
    assert args[argument].grad is None
    with torch.no_grad():
        assert not call(*args).requires_grad


def test_forward_mode_is_refused(experts, args):
    x, ids, w = args
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=NO_GRADIENTS):
        operator(forward_ad.make_dual(x, x), ids, w, experts.handle)


TRANSFORMS = {
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack((x, x))),
    "grad": lambda call, x: torch.func.grad(lambda y: call(y).sum())(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "recorded vmap": lambda call, x: make_fx(torch.func.vmap(call))(torch.stack((x, x))),
    "recorded grad": lambda call, x: make_fx(torch.func.grad(lambda y: call(y).sum()))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_are_refused(experts, args, transform):
    x, ids, w = args
    with pytest.raises(TypeError, match=r"^cpumoe::experts: expected plain .* is transforming; \w"):
        transform(lambda states: operator(states, ids, w, experts.handle), x)


def test_autocast_leaves_dtypes_alone(weights, experts):
    args = tuple(inputs(weights, tokens=3, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        result = compiled(experts.__call__)(*args)
        assert torch.equal(result, experts(*args))
    assert result.dtype == torch.float32


def test_experts_of_inference_mode_may_be_compiled_outside(weights, args):
    with torch.inference_mode():
        experts = weights.pack()
        expected = compiled(experts.__call__)(*args)
    torch._dynamo.reset()
    assert torch.equal(compiled(experts.__call__)(*args), expected)
