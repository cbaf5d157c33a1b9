"""Importing in a new interpreter: the package, its engine, and torch alone for comparison."""

import subprocess
import sys


class ImportTime:
    params = ("cpumoe", "cpumoe.experts", "torch")
    param_names = ("module",)
    number = 1
    warmup_time = 0
    rounds = 1
    repeat = (3, 5, 20.0)

    def time_import(self, module):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
