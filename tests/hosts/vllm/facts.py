"""What a worker of vLLM knows about its routed experts. Workers import it by its name."""

import os
import resource
from pathlib import Path


def facts(model) -> dict:
    """What a worker knows about its model."""
    found = {"methods": {}, "calls": 0, "parameters": [], "threads": {}, "isa": None}
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if type(module).__name__.endswith("RoutedExperts"):
            found["methods"][name] = type(method).__name__
            names = [name for name, _ in module.named_parameters()]
            # A router's biases may be among them.
            found["parameters"] += [name for name in names if name.startswith(("w13_", "w2_"))]
            experts = getattr(method, "experts", None)
            if experts is not None:
                found["calls"] += experts.statistics().calls
                found["isa"] = experts.isa
                found["cpus"] = experts.runtime.cpus
                found["format"] = experts.format
                found["num_experts"] = experts.num_experts
                found["intermediate_size"] = experts.intermediate_size
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("cpumoe"):
            allowed = os.sched_getaffinity(int(task.name))
            found["threads"][f"{name} {task.name}"] = sorted(allowed)
    return found
