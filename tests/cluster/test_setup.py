"""The set-up script's decisions, with the tools that it calls replaced; CI runs the set-up itself."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(tmp_path):
    """A copy of the script in a project of its own, and a PATH on which fakes come first."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "sha256sum", "touch", "rm", "env"):
        (fakes / tool).symlink_to(shutil.which(tool) or tool)

    def run(**tools: str) -> subprocess.CompletedProcess[str]:
        for name, body in tools.items():
            path = fakes / {"apt_get": "apt-get", "pkg_config": "pkg-config", "gxx": "g++"}.get(name, name)
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        command = [shutil.which("bash") or "bash", str(tmp_path / ".ci/setup.sh")]
        return subprocess.run(command, env={"PATH": str(fakes)}, capture_output=True, text=True, check=False)

    return run


PYTHON = f'exec {sys.executable} "$@"'


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14"])
def test_other_pythons_are_refused(setup, version):
    done = setup(python3=f"echo {version}")
    assert done.returncode == 1
    assert f"is Python {version}. Expected: 3.11 to 3.13." in done.stderr


def test_without_root_and_sudo_it_says_what_to_install(setup):
    done = setup(python3=PYTHON, id="echo 1000", apt_get="exit 0")
    assert done.returncode == 1
    assert "neither root nor is there sudo" in done.stderr
    assert "g++ pkg-config libopencv-dev libturbojpeg0-dev" in done.stderr


def test_without_apt_it_says_what_to_install(setup):
    done = setup(python3=PYTHON, id="echo 0")
    assert done.returncode == 1
    assert "there is no apt-get here" in done.stderr


def test_a_sudo_that_refuses(setup):
    done = setup(python3=PYTHON, id="echo 1000", apt_get="exit 0", sudo="exit 1")
    assert done.returncode == 1
    assert "sudo refuses" in done.stderr


def test_only_what_is_missing_is_installed(setup, tmp_path):
    done = setup(
        python3=PYTHON,
        id="echo 0",
        pkg_config='[ "$2" = opencv4 ]',
        gxx="exit 0",
        apt_get=f'echo "$*" >> {tmp_path}/asked; case "$*" in *install*) exit 100;; esac',
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-2].endswith("update")
    assert asked[-1].endswith("install -y --no-install-recommends libturbojpeg0-dev")
    assert done.returncode == 1
    assert "apt-get could not install them" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_what_is_done_is_not_done_again(setup, tmp_path):
    """The second call reads the stamp and asks for nothing; a change of the pins makes it start."""
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    files = "".join((tmp_path / n).read_text() for n in ("pyproject.toml", "constraints.txt", ".ci/setup.sh"))
    state = hashlib.sha256(f"{version} {tmp_path}\n{files}".encode()).hexdigest()
    (venv / ".setup-done").write_text(state)
    done = setup(python3=PYTHON)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open(tmp_path / "constraints.txt", "a") as pins:
        pins.write("# changed\n")
    assert setup(python3=PYTHON, id="echo 0").returncode == 1  # goes on to the system packages
