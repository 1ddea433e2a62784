"""What machine this is, in words."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()
