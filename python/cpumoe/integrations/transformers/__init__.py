"""cpumoe for transformers: cpumoe computes a model's routed experts, transformers the rest.

Example::

    from cpumoe.integrations.transformers import from_pretrained

    model = from_pretrained("path/to/DeepSeek-V4-Flash")   # a transformers model like any other

`ExpertsOptions` says who computes dense layers and attention: cpumoe or transformers.
`from_pretrained` loads one model. `enable` makes transformers' own `from_pretrained` do so, and
thereby everything that uses it, such as ``transformers serve``. Importing this package registers
``experts_implementation="cpumoe"`` and ``attn_implementation="cpumoe"`` for models that are already
in memory. `LanguageModel` adds the
tokenizer, for text in and text out. The extra is needed: ``pip install "cpumoe[transformers]"``.
"""

from cpumoe.integrations.transformers._require import require_transformers

require_transformers()

from cpumoe.integrations.transformers.experts_module import CpuExperts  # noqa: E402
from cpumoe.integrations.transformers.language_model import LanguageModel  # noqa: E402
from cpumoe.integrations.transformers.loading import (  # noqa: E402
    disable,
    enable,
    from_pretrained,
)
from cpumoe.integrations.transformers.options import ExpertsOptions  # noqa: E402
from cpumoe.integrations.transformers.perplexity import Perplexity, perplexity  # noqa: E402
from cpumoe.integrations.transformers.routers import use_fp32_routers  # noqa: E402

__all__ = [
    "CpuExperts",
    "ExpertsOptions",
    "LanguageModel",
    "Perplexity",
    "disable",
    "enable",
    "from_pretrained",
    "perplexity",
    "use_fp32_routers",
]
