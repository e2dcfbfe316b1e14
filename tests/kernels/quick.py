"""How kernel tests compile: without optimisation, since arrays are small and compiling is what takes long, in every leg."""

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # a release that does not know an option refuses it
    QUICK["xla_cpu_use_fusion_emitters"] = False
