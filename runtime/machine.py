"""What this machine is."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The processor's model, as its maker calls it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()
