"""Metal kernels, each in one file with the plain-MLX twin that specifies it (docs/kernels.md).

Callers see one function per operation. It runs the kernel where that is possible and the twin
everywhere else; ``AGEVLM_KERNELS=off`` forces the twins.
"""

from .decode_attention import decode_attention
from .guided_attention import guided_attention

__all__ = ["decode_attention", "guided_attention"]
