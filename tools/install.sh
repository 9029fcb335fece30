#!/usr/bin/env bash
# Installs everything into a virtual environment: bash tools/install.sh .venv
# System headers for building ffcv come from apt when we are root; otherwise the commands to run are printed.
set -euo pipefail

venv=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "simclr_dist needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || echo missing)." >&2
    echo "Name another one: make PYTHON=python3.12 …" >&2
    exit 2
fi

headers_present() {
    command -v g++ >/dev/null && command -v pkg-config >/dev/null &&
        pkg-config --exists opencv4 libturbojpeg 2>/dev/null
}

venv_works() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null
}

explain() {
    cat >&2 <<'TEXT'
ffcv, the fast image loader, is built from source and needs a C++ compiler and the headers of OpenCV 4 and
libjpeg-turbo. Install them with one of these, then run make again:

  Debian, Ubuntu:  sudo apt-get install -y g++ pkg-config python3-dev python3-venv libopencv-dev libturbojpeg0-dev
                   (Ubuntu names the last one libturbojpeg0-dev or libturbojpeg-dev)
  Fedora, RHEL:    sudo dnf install -y gcc-c++ pkgconf-pkg-config python3-devel opencv-devel turbojpeg-devel
  conda:           conda install -y -c conda-forge 'opencv>=4' libjpeg-turbo pkg-config compilers

Or go on without it, with a slower loader that reads the same files:  make SIMCLR_WITHOUT_FFCV=1 demo
TEXT
    exit 2
}

want_ffcv=1
[ -n "${SIMCLR_WITHOUT_FFCV:-}" ] && want_ffcv=
if { [ -n "$want_ffcv" ] && ! headers_present; } || ! venv_works; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing system packages with apt-get"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        packages=(g++ pkg-config libopencv-dev)
        for turbojpeg in libturbojpeg0-dev libturbojpeg-dev; do
            if apt-cache show "$turbojpeg" >/dev/null 2>&1; then packages+=("$turbojpeg"); break; fi
        done
        venv_works || packages+=(python3-venv)
        # Only the distribution's own Python takes its headers from a package.
        case $("$python" -c 'import sys; print(sys.base_prefix)') in /usr) packages+=(python3-dev) ;; esac
        apt-get install -y -qq --no-install-recommends "${packages[@]}"
    else
        explain
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
echo "installing Python packages (several GB with CUDA libraries; minutes the first time)"
"$venv/bin/python" -m pip install --quiet -r requirements.lock
if [ -n "$want_ffcv" ]; then
    # Without dependencies: ffcv asks for opencv-python, which needs libGL; the headless build in the lock serves.
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation ffcv==1.0.2
fi
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
