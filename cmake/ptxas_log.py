"""Compiler launcher of CUDA files: ptxas_log.py LOG_FOLDER nvcc ARGUMENTS...

Runs the compiler, keeps what ptxas says of registers and spills in LOG_FOLDER/<source>.log, and fails on its C75xx
messages: they announce that wgmma instructions were serialised, which costs most of a kernel's speed without being an
error.
"""

import re
import subprocess
import sys
from pathlib import Path

log_folder, *command = sys.argv[1:]
result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
report = "".join(line for line in result.stderr.splitlines(keepends=True) if "ptxas" in line or line.startswith("    "))
bad = [line for line in report.splitlines() if re.search(r"\bC75\d\d\b", line)]

if "-c" in command:
    log = Path(log_folder, Path(command[command.index("-c") + 1]).name + ".log")
    log.parent.mkdir(exist_ok=True)
    log.write_text(report)
    if bad:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
sys.stderr.write(result.stderr.replace(report, "") if not bad else "\n".join(bad) + "\n")
sys.exit(result.returncode or bool(bad))
