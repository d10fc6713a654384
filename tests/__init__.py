"""The tests of gptjax, a file of them for each of its ideas."""

import importlib.metadata
import platform

import pytest

pytest.register_assert_rewrite("tests.helpers")

# XLA's older way to emit code compiles a small program in a fifth of the time. XLA retires it, and
# a process ends at a flag that XLA does not know; so newer versions take their time.
OLDER_XLA = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
# Without AVX512_BF16 and AMX --dtype=auto is float32: no test's data type depends on the CPU.
XLA_FLAGS = " ".join(
    ("--xla_cpu_max_isa=AVX512",) * (platform.machine() in ("x86_64", "AMD64"))
    + ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    * OLDER_XLA
)
