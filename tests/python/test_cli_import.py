import subprocess
import sys


def test_help_waits_for_nothing_that_is_slow_to_import():
    slow = ("torch", "transformers", "fastapi", "uvicorn", "pydantic", "httpx2")
    code = f"import sys, cpumoe.cli; sys.exit([m for m in {slow} if m in sys.modules] or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
