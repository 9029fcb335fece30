#!/usr/bin/env bash
# Installs everything into a virtual environment: bash tools/install.sh .venv
# System headers for building ffcv come from apt when we are root; otherwise the commands to run are printed.
set -euo pipefail

case ${1:-} in
"" | -*)
    echo "usage: bash tools/install.sh FOLDER      a virtual environment, made there with everything in it"
    echo "PYTHON=python3.12 names another Python; SIMCLR_WITHOUT_FFCV=1 leaves out ffcv, which needs a compiler"
    echo "TORCH=cpu takes torch's build without CUDA, some 200 MB in place of several GB; TORCH_INDEX=URL from elsewhere"
    case ${1:-} in -h | --help) exit 0 ;; *) exit 2 ;; esac
    ;;
esac
venv=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "simclr_dist needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || echo missing)." >&2
    echo "Name another one: make PYTHON=python3.12 …" >&2
    exit 2
fi

torch=${TORCH:-}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
case $torch in
"" | cpu) ;;
*)
    echo "TORCH=$torch: the one choice is TORCH=cpu, torch without CUDA; leave it out for the usual build" >&2
    exit 2
    ;;
esac

want_ffcv=1
[ -z "${SIMCLR_WITHOUT_FFCV:-}" ] || want_ffcv=

# What is missing, a line each; nothing where all is there.
missing() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "the module venv of $python"
    [ -n "$want_ffcv" ] || return 0
    command -v g++ >/dev/null || echo "a C++ compiler (g++)"
    if command -v pkg-config >/dev/null; then
        pkg-config --exists opencv4 2>/dev/null || echo "the headers of OpenCV 4"
        pkg-config --exists libturbojpeg 2>/dev/null || echo "the headers of libjpeg-turbo"
    else
        echo "pkg-config, by which the headers of OpenCV 4 and libjpeg-turbo are found"
    fi
}

explain() {
    {
        echo "Missing here, and to be installed before make is run again:"
        missing | sed 's/^/  - /'
        cat <<'TEXT'

  Debian, Ubuntu:  sudo apt-get install -y g++ pkg-config python3-dev python3-venv libopencv-dev libturbojpeg0-dev
                   (some Ubuntus name the last one libturbojpeg-dev)
  Fedora, RHEL:    sudo dnf install -y gcc-c++ pkgconf-pkg-config python3-devel opencv-devel turbojpeg-devel
  conda, no root:  conda install -y -c conda-forge 'opencv>=4' libjpeg-turbo pkg-config compilers
TEXT
        [ -z "$want_ffcv" ] || cat <<'TEXT'

The compiler and the headers are for ffcv, the fast image loader, which is built from source. Or go on without it, with
a slower loader that reads the same files:  make SIMCLR_WITHOUT_FFCV=1 demo
TEXT
    } >&2
    exit 2
}

install_packages() {
    local options=(-qq -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=120) pause packages name
    export DEBIAN_FRONTEND=noninteractive
    for pause in 5 20 60 0; do
        if apt-get "${options[@]}" update; then
            packages=()
            if [ -n "$want_ffcv" ]; then
                packages+=(g++ pkg-config libopencv-dev)
                for name in libturbojpeg0-dev libturbojpeg-dev; do
                    if apt-cache show "$name" >/dev/null 2>&1; then packages+=("$name"); break; fi
                done
            fi
            "$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
            # Only the distribution's own Python takes its headers from a package.
            case $("$python" -c 'import sys; print(sys.base_prefix)') in /usr) packages+=(python3-dev) ;; esac
            apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}" >/dev/null && return
        fi
        [ "$pause" = 0 ] || { echo "apt-get failed; once more in $pause s" >&2; sleep "$pause"; }
    done
}

if [ -n "$(missing)" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing system packages with apt-get"
    install_packages || true   # what it did not bring is named below
fi
[ -z "$(missing)" ] || explain

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
lock=requirements.lock
if [ "$torch" = cpu ]; then
    lock=$venv/requirements.cpu.lock
    grep -Ev '^(nvidia-|cuda-|triton==)' requirements.lock >"$lock"
    echo "installing torch without CUDA from $torch_index"
    # A version such as 2.15.0+cpu is what the lock asks for by 2.15.0.
    # shellcheck disable=SC2046  # two words
    "$venv/bin/python" -m pip install --quiet --no-deps --index-url "$torch_index" \
        $(sed -nE 's/^(torch(vision)?==[^ ;]+).*/\1/p' requirements.lock) || {
        echo "torch without CUDA cannot be had from $torch_index. Name another index, TORCH_INDEX=URL, or leave out" >&2
        echo "TORCH=cpu: the usual build works without a GPU too, but brings several GB of CUDA libraries." >&2
        exit 1
    }
    echo "installing Python packages (minutes the first time)"
else
    echo "installing Python packages (several GB with CUDA libraries; minutes the first time)"
    if [ -z "$(ls /dev/nvidia[0-9]* 2>/dev/null)" ]; then
        echo "no NVIDIA GPU here: make TORCH=cpu … would install torch without CUDA, some 200 MB in their place"
    fi
fi
"$venv/bin/python" -m pip install --quiet -r "$lock"
if [ -n "$want_ffcv" ]; then
    # Without dependencies: ffcv asks for opencv-python, which needs libGL; the headless build in the lock serves.
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation ffcv==1.0.2
fi
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
