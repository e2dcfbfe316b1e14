"""The real attentions whose blocks are scored: what tests and compile checks compile."""

from pallas_kernels.common.attention_specs import HEAD_SIZES, HUNYUAN_VIDEO

COMPILED = HEAD_SIZES
VIDEO = HUNYUAN_VIDEO  # searched in two of fifty denoising steps
