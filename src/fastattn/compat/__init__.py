"""The call signatures of other attention libraries, served by fastattn: whatever kernel is fastest, on the CPU too.

    from fastattn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from fastattn.compat.xformers import LowerTriangularMask, memory_efficient_attention
    from fastattn.compat.sageattention import sageattn
    from fastattn.compat.transformer_engine import DotProductAttention

install("flash_attn") answers `import flash_attn` in this process, where that package is missing.
"""

from fastattn.compat.install import install, uninstall

__all__ = ["install", "uninstall"]
