"""Threads: concurrent calls, futures, closing, forking, interpreter exit, idleness."""

import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_tools import EVERY_FORMAT, GPT_OSS, inputs, layer, output_of, refused

import cpumoe
from cpumoe import Runtime, _core

# A layer and a call whose work takes a few milliseconds, for scripts in processes of their own.
SET_UP = """
import os, sys, time, warnings
import torch
import cpumoe
warnings.simplefilter("ignore")
shape = {"gate": (512, 512), "up": (512, 512), "down": (512, 512)}
matrices = {
    name: (
        torch.randint(0, 256, (4, n, k // 2), dtype=torch.uint8),
        torch.randint(117, 123, (4, n, k // 32), dtype=torch.uint8),
    )
    for name, (n, k) in shape.items()
}
def pack(**options):
    return cpumoe.Experts.from_tensors(**matrices, format="mxfp4", **options)
x = torch.randn(64, 512).bfloat16()
ids = torch.randint(0, 4, (64, 2))
weights = torch.rand(64, 2)
"""


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", hidden=256, intermediate=256)


def threads_of_this_process():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


def exchange_switch_interval(seconds):
    old = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    return old


def test_default_threads_are_the_physical_cores():
    topology = _core.topology()
    assert 1 <= topology.default_threads <= len(topology.cores) <= len(topology.cpus)
    with Runtime() as runtime:
        assert runtime.threads == topology.default_threads


def test_more_threads_than_cores_warn_once_per_runtime(weights):
    threads = _core.topology().default_threads + 1
    args = inputs(weights, tokens=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Runtime(threads) as runtime:
            experts = weights.pack(runtime=runtime)
            experts(*args)
            experts.submit(*args).result()
        with Runtime(threads - 1):
            pass
    assert [w.category for w in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert message.startswith(f"Runtime: {threads} threads requested, but this process may ")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("threads", [0, -3])
def test_too_few_threads(threads):
    with refused(ValueError, f"Runtime: threads: expected 1 to 4096, got {threads}"):
        Runtime(threads)


def test_pinned_threads_compute_the_same(weights):
    args = inputs(weights, tokens=20)
    with Runtime(pin=True) as runtime:
        assert torch.equal(weights.pack(runtime=runtime)(*args), weights.pack()(*args))


def test_close_twice_and_repr():
    runtime = Runtime(1)
    assert repr(runtime) == "Runtime(threads=1, pin=False)"
    assert not runtime.closed
    runtime.close()
    runtime.close()
    assert runtime.closed
    assert repr(runtime) == "Runtime(threads=1, pin=False, closed)"


def test_default_runtime_is_made_anew_after_close(weights):
    experts = weights.pack()
    args = inputs(weights, tokens=2)
    y = experts(*args)
    old = cpumoe.default_runtime()
    assert cpumoe.default_runtime() is old
    old.close()
    assert torch.equal(experts(*args), y)
    assert cpumoe.default_runtime() is not old


@pytest.mark.filterwarnings("ignore:Runtime. . threads asked for:RuntimeWarning")
def test_close_ends_the_threads(weights):
    before = threads_of_this_process()
    with Runtime(4) as runtime:
        weights.pack(runtime=runtime).submit(*inputs(weights, tokens=2)).result()
        assert threads_of_this_process() >= before + 3
    assert threads_of_this_process() <= before


@EVERY_FORMAT
def test_many_python_threads_at_once(fmt):
    """Calls on one or several layers and runtimes give the results of single calls."""
    layers = [layer(fmt, seed=seed) for seed in range(3)]
    runtimes = [Runtime(1), Runtime(2)] if _core.topology().default_threads > 1 else [Runtime(1)]
    packed = [
        (weights, weights.pack(runtime=runtime)) for weights in layers for runtime in runtimes
    ]
    jobs = [
        (experts, inputs(weights, tokens, seed=tokens))
        for weights, experts in packed
        for tokens in (1, 4, 30)
    ]
    expected = [experts(*args) for experts, args in jobs]

    def work(start):
        for step in range(2 * len(jobs)):
            index = (start + step) % len(jobs)
            experts, args = jobs[index]
            y = experts.submit(*args).result() if step % 2 else experts(*args)
            assert torch.equal(y, expected[index])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    for runtime in runtimes:
        runtime.close()


def test_futures_finish_in_any_order_and_when_dropped(weights):
    experts = weights.pack()
    calls = [inputs(weights, tokens) for tokens in (60, 1, 5)]
    expected = [experts(*args) for args in calls]
    futures = [experts.submit(*args) for args in calls]
    for index in (2, 0, 1):
        assert torch.equal(futures[index].result(timeout=100), expected[index])
        assert futures[index].done()
        assert torch.equal(futures[index].result(), expected[index])
    for args in calls * 10:
        experts.submit(*args)
    bad = calls[0].topk_ids.clone()
    bad[0, 0] = 77
    experts.submit(calls[0].hidden_states, bad, calls[0].topk_weights)
    assert torch.equal(experts(*calls[0]), expected[0])


def test_a_submitted_call_owns_its_tensors(weights):
    # An exception such as Ctrl-C may come before there is a future.
    experts = weights.pack(isa="generic")
    call = experts._prepare(*inputs(weights, tokens=50))
    submitted = call.engine.submit(*call.addresses, owned=call)
    output = weakref.ref(call.output)
    del call
    assert output() is not None
    del submitted
    assert output() is None


def test_future_keeps_what_the_call_reads(weights):
    """The call alone refers to its copies, the layer and the runtime here."""
    expected = weights.pack()(*inputs(weights, tokens=40))

    def submit():
        args = inputs(weights, tokens=40)
        experts = weights.pack(
            runtime=Runtime(1), expert_mask=torch.zeros(weights.num_experts, dtype=torch.bool)
        )
        return experts.submit(
            args.hidden_states.T.contiguous().T, args.topk_ids.int(), args.topk_weights
        )

    for future in [submit() for _ in range(5)]:
        assert torch.equal(future.result(), expected)


def test_timeout(weights):
    with Runtime(1) as runtime:
        experts = weights.pack(runtime=runtime)
        args = inputs(weights, tokens=400, top_k=4)
        futures = [experts.submit(*args) for _ in range(20)]
        with pytest.raises(TimeoutError, match=r"^no result within 0\.0 s$"):
            futures[-1].result(timeout=0.0)
        assert torch.equal(futures[-1].result(), experts(*args))


def test_close_with_queued_work(weights):
    args = inputs(weights, tokens=50)
    expected = weights.pack()(*args)
    runtime = Runtime(1)
    experts = weights.pack(runtime=runtime)
    futures = [experts.submit(*args) for _ in range(20)]
    runtime.close()
    for future in futures:
        assert future.done()
        assert torch.equal(future.result(), expected)


def test_the_gil_is_released_during_a_call(weights):
    """Python never takes the GIL away here, so other threads run only if a call releases it."""
    experts = weights.pack()
    call = experts._prepare(*inputs(weights, tokens=30))
    inside = False
    seen = threading.Event()

    def work():
        nonlocal inside
        deadline = time.monotonic() + 60
        while not seen.is_set() and time.monotonic() < deadline:
            inside = True
            call.engine.run(*call.addresses)
            inside = False

    interval = exchange_switch_interval(1000.0)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive() and not seen.is_set():
            time.sleep(0)
            if inside:
                seen.set()
        thread.join()
    finally:
        exchange_switch_interval(interval)
    assert seen.is_set()


@pytest.mark.filterwarnings("ignore:Runtime. . threads asked for:RuntimeWarning")
def test_idle_threads_use_no_cpu(weights):
    with Runtime(3) as runtime:
        experts = weights.pack(runtime=runtime)
        experts.submit(*inputs(weights, tokens=30)).result()
        time.sleep(0.1)
        start = time.process_time()
        time.sleep(0.5)
        used = time.process_time() - start
    assert used < 0.2, f"{used:.3f} s of CPU in 0.5 s of idleness; polling threads would use 1 s"


@pytest.mark.parametrize(
    "state",
    [
        "other = pack(); pending = [experts.submit(x, ids, weights) for _ in range(50)]; "
        "other.submit(x, ids, weights); del other",
        "cpumoe.default_runtime().close()",
    ],
    ids=["pending and dropped", "closed"],
)
def test_interpreter_exit(state):
    script = f"{SET_UP}\nexperts = pack()\nmine = pack(runtime=cpumoe.Runtime(2))\n{state}"
    script += "\nkept = mine.submit(x, ids, weights)\nprint('end')"
    assert output_of(script, timeout=60) == "end"


FORK = """
def child(body):
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except RuntimeError as error:
            print(f"RuntimeError: {error}", flush=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)

torch.set_num_threads(1)  # torch's own pool does not survive a fork
experts = pack()
expected = experts(x, ids, weights)
mine = pack(runtime=cpumoe.Runtime(2))
mine(x, ids, weights)
pending = mine.submit(x, ids, weights)

def default_works():
    assert torch.equal(experts(x, ids, weights), expected)
    assert torch.equal(experts.submit(x, ids, weights).result(), expected)
    print("works", flush=True)

child(default_works)
child(lambda: mine(x, ids, weights))
child(lambda: mine.submit(x, ids, weights))
child(lambda: mine.runtime.close())
many = [mine.submit(x, ids, weights) for _ in range(50)]
child(lambda: many[-1].result())
child(lambda: mine(x, ids, weights))
assert torch.equal(many[-1].result(), expected)
assert torch.equal(experts(x, ids, weights), expected)
"""


def test_fork():
    lines = output_of(SET_UP + FORK, timeout=60).splitlines()
    assert lines[0] == "works"
    assert len(lines) == 5, lines  # close() prints nothing
    for line in lines[1:]:
        assert line.startswith("RuntimeError: "), lines
        assert "fork" in line


def test_submit_does_not_wait_for_the_running_call():
    weights = layer("mxfp4", hidden=512, intermediate=512)
    experts = weights.pack(isa="generic")
    long = experts.submit(*inputs(weights, tokens=2000))
    short = inputs(weights, tokens=1)
    time.sleep(0.05)  # the driver thread is working
    running = not long.done()
    future = experts.submit(*short)
    assert not (running and long.done())
    torch.testing.assert_close(future.result(), experts(*short), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "dtype", "magnitude"),
    [(40, torch.float32, 1e-38), (1, torch.float16, 1e-5)],  # subnormal products, and inputs
)
def test_results_do_not_depend_on_the_callers_floating_point_modes(tokens, dtype, magnitude):
    weights = layer("mxfp4", hidden=64, intermediate=64, activation=GPT_OSS)
    hidden_states, ids, topk_weights = inputs(weights, tokens=tokens)
    tiny = (hidden_states.float() * magnitude).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        runtime = Runtime(2)
    experts = weights.pack(runtime=runtime)
    expected = experts(tiny, ids, topk_weights)
    assert expected.any()
    if not torch.set_flush_denormal(True):
        pytest.skip("PyTorch cannot flush denormals on this CPU")
    try:
        results = [experts(tiny, ids, topk_weights) for _ in range(10)]
        results.append(experts.submit(tiny, ids, topk_weights).result())
    finally:
        torch.set_flush_denormal(False)
    # Compared as bits, because equality would flush subnormal numbers as well.
    assert all(torch.equal(r.view(torch.uint8), expected.view(torch.uint8)) for r in results)
    runtime.close()
