"""Random shapes, routings and types: nothing crashes, every element is within its bound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools import DEEPSEEK_V4, EVERYTHING, GPT_OSS, PLAIN, Inputs, check, formats, layer

import cpumoe
from cpumoe import QuantizedMatrix
from cpumoe.numerics.precision import PRECISIONS

ISAS = cpumoe.supported_isas()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# Whole groups, and any other sizes.
SIZES = st.integers(1, 8).map(lambda groups: 32 * groups) | st.integers(1, 300)


def even_if_needed(fmt, size):
    """The least size from `size` on that a format allows."""
    return size + (not cpumoe.weight_format(fmt).takes_k(size))


# Parameters instead of tensors, so that a failing example is short.
LAYERS = st.fixed_dictionaries(
    {
        "fmt": st.sampled_from(formats(ISAS[-1])),
        "experts": st.integers(1, 9),
        "hidden": SIZES,
        "intermediate": SIZES,
        "activation": st.sampled_from((PLAIN, DEEPSEEK_V4, GPT_OSS)),
        "bias": st.sampled_from((None, *DTYPES)),
        "std": st.sampled_from((0.02, 0.1, 0.5)),
    }
)
CALLS = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 40),
        "top_k": st.integers(1, 9),
        "dtype": st.sampled_from(DTYPES),
        "id_dtype": st.sampled_from((torch.int32, torch.int64)),
        "size": st.sampled_from((0.1, 1.0, 20.0)),
        "seed": st.integers(0, 99),
    }
)


def random_call(weights, *, tokens, top_k, dtype, id_dtype, size, seed):
    """Any allowed ids, including repeated and skipped ones, and weights of both signs."""
    top_k = min(top_k, weights.num_experts)
    generator = torch.Generator().manual_seed(seed)
    hidden_states = size * torch.randn(tokens, weights.hidden, generator=generator)
    ids = torch.randint(-1, weights.num_experts + 1, (tokens, top_k), generator=generator)
    scores = torch.randn(tokens, top_k, generator=generator)
    return Inputs(hidden_states.to(dtype), ids.to(id_dtype), scores)


@settings(deadline=None, max_examples=200 if EVERYTHING else 80)
@given(
    isa=st.sampled_from(ISAS),
    shape=LAYERS,
    call=CALLS,
    masked=st.none() | st.lists(st.booleans(), min_size=9, max_size=9),
    batch_invariant=st.booleans(),
    precision=st.sampled_from(PRECISIONS),
)
def test_any_call_stays_within_its_bound(isa, shape, call, masked, batch_invariant, precision):
    sizes = {name: even_if_needed(shape["fmt"], shape[name]) for name in ("hidden", "intermediate")}
    weights = layer(**{**shape, **sizes})
    mask = None if masked is None else torch.tensor(masked[: weights.num_experts])
    experts = weights.pack(
        isa=isa, batch_invariant=batch_invariant, expert_mask=mask, precision=precision
    )
    args = random_call(weights, **call)
    y = experts(*args)
    check(y, weights, args, mask, precision=precision)
    assert torch.equal(experts.submit(*args).result(), y)


@settings(deadline=None, max_examples=40)
@given(
    isa=st.sampled_from(ISAS),
    name=st.sampled_from(formats(ISAS[-1])),
    experts=st.integers(1, 3),
    hidden=SIZES,
    inner=SIZES,
    seed=st.integers(0, 99),
)
def test_any_bytes_come_back(isa, name, experts, hidden, inner, seed):
    """Exports random codes and scales, not only those that quantizing gives."""
    fmt = cpumoe.weight_format(name)
    hidden, inner = even_if_needed(name, hidden), even_if_needed(name, inner)
    generator = torch.Generator().manual_seed(seed)

    def matrix(n, k):
        sizes = (experts, n, k * fmt.code_bits // 8)
        codes = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator)
        if fmt.scale_storage is None:
            weights = codes.view(fmt.code_dtypes[0])
            return QuantizedMatrix(weights.where(weights.isfinite(), 0))
        if fmt.blocks:
            codes[codes & 0x7F == 0x7F] = 0  # NaN
            scales = torch.randn(experts, -(-n // 128), -(-k // 128), generator=generator)
            return QuantizedMatrix(codes.view(fmt.code_storage), scales)
        groups = (experts, n, -(-k // fmt.group_size))
        if fmt.scale_storage == torch.uint8:
            scales = torch.randint(0, 255, groups, dtype=torch.uint8, generator=generator)
        else:
            scales = torch.randn(groups, generator=generator).to(fmt.scale_storage)
        if fmt.scale_storage == torch.float8_e4m3fn:  # without signs
            scales = (scales.view(torch.uint8) & 0x7F).view(fmt.scale_storage)
            return QuantizedMatrix(codes, scales, torch.rand(experts, generator=generator))
        return QuantizedMatrix(codes, scales)

    tensors = {"gate": matrix(inner, hidden), "up": matrix(inner, hidden)}
    tensors["down"] = matrix(hidden, inner)
    packed = cpumoe.Experts.from_tensors(**tensors, format=fmt.name, isa=isa)
    for index in range(experts):
        exported = packed.export(index)
        for name, stored in tensors.items():
            matrix = getattr(exported, name)
            assert torch.equal(
                matrix.codes.view(torch.uint8), stored.codes[index].view(torch.uint8)
            )
            if stored.scales is not None:
                assert torch.equal(matrix.scales, stored.scales[index])
