"""What the operations share: block masks, the attention problem, the choice of an implementation, walks on TPU and Hopper.

    block_lists  block_mask                          which blocks an operation visits
    attention_problem  attention_arguments           one attention problem of whole blocks, and the checks that make it
    attention_specs                                  attention as published models run it: for tests, compile checks, benchmarks
    backends                                         which implementation runs, what `auto` took, errors
    xla  tpu  mosaic_gpu  mosaic_gpu_tile            what kernels of any operation are built from, a device each
    attention_tpu  attention_mosaic_gpu              what attention kernels add: logits, and the pairs that count
    aot_tpu  aot_hopper                              compile for a chip that is not here

Nothing here imports an operation, and nothing here decides what an operation computes.
"""
