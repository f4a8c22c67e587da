# SPDX-License-Identifier: Apache-2.0
"""Puts packages into an environment with uv, or with pip where uv cannot be had.

Standard library alone. uv reads none of pip's settings: those that say where packages come from
are handed on, from pip's environment variables and its configuration files alike. A setting that uv
has no equal for, and one that is not known here, means pip.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# pip's setting -> uv's variable and what stands between its values.
_TRANSLATED = {
    "index-url": ("UV_DEFAULT_INDEX", ""),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "proxy": ("ALL_PROXY", ""),
    "cert": ("SSL_CERT_FILE", ""),
    "client-cert": ("SSL_CLIENT_CERT", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "retries": ("UV_HTTP_RETRIES", ""),
}
# They change nothing of what --no-deps and exact versions install.
_WITHOUT_EFFECT = {
    "break-system-packages",
    "cache-dir",
    "compile",
    "config-file",
    "disable-pip-version-check",
    "exists-action",
    "log",
    "no-cache-dir",
    "no-color",
    "no-compile",
    "no-index",  # a flag of uv, see Installer
    "no-input",
    "no-warn-script-location",
    "prefer-binary",
    "progress-bar",
    "quiet",
    "require-virtualenv",
    "root-user-action",
    "upgrade",
    "verbose",
}
_OUT_OF_REACH = re.compile(r"Failed to fetch: `?([^\s`]+)|NewConnectionError|NameResolutionError")
_CERTIFICATE = re.compile(r"invalid peer certificate|CERTIFICATE_VERIFY_FAILED")


class SetupError(Exception):
    """Something the user has to put right; the message says what and how."""


class CertificateError(SetupError):
    """The index showed a certificate that is not trusted."""


def lacking(output: str) -> str:
    """The requirement that no index or folder in reach has, by pip's or uv's words; "" if none."""
    missing = (
        re.search(r"No matching distribution found for (\S+)", output)
        # Where constraints are configured, pip words the same failure as a conflict with them.
        or re.search(r"The user requested (\S+)[\s\S]*ResolutionImpossible", output)
        or re.search(r"there is no version of (\S+)", output)
        or re.search(r"Because (\S+?) has no wheels with", output)
        or re.search(r"was not found in [\s\S]*?\byou\s+require\s+([^\s,]+)", output)
    )
    return missing[1].replace("===", "==") if missing else ""


def explain_failure(output: str) -> str:
    """What is wrong and what to do, from the output of pip or uv."""
    if "No space left on device" in output:
        return "the disk is full; the environment needs 4 to 7 GB (CPU) or 12 GB (CUDA)."
    if _CERTIFICATE.search(output):
        return (
            "the certificate of the package index is not trusted: set PIP_CERT to a file with the "
            "certificates of your network."
        )
    if found := _OUT_OF_REACH.search(output):
        causes = re.findall(r"cause: (.*)", output)
        what = ": ".join(filter(None, (found[1], causes[-1] if causes else "")))
        return (
            f"the package index cannot be reached{f' ({what})' if what else ''}: check the "
            "network, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and the proxy."
        )
    if missing := lacking(output):
        return (
            f"{missing} for Python {sys.version.split()[0]} is in none of the configured package "
            "indexes: check PIP_INDEX_URL, and that this is Linux on x86-64."
        )
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return "\n  ".join(["the packages could not be installed:", *lines[-12:]])


def pip_settings(python: Path) -> dict[str, str]:
    """pip's settings for `pip install`, by name, from its files and the environment."""
    command = [str(python), "-m", "pip", "config", "list"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SetupError(f"pip's configuration cannot be read: {result.stderr.strip()[-300:]}")
    return parse_pip_settings(result.stdout)


def parse_pip_settings(text: str) -> dict[str, str]:
    """name -> value of `pip config list`; the environment before install's before everybody's."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in sections:
            sections[section][name] = str(ast.literal_eval(value))
    return {**sections["global"], **sections["install"], **sections[":env:"]}


def untranslatable(settings: Mapping[str, str]) -> list[str]:
    """The settings that uv might not honour."""
    return sorted(settings.keys() - _TRANSLATED.keys() - _WITHOUT_EFFECT)


def uv_environment(settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """environ with pip's settings for uv in it. What it already says to uv stays."""
    result = dict(environ)
    for name, value in settings.items():
        if name in _TRANSLATED and value.strip():
            variable, separator = _TRANSLATED[name]
            words = [os.path.expanduser(word) for word in value.split()] if separator else [value]
            result.setdefault(variable, separator.join(words))
    if "PIP_CERT" in environ:
        result["SSL_CERT_FILE"] = environ["PIP_CERT"]
    elif bundle := environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE"):
        result.setdefault("SSL_CERT_FILE", bundle)
    # As pip does: the best version of all indexes, whichever names the package first.
    result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    result.setdefault("UV_NO_PROGRESS", "1")
    return result


class Arriving:
    """How far an installation is, in words: neither uv nor pip says it away from a terminal.

    cache: folders in which uv has one for each package that is unpacked; empty for pip
    site:  the environment's site-packages
    total: packages to come; 0 for one, which is not counted
    """

    def __init__(self, cache: list[Path], site: list[Path], total: int) -> None:
        self._cache, self._site, self._total = cache, site, total
        self._before = self._count()
        self._collected = 0
        self._phase = ""

    def _count(self) -> dict[str, int]:
        unpacked = sum(len(list(folder.glob("*"))) for folder in self._cache)
        placed = sum(len(list(folder.glob("*.dist-info"))) for folder in self._site)
        return {"unpacked": unpacked, "installed": placed}

    def read(self, line: str) -> None:
        """A line that uv or pip printed."""
        if line.startswith("Collecting "):  # pip
            self._collected += 1
            self._phase = line.split()[1]
        elif line.startswith(("Installing collected packages", "Prepared ")):
            self._phase = "installed"
        elif line.lstrip().startswith(("Downloading ", "Downloaded ", "Building ")):
            self._phase = line.strip()  # uv, for what is large

    def words(self) -> str:
        """The detail of the progress line."""
        if not self._total:
            return self._phase.replace("installed", "unpacking")
        now = {kind: number - self._before[kind] for kind, number in self._count().items()}
        if self._phase == "installed":
            return f"{now['installed']}/{self._total} packages installed"
        if self._cache:
            return f"{now['unpacked']}/{self._total} packages unpacked; {self._phase}"
        return f"{self._collected}/{self._total} {self._phase}"


class Installer:
    """Installs into the environment of one Python.

    cache: a folder on the file system of the environment, so that uv links instead of copying
    log:   gets the output of what is run
    """

    def __init__(self, python: Path, cache: Path, log: Path) -> None:
        self.python, self.cache, self.log = python, cache, log
        self.settings = pip_settings(python)
        self.uv: Path | None = None
        self._for_pip = {
            **os.environ,
            "PIP_PROGRESS_BAR": "off",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        self._for_uv = uv_environment(self.settings, os.environ)
        # Its own while it is at work and removed afterwards, unless the user keeps one.
        self._for_uv.setdefault("UV_CACHE_DIR", str(cache / "uv-cache"))

    @property
    def no_index(self) -> bool:
        return self.settings.get("no-index", "0").lower() in ("1", "true", "yes", "on")

    def use_uv(self, version: str) -> str:
        """Install with uv, put into the environment first; "" or why pip is used instead."""
        if unknown := untranslatable(self.settings):
            return f"uv does not know pip's setting {unknown[0]}"
        uv = self.python.with_name("uv")
        if _version_of(uv) != version:
            command, environment = self._command("--no-deps", "--only-binary", ":all:")
            command.append(f"uv==={version}")
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            self._write_log(result.stdout + result.stderr)
            if result.returncode:
                return explain_failure(result.stdout + result.stderr).splitlines()[-1]
            if _version_of(uv) != version:
                return "uv does not run on this system"
        self.uv = uv
        return ""

    def _write_log(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text)

    def _command(self, *args: str, index: str = "") -> tuple[list[str], dict[str, str]]:
        """What to run and its environment; ``index`` comes before the configured ones."""
        if self.uv is None:
            command = [str(self.python), "-m", "pip", "install", "--no-input"]
            return [*command, *(["--index-url", index] if index else []), *args], self._for_pip
        command = [str(self.uv), "pip", "install", "--python", str(self.python)]
        if self.no_index:
            command.append("--no-index")
        return [*command, *(["--default-index", index] if index else []), *args], self._for_uv

    def offers(self, pin: str, index: str = "") -> bool:
        """Whether a package can be had: where ``index`` is given from there, at once or not at all.
        Raises SetupError where the configured indexes do not answer."""
        command, environment = self._command("--dry-run", "--no-deps", pin, index=index)
        if index:
            # Someone without a way to it is not to wait, nor to read about it.
            environment = {
                **environment,
                **{"UV_HTTP_TIMEOUT": "5", "UV_HTTP_CONNECT_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"},
                **{"PIP_TIMEOUT": "5", "PIP_DEFAULT_TIMEOUT": "5", "PIP_RETRIES": "0"},
            }
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        output = result.stdout + result.stderr
        self._write_log(output)
        is_clear = lacking(output) and not _OUT_OF_REACH.search(output)
        if result.returncode and not index and not is_clear:
            raise SetupError(f"{explain_failure(output)}\n  (log: {self.log})")
        return result.returncode == 0

    def install(self, title: str, *args: str, index: str = "", total: int = 0) -> None:
        """One progress line; the output goes to the log. Raises SetupError."""
        try:
            self._run(title, *args, index=index, total=total)
        except CertificateError as error:
            if self.uv is None:
                raise
            self.uv = None
            print(f"    uv: {error}\n    Trying pip, which may trust others.", flush=True)
            self._run(title, *args, index=index, total=total)

    def _run(self, title: str, *args: str, index: str, total: int) -> None:
        from vllm_nvfp4.serving.progress import step

        kept: list[str] = []
        command, environment = self._command(*args, index=index)
        arriving = Arriving(self._unpacked_by_uv() if self.uv else [], self._site_packages(), total)
        with step(title) as progress, self.log.open("a") as log:
            progress.look = lambda: setattr(progress, "detail", arriving.words())
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
            )
            try:
                for line in process.stdout or ():
                    if "is ignored" in line:  # one for each file of an index that has no versions
                        continue
                    log.write(line)
                    kept = [*kept[-200:], line]
                    arriving.read(line)
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            if status:
                output = "".join(kept)
                kind = CertificateError if _CERTIFICATE.search(output) else SetupError
                raise kind(f"{explain_failure(output)}\n  (log: {self.log})")

    def _unpacked_by_uv(self) -> list[Path]:
        """uv unpacks each wheel into a folder of its cache, and links it from there at the end."""
        return [Path(self._for_uv["UV_CACHE_DIR"]) / "archive-v0"]

    def _site_packages(self) -> list[Path]:
        return list(self.python.parent.parent.glob("lib/python3*/site-packages"))

    def finish(self) -> None:
        """Give back what was only needed on the way. Hard links: the environment loses nothing."""
        shutil.rmtree(self.cache / "uv-cache", ignore_errors=True)


def _version_of(uv: Path) -> str:
    """The version of a uv that runs; "" for one that is not there or does not."""
    with contextlib.suppress(OSError):
        done = subprocess.run([str(uv), "--version"], capture_output=True, text=True)
        if done.returncode == 0:
            return "".join(done.stdout.split()[1:2])
    return ""


def unmet(python: Path, uv: Path | None = None) -> list[str]:
    """What the packages of an environment ask for and do not find there, a sentence each: by
    `uv pip check`, or by pip's where there is no uv."""
    check = [str(uv), "pip", "check", "--python", str(python)]
    command = check if uv else [str(python), "-I", "-m", "pip", "check"]
    result = subprocess.run(command, capture_output=True, text=True)
    if not result.returncode:
        return []
    lines = (result.stdout + result.stderr).splitlines()
    found = [line.strip() for line in lines if "require" in line or "platform" in line]
    return found or [(result.stdout + result.stderr).strip()[-500:]]
