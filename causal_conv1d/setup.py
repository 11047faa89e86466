"""Compiles csrc/ into a shared library without torch's headers, once per instruction set. Metadata: pyproject.toml.

The library has a plain C interface and no Python init function; causal_conv1d/cpu.py loads it with ctypes. It is
optional: without a C++ compiler the install succeeds, says so, and the reference runs instead. g++ and clang compile
it; on macOS OpenMP's functions are those of the library that torch brings, found when cpu.py loads this one.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Python's own flags, which come before these, have -fwrapv: of indices that may wrap around the compiler makes no
# plain vector code, three times as slow.
FLAGS = [
    "-fno-wrapv", "-O3", "-g0", "-std=gnu++17", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas",
    "-Wno-unknown-warning-option",
]  # fmt: skip
if sys.platform == "darwin":  # Apple's clang takes -fopenmp only in this form
    FLAGS += ["-Xpreprocessor", "-fopenmp"]
    LINK_FLAGS = ["-Wl,-undefined,dynamic_lookup"]
else:
    FLAGS += ["-fopenmp"]
    LINK_FLAGS = ["-fopenmp"]
ISA_FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]


def sources_digest() -> str:
    """Of this file and csrc/, as cpu.py computes it."""
    files = [Path("setup.py"), *sorted(Path("csrc").glob("*.[ch]*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class BuildKernels(build_ext):
    """Compile kernels.cpp once for each instruction set and link all of them into one library."""

    def build_extension(self, extension):
        def compile(source, folder, macros, flags):
            return self.compiler.compile(
                [source], os.path.join(self.build_temp, folder), macros, extra_postargs=[*FLAGS, *flags]
            )

        library, kernels = extension.sources
        objects = compile(library, "common", [("SOURCES", f'"{sources_digest()}"')], [])
        for isa, flags in ISA_FLAGS.items():
            objects += compile(kernels, isa, [("ISA", isa)], flags)
        target = self.get_ext_fullpath(extension.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=LINK_FLAGS, target_lang="c++")

    def get_export_symbols(self, extension):
        return []


setup(
    ext_modules=[
        Extension(
            "causal_conv1d._cpu_kernels",
            sources=["csrc/library.cpp", "csrc/kernels.cpp"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
