"""Digests of outputs, to see whether two builds compute the same bits.

``python tools/output_digests.py >before.json`` in one build, ``>after.json`` in the other, then
``diff before.json after.json``. Each line is a call: weight format, variant, precision, dtype of
the hidden states, number of tokens. The inputs depend on the seed alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json

import torch

import cpumoe

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 3, 33, 257)
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 544, 288, 3


def random_stack(
    format: str, rows: int, columns: int, seed: torch.Generator
) -> cpumoe.QuantizedMatrix:
    """Returns random codes ``[experts, rows, columns/2]`` with scales of moderate size.

    In a format without a scale per 32 codes it returns normal weights.
    """
    fmt = cpumoe.WEIGHT_FORMATS[format]
    if fmt.group_size != 32:
        return fmt.quantized(0.05 * torch.randn(EXPERTS, rows, columns, generator=seed))
    shape = (EXPERTS, rows, columns // 2)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seed)
    exponents = torch.randint(-8, -3, (EXPERTS, rows, columns // 32), generator=seed)
    if fmt.scale_storage == torch.uint8:
        return cpumoe.QuantizedMatrix(codes, (exponents + 127).to(torch.uint8))
    mantissas = 1 + torch.rand(exponents.shape, generator=seed)
    return cpumoe.QuantizedMatrix(codes, (mantissas * 2.0**exponents).bfloat16())


def digests(format: str, isa: str, precision: str) -> dict[str, str]:
    """Returns the digests of all calls of one layer, by the call's name."""
    seed = torch.Generator().manual_seed(1)
    experts = cpumoe.Experts.from_tensors(
        gate=random_stack(format, INTERMEDIATE, HIDDEN, seed),
        up=random_stack(format, INTERMEDIATE, HIDDEN, seed),
        down=random_stack(format, HIDDEN, INTERMEDIATE, seed),
        gate_bias=torch.randn(EXPERTS, INTERMEDIATE, generator=seed),
        up_bias=torch.randn(EXPERTS, INTERMEDIATE, generator=seed),
        down_bias=torch.randn(EXPERTS, HIDDEN, generator=seed),
        format=format,
        isa=isa,
        precision=precision,
    )
    found = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, generator=seed)
        ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=seed)
        weights = torch.rand(tokens, TOP_K, generator=seed)
        for dtype in DTYPES:
            output = experts(x.to(dtype), ids, weights).contiguous().view(torch.uint8)
            name = " ".join((format, isa, precision, str(dtype), str(tokens)))
            found[name] = hashlib.sha256(output.numpy().tobytes()).hexdigest()
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", help="variants, separated by commas; default: all that run here")
    arguments = parser.parse_args()
    isas = arguments.isa.split(",") if arguments.isa else cpumoe.supported_isas()
    found: dict[str, str] = {}
    for format in cpumoe.WEIGHT_FORMATS:
        for isa in isas:
            for precision in ("auto", "bf16", "int8"):
                found.update(digests(format, isa, precision))
    print(json.dumps(found, indent=0))


if __name__ == "__main__":
    main()
