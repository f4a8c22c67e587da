# SPDX-License-Identifier: Apache-2.0
"""Packages put into an environment by the real uv and the real pip, from a folder of small wheels:
pip's settings reach both, and what goes wrong is explained."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import installer as module  # noqa: E402


def make_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment's Python, with pip and with this one's uv where it has one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    (folder / "venv" / "bin" / "uv").symlink_to(uv)
    return folder / "venv" / "bin" / "python"


@pytest.fixture
def settings(monkeypatch):
    """pip's and uv's variables as the test sets them; pip's files are not read."""
    for name in list(module.os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return monkeypatch


@pytest.fixture(params=["uv", "pip"])
def make(request, environment, settings, tmp_path):
    """A function that makes an installer as the settings are then."""

    def make():
        made = module.Installer(environment, tmp_path, tmp_path / "log")
        if request.param == "uv":
            version = module._version_of(environment.with_name("uv"))
            assert version
            assert made.use_uv(version) == ""
        return made

    return make


def installed(python: Path, name: str) -> str:
    code = f"import {name}; print({name}.VERSION)"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()


def test_wheels_come_from_where_pips_variables_say(make, settings, environment, tmp_path):
    make_wheel(tmp_path / "here", "pkg_one", "1.0")
    settings.setenv("PIP_NO_INDEX", "1")
    settings.setenv("PIP_FIND_LINKS", f"{tmp_path / 'empty'} {tmp_path / 'here'}")
    (tmp_path / "empty").mkdir()
    made = make()
    made.install("Installing", "--no-deps", "pkg_one===1.0")
    assert installed(environment, "pkg_one") == "1.0"
    made.finish()
    assert not (tmp_path / "uv-cache").exists()


def test_wheels_come_from_where_pips_file_says(make, settings, environment, tmp_path):
    make_wheel(tmp_path / "here", "pkg_two", "1.0")
    (tmp_path / "pip.conf").write_text(
        f"[global]\nno-index = true\n[install]\nfind-links =\n    {tmp_path / 'here'}\n"
    )
    settings.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    make().install("Installing", "--no-deps", "pkg_two===1.0")
    assert installed(environment, "pkg_two") == "1.0"


def test_a_local_version_does_not_stand_for_the_release(make, settings, environment, tmp_path):
    make_wheel(tmp_path / "here", "pkg_three", "1.0+cpu")
    make_wheel(tmp_path / "here", "pkg_three", "1.0")
    settings.setenv("PIP_NO_INDEX", "1")
    settings.setenv("PIP_FIND_LINKS", str(tmp_path / "here"))
    made = make()
    assert made.offers("pkg_three===1.0+cpu")
    made.install("Installing", "--no-deps", "pkg_three===1.0")
    assert installed(environment, "pkg_three") == "1.0"
    (tmp_path / "here" / "pkg_three-1.0+cpu-py3-none-any.whl").unlink()
    made.finish()
    assert not made.offers("pkg_three===1.0+cpu")


def test_what_no_index_has_is_named(make, settings, tmp_path):
    settings.setenv("PIP_NO_INDEX", "1")
    settings.setenv("PIP_FIND_LINKS", str(tmp_path))
    made = make()
    assert not made.offers("pkg-none===7.0")
    with pytest.raises(module.SetupError, match=r"pkg-none==7\.0 for Python .* is in none of"):
        made.install("Installing", "--no-deps", "pkg-none===7.0")


def test_an_index_that_does_not_answer_is_named_with_what_to_look_at(make, settings):
    settings.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    settings.setenv("PIP_RETRIES", "1")
    made = make()
    with pytest.raises(module.SetupError, match=r"cannot be reached.*PIP_INDEX_URL"):
        made.offers("pkg-none===7.0")
    with pytest.raises(module.SetupError, match=r"cannot be reached.*PIP_INDEX_URL"):
        made.install("Installing", "--no-deps", "pkg-none===7.0")


def test_an_index_of_someone_else_may_be_out_of_reach(make, settings, tmp_path, capsys):
    settings.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert not make().offers("pkg-none===7.0", "http://127.0.0.1:9/simple")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("by_uv", [True, False])
def test_a_package_without_what_it_asks_for_is_found(by_uv, make, settings, environment, tmp_path):
    make_wheel(tmp_path / "here", "pkg_asks", "1.0", "pkg-answers>=2")
    settings.setenv("PIP_NO_INDEX", "1")
    settings.setenv("PIP_FIND_LINKS", str(tmp_path / "here"))
    made = make()
    made.install("Installing", "--no-deps", "pkg_asks===1.0")
    try:
        uv = environment.with_name("uv") if by_uv else None
        (sentence,) = module.unmet(environment, uv)
        assert "pkg-asks" in sentence
        assert "pkg-answers" in sentence
    finally:
        command = [str(environment), "-m", "pip", "uninstall", "-q", "-y", "pkg-asks"]
        subprocess.run(command, check=True)
    assert module.unmet(environment, uv) == []


def test_a_setting_that_uv_has_no_equal_for_means_pip(settings, environment, tmp_path):
    settings.setenv("PIP_USE_FEATURE", "fast-deps")
    made = module.Installer(environment, tmp_path, tmp_path / "log")
    assert made.use_uv("1.0") == "uv does not know pip's setting use-feature"
    assert made.uv is None


def test_without_uv_in_reach_pip_installs(settings, environment, tmp_path):
    settings.setenv("PIP_NO_INDEX", "1")
    settings.setenv("PIP_FIND_LINKS", str(tmp_path))
    made = module.Installer(environment, tmp_path, tmp_path / "log")
    assert "uv==0.0.1 for Python" in made.use_uv("0.0.1")
    assert made.uv is None


def test_the_environment_comes_before_install_and_that_before_global():
    text = (
        "global.index-url='https://a'\nglobal.timeout='1'\ninstall.index-url='https://b'\n"
        ":env:.timeout='2'\nlist.format='columns'\nglobal.find-links='\\n/x\\n/y'\n"
    )
    found = module.parse_pip_settings(text)
    assert found == {"index-url": "https://b", "timeout": "2", "find-links": "\n/x\n/y"}


def test_what_uv_gets_of_pips_settings():
    settings = {
        "index-url": "https://user:word@a/simple",
        "extra-index-url": "https://b/simple\nfile:///c",
        "find-links": "/x ~/y",
        "cert": "/from/a/file.pem",
        "timeout": "60",
    }
    given = {"UV_HTTP_TIMEOUT": "7", "PIP_CERT": "/c.pem", "SSL_CERT_FILE": "/d"}
    found = module.uv_environment(settings, given)
    assert found == {
        **given,
        "UV_DEFAULT_INDEX": "https://user:word@a/simple",
        "UV_INDEX": "https://b/simple file:///c",
        "UV_FIND_LINKS": f"/x,{Path('~/y').expanduser()}",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_NO_PROGRESS": "1",
        "SSL_CERT_FILE": "/c.pem",
    }


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (
            "The conflict is caused by:\n    The user requested torch===2.13.0+cpu\n"
            "    The user requested (constraint) torch<=2.14.1\nERROR: ResolutionImpossible: for",
            "torch==2.13.0+cpu for Python",
        ),
        ("ERROR: No matching distribution found for rich==15.0.0\n", "rich==15.0.0 for Python"),
        (
            "  cause: Because torch==1.0.0 has no wheels with a matching Python ABI tag",
            "torch==1.0.0 for Python",
        ),
        (
            "error: Failed to fetch: https://pypi.org/simple/rich/\n  cause: dns error\n"
            "  cause: Name or service not known\n",
            "(https://pypi.org/simple/rich/: Name or service not known)",
        ),
        ("  cause: invalid peer certificate: UnknownIssuer\n", "set PIP_CERT"),
        ("OSError: [Errno 28] No space left on device\n", "disk is full"),
        ("failed to write to file `x`: No space left on device (os error 28)\n", "disk is full"),
        ("a\nERROR: something else\n", "ERROR: something else"),
    ],
)
def test_failures_are_explained(output, words):
    assert words in module.explain_failure(output)


def test_a_certificate_that_only_pip_trusts_means_pip(settings, tmp_path, capsys):
    """With programs that say what the real ones say then."""
    uv, python = tmp_path / "uv", tmp_path / "python"
    uv.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "uv 1.0" && exit 0\n'
        "echo 'error: Failed to fetch: https://index/simple/rich/'\n"
        "echo '  cause: invalid peer certificate: UnknownIssuer'\nexit 2\n"
    )
    python.write_text(
        "#!/bin/sh\n"
        "echo \"WARNING: Location 'x' is ignored: it is neither a file nor a folder\"\n"
        "echo 'Collecting rich===15.0.0' | grep -v config\n"
    )
    uv.chmod(0o755)
    python.chmod(0o755)
    settings.setattr(module, "pip_settings", lambda python: {})
    made = module.Installer(python, tmp_path, tmp_path / "log")
    assert made.use_uv("1.0") == ""
    made.install("Installing", "rich===15.0.0")
    assert made.uv is None
    assert "Trying pip" in capsys.readouterr().out
    log = (tmp_path / "log").read_text()
    assert "UnknownIssuer" in log
    assert "Collecting rich===15.0.0" in log
    assert "is ignored" not in log


@pytest.mark.parametrize("make", ["uv"], indirect=True)
def test_uv_unpacks_where_the_progress_line_counts(make, settings, environment, tmp_path):
    names = ["pkg_count_a", "pkg_count_b", "pkg_count_c"]
    for name in names:
        make_wheel(tmp_path / "here", name, "1.0")
    settings.setenv("PIP_NO_INDEX", "1")
    settings.setenv("PIP_FIND_LINKS", str(tmp_path / "here"))
    made = make()
    arriving = module.Arriving(made._unpacked_by_uv(), made._site_packages(), len(names))
    arriving.read("Downloading pkg-count-a (1.0MiB)\n")
    made.install("Installing", "--no-deps", *(f"{name}===1.0" for name in names))
    assert arriving.words() == "3/3 packages unpacked; Downloading pkg-count-a (1.0MiB)"
    arriving.read("Prepared 3 packages in 1ms\n")
    assert arriving.words() == "3/3 packages installed"


def test_pip_is_counted_by_what_it_collects_and_installs(tmp_path):
    arriving = module.Arriving([], [tmp_path], 2)
    arriving.read("Collecting torch===2.13.0\n")
    assert arriving.words() == "1/2 torch===2.13.0"
    arriving.read("Installing collected packages: torch, numpy\n")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    assert arriving.words() == "1/2 packages installed"
