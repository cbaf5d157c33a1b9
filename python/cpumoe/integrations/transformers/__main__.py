"""transformers' own command line with cpumoe's experts.

``python -m cpumoe.integrations.transformers serve DIR --device cpu`` is ``transformers serve DIR
--device cpu`` after `enable`; options come from CPUMOE_ISA alone.
"""

from transformers.cli.transformers import app

from cpumoe.integrations.transformers import enable

if __name__ == "__main__":
    enable()
    app(prog_name="python -m cpumoe.integrations.transformers")
