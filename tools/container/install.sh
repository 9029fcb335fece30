#!/usr/bin/env bash
# Installs simclr_dist into an image's own Python, and removes what only the build needed: install.sh SOURCE
# Versions are those of requirements.lock.
set -euo pipefail

source=${1:?usage: install.sh SOURCE, a checkout}
built=$(mktemp -d)
for_ffcv="g++ pkg-config libopencv-dev libturbojpeg0-dev"

apt-get update
# gcc stays: Triton compiles a small launcher with it at run time.
# shellcheck disable=SC2086  # several names
apt-get install -y --no-install-recommends gcc libc6-dev $for_ffcv
bash "$source/tools/build_ffcv_wheel.sh" "$built"
pip install --no-cache-dir --constraint "$source/requirements.lock" "$source[ffcv,eval,export,timm,hf]"
pip install --no-cache-dir --no-deps "$built"/ffcv-*.whl
# shellcheck disable=SC2086
apt-get purge -y --auto-remove $for_ffcv
rm -rf "$built" /var/lib/apt/lists/*
simclr-dist --version
