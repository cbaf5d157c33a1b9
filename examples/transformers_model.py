"""Runs a whole model with transformers; cpumoe computes the routed experts.

Without a path, the model is the small one that comes with cpumoe. Needs the extra `transformers`.

    python transformers_model.py [path/to/checkpoint]
"""

import sys

from transformers import AutoTokenizer

from cpumoe import embedded
from cpumoe.integrations.transformers import CpuExperts, from_pretrained

path = sys.argv[1] if len(sys.argv) > 1 else embedded.model_path()

tokenizer = AutoTokenizer.from_pretrained(path)
model = from_pretrained(path)  # a transformers model like any other
layers = [module for module in model.modules() if isinstance(module, CpuExperts)]
print(f"{type(model).__name__}: {len(layers)} layers of experts, {layers[0].experts}")

inputs = tokenizer("In the beginning", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
