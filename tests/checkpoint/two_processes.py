"""What each of two processes does in test_two_processes.py: python two_processes.py <rank> <port> <folder>."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)

from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jprune.checkpoint import load, save, together  # noqa: E402

together.SECONDS = 60
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))


def tree(k):
    """One leaf of which each process has a half, and one that both have."""
    rows = k + np.arange(8, dtype=np.float32).reshape(4, 2)
    return {"half": jax.make_array_from_callback((4, 2), split, lambda i: rows[i]),
            "both": jax.make_array_from_callback((3,), whole, lambda i: k * np.ones(3, np.float32)[i])}  # fmt: skip


def check(k):
    rows = k + np.arange(8, dtype=np.float32).reshape(4, 2)
    found, metadata = load(folder, sharding=lambda path, leaf: split if path == "half" else whole)
    assert metadata == {"k": k} and found["half"].sharding == split
    np.testing.assert_array_equal(found["half"].addressable_data(0), rows[2 * rank : 2 * rank + 2])
    np.testing.assert_array_equal(found["both"].addressable_data(0), k * np.ones(3))
    found, _ = load(folder)  # on each process's own device
    np.testing.assert_array_equal(found["half"], rows)
    assert found["half"].devices() == {jax.local_devices()[0]}


def refused(kind, message, **more):
    try:
        save(folder, tree(9), {"k": 9}, **more)
    except kind as error:
        assert message in str(error), error
        return
    raise AssertionError("it was saved")


save(folder, tree(1), {"k": 1})
check(1)
refused(OSError if rank else ValueError, "overwrite=True")  # the first process looks, the other hears of it
save(folder, tree(2), {"k": 2}, overwrite=True)
check(2)


def full_disk(*args):
    raise OSError(28, "No space left on device")


kept = together.orbax_options
if rank:  # fails before its part is written: the first waits for it inside orbax no longer than its time
    together_options, together.orbax_options = together.orbax_options, full_disk
    import jprune.checkpoint.folder as module

    module.orbax_options = full_disk
    refused(OSError, "No space left", overwrite=True)
    module.orbax_options = kept
else:
    import jprune.checkpoint.folder as module

    class Nothing:
        """Stands for orbax in the process that has written its part."""

        def __init__(self, **options):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        save = lambda self, *args: None  # noqa: E731

    own, module.ocp.StandardCheckpointer = module.ocp.StandardCheckpointer, Nothing
    refused(OSError, "process 1 failed: OSError: [Errno 28] No space left", overwrite=True)
    module.ocp.StandardCheckpointer = own
check(2)
save(folder, {"a": jnp.ones(2)}, {"k": 3}, overwrite=True)  # an array that each process has on its own device
assert load(folder)[1] == {"k": 3}
assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
print("done", rank, flush=True)
