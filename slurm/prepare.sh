#!/bin/bash
# Turn a dataset into a .beton file, on one node without GPUs:
#
#   sbatch slurm/prepare.sh /data/imagenet/train data/imagenet_train.beton [more options of `simclr-dist prepare`]
#
#SBATCH --job-name=simclr-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8          # EDIT: one image a CPU at a time; ImageNet takes about an hour with 16
##SBATCH --time=04:00:00           # EDIT
##SBATCH --partition=cpu           # EDIT
#SBATCH --output=slurm-%j.out

PYTHON="${SIMCLR_PYTHON:-}"        # EDIT: as in train.sh
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON="$PWD/.venv/bin/python"; } || PYTHON=python3
# The file gets its name when it is complete, so a job that is cut short leaves nothing that looks finished.
exec "$PYTHON" -m simclr_dist.cli prepare "$@"
