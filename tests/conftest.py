"""What all tests share: repeatable examples, checked shapes, programs that are compiled once, memory that is given back."""

import gc
import os
import threading

import jax
import pytest
import typecheck
from hypothesis import settings

gc.disable()  # until everything is imported: nothing is garbage before
settings.register_profile("repeatable", derandomize=True, deadline=None)  # a test that failed once fails again
settings.load_profile("repeatable")
typecheck.check("jprune", "pallas_kernels")
jax.config.update("jax_traceback_filtering", "off")  # tests refuse shapes by the thousand: a third of the time each
jax.config.update("jax_include_full_tracebacks_in_locations", False)  # which nobody reads, in programs by the thousand


# Compiling for small arrays takes longer than running: without optimisation, without the emitters that compile every
# fusion by itself, and in one piece rather than in parts for as many threads it takes a third of the time. A flag that a
# release of XLA does not know would end the process.
KNOWN = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
QUICKLY = "--xla_backend_optimization_level=0" + KNOWN * (jax.__version_info__ < (0, 11))


# Every program is written down in an MLIR context of its own, which loads all dialects anew: a third of the time of a
# small program. In the fast tests the programs of a file and a thread share one, unless one is compiled while another
# is written. Where a release of jax makes its contexts otherwise, tests are only slower.
contexts = threading.local()


def share_contexts():
    try:
        from jax._src.interpreters import mlir

        new, current = mlir.make_ir_context, mlir.ir.Context
    except (ImportError, AttributeError):
        return

    def shared():
        try:
            nested = current.current is not None
        except ValueError:
            nested = False
        if nested:
            return new()
        if getattr(contexts, "one", None) is None:
            contexts.one = new()
        return contexts.one

    mlir.make_ir_context = shared


def pytest_configure(config):
    compile_quickly(config)
    simulate_devices()
    keep_programs(config)


def compile_quickly(config):
    """Programs of the fast tests are not optimised; those of the slow and reference tests are, as users' are.

    Flags of the caller's own in XLA_FLAGS come behind these and so outweigh them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "not slow" not in config.option.markexpr:
        return
    share_contexts()
    if QUICKLY not in flags:
        os.environ["XLA_FLAGS"] = f"{QUICKLY} {flags}".strip()


def simulate_devices():
    """Four devices, of which a test that names no mesh uses the first: a process of its own for each mesh costs more.

    Not through XLA_FLAGS: commands that tests start have one device, as a user's have. Programs are not queued: the devices
    share the threads of two cores, and two programs in flight that exchange data can wait for each other for ever.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 4)


def keep_programs(config):
    """Compiled programs are kept in pytest's cache folder, for all workers, the commands that tests start, and later runs.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0
    compiles everything anew. `pytest --cache-clear` empties the folder.
    """
    cache = getattr(config, "cache", None)
    if cache is None:
        return
    for name, value in {
        "jax_compilation_cache_dir": str(cache.mkdir("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }.items():
        if os.environ.setdefault(name.upper(), str(value)) == str(value):
            jax.config.update(name, value)


def pytest_collection_finish():
    """What is loaded by now stays; looking it through again and again was a fifth of the time of tracing."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def memory_of_compiled_programs_is_given_back():
    """A program holds megabytes for as long as jax remembers it; the next file has programs of its own.

    What is left stays to the end (imports, what the file keeps): without looking at it again a collection takes a
    tenth of a second rather than more than one.
    """
    yield
    jax.clear_caches()
    contexts.one = None
    gc.collect()
    gc.freeze()
