import subprocess
import sys


def test_help_does_not_wait_for_torch():
    code = "import sys, cpumoe.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
