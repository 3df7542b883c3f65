#!/usr/bin/env bash
# Makes .venv with everything pinned in constraints.txt. Safe to call again: it does only what is missing.
#   PYTHON=python3.12 .ci/setup.sh     choose the interpreter (3.11 to 3.13)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv
stamp=$venv/.setup-done
marker=$venv/.setup-unfinished

say() { printf '==> %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || die "no interpreter '$python'. Expected: Python 3.11 to 3.13. Hint: install one, or name it: make setup PYTHON=python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11 | 3.12 | 3.13) ;;
    *) die "'$python' is Python $version. Expected: 3.11 to 3.13. Hint: make setup PYTHON=python3.12" ;;
esac

# The path belongs to the state: a moved virtual environment has scripts that point to where it was.
state=$(printf '%s %s\n' "$version" "$PWD" | cat - pyproject.toml constraints.txt .ci/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
fi

# 1. System packages. FFCV comes as source and finds OpenCV and turbojpeg through pkg-config; the whole libopencv-dev also
#    brings the X11 and GL libraries that OpenCV's Python wheel loads.
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing+=("python$version-dev")
if [ ${#missing[@]} -gt 0 ]; then
    by_hand="Hint: have '${missing[*]}' (Debian's names) installed, then call this again"
    command -v apt-get >/dev/null || die "system packages are missing, and there is no apt-get here. $by_hand"
    root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "system packages are missing, and this is neither root nor is there sudo. $by_hand"
        root=(sudo)
        [ -t 0 ] || root=(sudo -n) # nobody is there to type a password
        "${root[@]}" true || die "system packages are missing, and sudo refuses. $by_hand"
    fi
    apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120)
    say "system packages: ${missing[*]}"
    "${apt[@]}" update || say "apt-get update failed; trying with the lists that are here"
    "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null || die "apt-get could not install them. $by_hand"
fi

# 2. The virtual environment: made anew when it is broken, or of another Python.
if [ -e "$venv" ]; then
    found=$("$venv/bin/python" -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo broken)
    if [ "$found" != "$version" ]; then
        say "$venv is $found, wanted $version: making it anew"
        rm -rf "$venv"
    fi
fi
if [ ! -e "$venv" ]; then
    say "virtual environment with Python $version"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"

# 3. Python packages. A run that was killed can leave packages half written, which pip takes for installed: drop their
#    descriptions, so that pip writes them again.
if [ -e "$marker" ]; then
    say "the last set-up was interrupted: looking for half-written packages"
    "$venv/bin/python" - <<'EOF'
import importlib.metadata, pathlib, shutil
for dist in importlib.metadata.distributions():
    described = pathlib.Path(str(dist._path))
    if described.suffix != ".dist-info" or described.name.startswith("pip-"):
        continue
    files = dist.files  # None without a RECORD, which is written last
    if files is None or any(not f.locate().exists() for f in files if f.suffix != ".pyc"):
        print("    again:", described.name)
        shutil.rmtree(described)
EOF
fi
touch "$marker"
quiet=(-qq)
[ -t 1 ] && quiet=()
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# Bytecode comes below, from all cores. Builds use the pinned setuptools, not the newest.
install=("${pip[@]}" install "${quiet[@]}" --no-compile -c constraints.txt)
say "Python packages (a few minutes and 6 GB of disk the first time)"
"${install[@]}" pip setuptools wheel
"${install[@]}" --no-build-isolation -e '.[dev]'

# 4. A wheel of FFCV from pip's cache may want another OpenCV than this system has: build it here once more.
loads_ffcv() {
    "$venv/bin/python" - <<'EOF'
import ctypes, importlib.metadata
library = next(f for f in importlib.metadata.files("ffcv") if f.name.startswith("_libffcv") and f.suffix == ".so")
ctypes.CDLL(str(library.locate()))
EOF
}
if ! loads_ffcv 2>/dev/null; then
    say "FFCV's library does not load: building it again"
    "${install[@]}" --no-build-isolation --no-cache-dir --no-deps --force-reinstall ffcv
    loads_ffcv || die "FFCV's library does not load (the lines above say why). Hint: check libopencv-dev and libturbojpeg0-dev"
fi
"$venv/bin/python" -c 'import torchvision.ops, cv2' || die "torch, torchvision or OpenCV does not import (the lines above say why)"

# 5. Bytecode. Where PYTHONDONTWRITEBYTECODE is set, as in many container images, no import would ever write it, and every
#    process, each worker of Ray among them, would compile PyTorch anew. A file that does not compile is nobody's import.
say "bytecode"
"$venv/bin/python" -m compileall -qq -j 0 -x '/tests?/|/testing/' \
    "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true

rm -f "$marker"
printf '%s\n' "$state" >"$stamp"
say "ready: $venv/bin/dbd --help"
