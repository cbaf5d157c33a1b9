"""cpumoe under transformers: the host keeps all of a model but its routed experts.

Example::

    from cpumoe.integrations.transformers import from_pretrained

    model = from_pretrained("path/to/DeepSeek-V4-Flash")   # a transformers model like any other

`from_pretrained` loads one model; `enable` makes transformers' own `from_pretrained` do the same
(and everything built on it, such as ``transformers serve``), and adds
``experts_implementation="cpumoe"`` for models that are in memory already. `LanguageModel` adds the
tokenizer: text in, text out. Needs the extra: ``pip install "cpumoe[transformers]"``.
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
