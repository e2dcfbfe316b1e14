"""Runs a script in a process of its own with four simulated devices: how many there are is fixed when jax starts."""

import json
import math
import os
import re
import subprocess
import sys


def run_script(script, *folders):
    """What the script's last printed line says, as JSON; the folders are its arguments."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def most_moved(compiled):
    """The most entries that one collective of a compiled program takes from other devices, but for sums over devices."""
    sizes = [0]
    for line in compiled.as_text().splitlines():
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line):
            results = line.split("(", 1)[0] if "= (" not in line else line.split(") ", 1)[0]
            for found in re.findall(r"\w+\[([\d,]*)\]", results):
                sizes.append(math.prod(int(n) for n in found.split(",") if n))
    return max(sizes)
