"""The real attentions that these kernels are for: what tests and compile checks compile, and benchmarks time."""

from pallas_kernels.common.attention_specs import (
    COGVIDEOX_1_5,
    HEAD_SIZES,
    HUNYUAN_VIDEO,
    LLAMA_3_1_8B,
    SAM_VIT_B,
    WAN_2_1_14B,
)

COMPILED = HEAD_SIZES
LONGEST = LLAMA_3_1_8B
TIMED = (SAM_VIT_B, COGVIDEOX_1_5, WAN_2_1_14B, HUNYUAN_VIDEO)  # the first on CPUs too
