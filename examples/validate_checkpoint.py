"""Checks one layer of a checkpoint on every kernel variant that this CPU can run.

Each variant's result is compared with a float64 PyTorch reference. An error must stay within the
bound that follows from the roundings of a correct kernel. `cpumoe validate` does the same on the
command line. The exit code is 1 if a check fails, so that a script can rely on it.

    python validate_checkpoint.py [path/to/checkpoint]
"""

import sys

import cpumoe
from cpumoe import embedded
from cpumoe.layer_weights import LayerWeights
from cpumoe.validation import validate

path = sys.argv[1] if len(sys.argv) > 1 else embedded.model_path()

with cpumoe.open_checkpoint(path) as reader:
    if reader.unsupported:
        sys.exit(f"{path}: not supported: {'; '.join(reader.unsupported)}")
    weights = LayerWeights.from_checkpoint(reader, reader.layers()[0], limit=4)  # four experts
    report = validate(weights, tokens=[1, 8, 33], isas=cpumoe.supported_isas())

for variant in report.isas:
    for case in variant.cases:
        print(
            f"{variant.isa:12} {case.tokens:3} tokens: relative error {case.relative_l2:.1e}, "
            f"{case.worst_ratio:.0%} of the bound, {'passed' if case.passed else 'FAILED'}"
        )
sys.exit(0 if report.passed else 1)
