#!/usr/bin/env bash
# Installs what tests/slurm needs for its throw-away clusters (Debian, Ubuntu; as root): bash tools/install_slurm.sh
# No service is started: the tests start their own daemons, in a folder of their own.
set -euo pipefail

packages=(slurm-wlm munge iproute2)   # iproute2: for networks of their own
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive

missing() {
    for program in munged slurmctld slurmd sbatch srun salloc scontrol setpriv ip; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

[ -n "$(missing)" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing for the tests on SLURM: $(missing | tr '\n' ' ')" >&2
    echo "install them as root: apt-get install -y --no-install-recommends ${packages[*]}" >&2
    exit 2
fi

# The packages would start munged, slurmctld and slurmd. What forbids it stands in this file; images often have one.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi

echo "installing ${packages[*]} with apt-get"
options=(-qq -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=120)
for pause in 5 20 60 0; do
    apt-get "${options[@]}" update &&
        apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}" >/dev/null && break
    [ "$pause" = 0 ] || { echo "apt-get failed; once more in $pause s" >&2; sleep "$pause"; }
done
[ -z "$(missing)" ] || { echo "apt-get did not bring: $(missing | tr '\n' ' ')" >&2; exit 1; }
