"""transformers' own command line with cpumoe's experts.

``python -m cpumoe.integrations.transformers serve DIR --device cpu`` is ``transformers serve DIR
--device cpu`` after `enable`. CPUMOE_ISA may choose the variant; there are no other options.
"""

from transformers.cli.transformers import app

from cpumoe.integrations.transformers import enable

if __name__ == "__main__":
    enable()
    app(prog_name="python -m cpumoe.integrations.transformers")
