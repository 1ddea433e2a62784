"""What machine this is, in words."""

import ctypes
import platform
import re
import sys
from pathlib import Path


def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def gpu_name() -> str:
    """The first NVIDIA GPU's model name; "" where the driver shows none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
        failed = failed or driver.cuDeviceGetName(name, len(name), device)
    except (OSError, AttributeError):
        return ""
    return "" if failed else name.value.decode(errors="replace")
