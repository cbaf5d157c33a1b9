"""Looks at the machine: GPU, driver library, CPU, PyTorch, tools. Changes nothing."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.gpu.results import PASS, SKIPPED, lack, provide, report, run_parts

LIBRARY = "libcuda.so.1"
NAME_BYTES = 256
# The attributes of a device that are the major and the minor number of its compute capability.
CAPABILITY_ATTRIBUTES = (75, 76)


def output_of(*command: str, seconds: float = 20) -> str:
    """Returns what a command prints; an empty string if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def check_driver(work: Path) -> None:
    """Reports the GPU, and provides a folder that has the driver library and nothing else.

    A folder of the system in LD_LIBRARY_PATH could change which other libraries a program gets.
    """
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return no_gpu(f"{LIBRARY} cannot be loaded: {error}")
    if code := cuda.cuInit(0):
        return no_gpu(f"cuInit failed with {code}; see nvidia-smi")
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0 or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return no_gpu("the driver has no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    name = ctypes.create_string_buffer(NAME_BYTES)
    cuda.cuDeviceGetName(name, NAME_BYTES, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    capability = []
    for attribute in CAPABILITY_ATTRIBUTES:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    gpu = {
        "name": name.value.decode(),
        "count": count.value,
        "capability": ".".join(map(str, capability)),
        "cuda_version": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "driver_version": output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
    }
    report(PASS, "GPU", **gpu)
    maps = Path("/proc/self/maps").read_text()
    found = re.search(r"\s(/\S*/libcuda\.so\S*)", maps)
    if found is None:
        lack("driver", f"the file of {LIBRARY} was not found among the loaded ones")
    else:
        folder = work / "driver"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / LIBRARY
        link.unlink(missing_ok=True)
        link.symlink_to(found[1])
        provide(driver=str(folder), driver_file=found[1])
    provide(gpu=gpu)
    return None


def no_gpu(reason: str) -> None:
    """Says that there is no GPU."""
    report(SKIPPED, "GPU", reason)
    lack("gpu", reason)
    lack("driver", f"no GPU: {reason}")
    lack("torch_device", f"no GPU: {reason}")


def check_torch() -> None:
    """Reports PyTorch; in another process, whose import may fail or hang."""
    text = output_of(
        sys.executable,
        "-c",
        "import json, torch; print(json.dumps({'version': torch.__version__, "
        "'cuda': torch.version.cuda, 'available': torch.cuda.is_available()}))",
        seconds=50,
    )
    if not text:
        reason = f"PyTorch cannot be imported by {sys.executable}"
        report(SKIPPED, "PyTorch", reason)
        return lack("torch_device", reason)
    found = json.loads(text.splitlines()[-1])
    if not found["available"]:
        reason = f"PyTorch {found['version']} does not see a GPU"
        report(SKIPPED, "PyTorch", reason, **found)
        return lack("torch_device", reason)
    report(PASS, "PyTorch", **found)
    return provide(torch=found, torch_device="cuda")


def check_rest() -> None:
    """Reports the CPU and the tools."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    tools = ("c++", "cmake", "ninja", "make", "nvcc", "compute-sanitizer", "nvidia-smi")
    provide(
        machine={
            "cpu": cpu[1] if cpu else platform.processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else None,
            "kernel": platform.release(),
            "python": sys.version,
            "tools": {tool: shutil.which(tool) for tool in tools},
            "compiler": output_of("c++", "--version").partition("\n")[0],
            "nvidia_smi": output_of("nvidia-smi").splitlines(),
        }
    )
    report(PASS, "CPU", name=cpu[1] if cpu else "", cpus=len(os.sched_getaffinity(0)))


def main() -> None:
    """Reports what there is."""
    work = Path(sys.argv[1])
    parts: dict[str, Callable[[], None]] = {"CPU": check_rest}
    if "--without-gpu" in sys.argv:
        lack("gpu", "--without-gpu")
        lack("driver", "--without-gpu, and the stand-in has not been built")
        provide(torch_device="cpu")
    else:
        parts |= {"GPU": lambda: check_driver(work), "PyTorch": check_torch}
    run_parts(parts)


if __name__ == "__main__":
    main()
