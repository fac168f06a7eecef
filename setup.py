"""Builds the CPU kernels: one plain shared library, loaded with ctypes, no Python or torch headers in it.

Each csrc/isa_*.cpp is the same code compiled for one instruction set; dispatch.cpp picks one at run time. Without a
compiler the package still installs and runs on the reference kernels. HEADWAY_KERNELS=0 skips the build.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
# These warnings of GCC are about its own headers of intrinsics.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
X86_ONLY = {
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512bf16": ["-mavx512bf16", "-mavx512vnni", *AVX512],
}


class BuildKernels(build_ext):
    """Compiles every source with its own instruction set flags, as many at a time as there are cores."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library knows no Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self._compile(ext, source), ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-fopenmp"], target_lang="c++", build_temp=self.build_temp
        )

    def _compile(self, ext: Extension, source: str) -> str:
        inputs = [source, *ext.depends]
        target = Path(self.build_temp) / f"{Path(source).stem}.o"
        if not target.exists() or any(os.path.getmtime(i) > target.stat().st_mtime for i in inputs):
            self.mkpath(str(target.parent))
            flags = [*FLAGS, *X86_ONLY.get(Path(source).stem, [])]
            (made,) = self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
            os.replace(made, target)
        return str(target)


def kernels() -> list[Extension]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [s for s in sorted(glob("csrc/*.cpp")) if x86 or Path(s).stem not in X86_ONLY]
    if not sources or os.environ.get("HEADWAY_KERNELS") == "0":
        return []
    headers = sorted([*glob("csrc/*.h"), *glob("csrc/*.hpp"), "setup.py"])
    return [Extension("headway.ops.cpu._kernels", sources, depends=headers, language="c++", optional=True)]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
