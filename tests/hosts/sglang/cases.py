"""Runs functions as test cases in an environment without pytest."""

import traceback


def run(cases):
    """Calls each case, prints a line for it, and returns how many failed.

    Args:
        cases: a function without arguments for each name.
    """
    failed = 0
    for name, case in cases.items():
        try:
            case()
        except Exception:  # the next cases run in any case
            failed += 1
            traceback.print_exc()
            print(f"FAIL {name}", flush=True)
        else:
            print(f"PASS {name}", flush=True)
    return failed
