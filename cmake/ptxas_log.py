"""Compiler launcher of CUDA files: ptxas_log.py LOG_FOLDER nvcc ARGUMENTS...

Runs the compiler, keeps what ptxas says of registers and spills, and how many seconds it all took, in
LOG_FOLDER/<target>.<source>.log, and fails on ptxas's C75xx messages: they announce that wgmma instructions were
serialised, which costs most of a kernel's speed without being an error.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

log_folder, *command = sys.argv[1:]
begin = time.perf_counter()
result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
report = "".join(line for line in result.stderr.splitlines(keepends=True) if "ptxas" in line or line.startswith("    "))
bad = [line for line in report.splitlines() if re.search(r"\bC75\d\d\b", line)]

if "-c" in command:
    source, output = (Path(command[command.index(option) + 1]) for option in ("-c", "-o"))
    # CMake's folder of an object: CMakeFiles/<target>.dir. The same source can belong to several targets.
    target = next((part.removesuffix(".dir") for part in output.parts if part.endswith(".dir")), "")
    log = Path(log_folder, f"{target}.{source.name}.log".lstrip("."))
    log.parent.mkdir(exist_ok=True)
    log.write_text(f"{report}seconds: {time.perf_counter() - begin:.1f}\n")
    if bad:
        output.unlink(missing_ok=True)
sys.stderr.write(result.stderr.replace(report, "") if not bad else "\n".join(bad) + "\n")
sys.exit(result.returncode or bool(bad))
