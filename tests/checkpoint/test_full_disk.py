"""A disk that takes no more: one line that names the file, whichever library was writing, and nothing half written."""

import contextlib
import errno
import os
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from decoders import tiny, weights

from jprune.checkpoint import save, save_hf, save_safetensors
from jprune.files.atomic import write_json

BIG = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)


@contextlib.contextmanager
def small_files(size):
    """No file may become larger: what a full disk does to those that write, without one."""
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, own[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)


WRITERS = {
    "orbax": lambda path: save(path, {"a": jnp.asarray(BIG)}),
    "safetensors": lambda path: save_safetensors(path, {"a": BIG}),
    "json": lambda path: write_json(path, BIG.tolist()),
    "hugging face": lambda path: save_hf(weights(tiny(stream=64, ffn=64)), tiny(stream=64, ffn=64), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_so_in_one_line(tmp_path, capfd, caplog, name):
    with small_files(40_000), pytest.raises(OSError, match=f"File too large: '{tmp_path}/m'") as found:
        WRITERS[name](tmp_path / "m")
    assert found.value.errno == errno.EFBIG and "\n" not in str(found.value)
    assert os.listdir(tmp_path) == []
    assert "Traceback" not in capfd.readouterr().err + caplog.text


@pytest.mark.slow
def test_the_command_line_prints_one_line(tmp_path):
    config = tiny(vocab=256, stream=64, ffn=64)
    save_hf(weights(config), config, tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000,) * 2); sys.argv[0] = 'jprune'; "
        "from jprune.cli import main; main()"
    )
    options = ["prune", "--model", "dense", "--method", "magnitude", "--sparsity", "0.3", "--calibration", "text.txt",
               "--sequences", "4", "--length", "16", "--recover", "2", "--out", "out", "--quiet"]  # fmt: skip
    # compiled programs are larger than what may be written here: none are kept. XLA's own alarms of a slow machine are
    # not what the command says
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    found = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=tmp_path, text=True, capture_output=True, env=env
    )
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    assert found.returncode == 2 and len(lines) == 1, found.stderr[-3000:]
    assert lines[0].startswith("error: ") and "File too large" in lines[0] and "out" in lines[0]
