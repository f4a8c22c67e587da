# SPDX-License-Identifier: Apache-2.0
"""Puts machine code for the CUDA kernels into the wheel; everything else is in pyproject.toml.

NVFP4_BUILD_CUBINS unset or 0: no cubins; kernels are compiled with NVRTC when a model loads, once
                  1:          cubins for each architecture of kernels.cuda.cubins.BUILD_ARCHS
                  89,90:      cubins for these
NVFP4_BUILD_KERNELS:    only kernels whose symbol matches this pattern (fnmatch)

The wheel is pure Python (py3-none-any) either way, and the same sources give the same file,
whenever, where and under what umask it is built. An editable install never compiles.
"""

import fnmatch
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("NVFP4_BUILD_CUBINS", "0").strip() or "0"
# The time of every file in the wheel: 2020-01-01.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1577836800")


class ReproducibleWheel(bdist_wheel):
    """bdist_wheel, with file modes that do not depend on the umask of checkout and build."""

    def write_wheelfile(self, *args: object, **kwargs: object) -> None:
        super().write_wheelfile(*args, **kwargs)
        if self.bdist_dir is None:  # an editable build packs no files
            return
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


class BuildPyWithCubins(build_py):
    """build_py, and then the cubins into the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        # build/ outlives a build: those of the last one are not this wheel's.
        shutil.rmtree(Path(self.build_lib) / "vllm_nvfp4" / "cubins", ignore_errors=True)
        if WANTED == "0":
            print("vllm-nvfp4: a wheel without cubins (NVFP4_BUILD_CUBINS=1 builds them in)")
            return
        self._build_cubins()

    def _build_cubins(self) -> None:
        sys.path.insert(0, str(ROOT))
        from vllm_nvfp4.kernels.cuda import configs, cubins, moe_configs, nvrtc

        if WANTED != "1" and not re.fullmatch(r"\d+(,\d+)*", WANTED):
            raise SystemExit(
                f"NVFP4_BUILD_CUBINS={WANTED}: needs 0, 1 or architectures such as 89,90"
            )
        archs = cubins.BUILD_ARCHS if WANTED == "1" else [int(a) for a in WANTED.split(",")]
        if nvrtc.nvrtc_version() is None:
            raise SystemExit(
                f"NVFP4_BUILD_CUBINS={WANTED} needs NVRTC while the wheel is built, and there is "
                f"none. pip install {' '.join(BUILD_REQUIRES)}"
            )
        pattern = os.environ.get("NVFP4_BUILD_KERNELS", "*")
        kernels = [*configs.ALL_CONFIGS, *moe_configs.ALL_MOE_CONFIGS]
        chosen = [c for c in kernels if fnmatch.fnmatch(c.symbol, pattern)]
        out = Path(self.build_lib) / "vllm_nvfp4" / "cubins"
        count = cubins.build(chosen, out, archs, jobs=os.cpu_count() or 1)
        print(f"vllm-nvfp4: {count} cubins for {', '.join(f'sm_{a}' for a in archs)}")


BUILD_REQUIRES = [
    "cuda-core>=1",
    "cuda-bindings>=13,<14",
    "nvidia-cuda-nvrtc>=13,<14",
    "nvidia-cuda-runtime>=13,<14",
]

# setup_requires reaches pip as a requirement of the build environment (PEP 517).
setup(
    cmdclass={"build_py": BuildPyWithCubins, "bdist_wheel": ReproducibleWheel},
    setup_requires=[] if WANTED == "0" else BUILD_REQUIRES,
)
