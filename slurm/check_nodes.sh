#!/bin/bash
# Are these nodes fit for a training? All ranks connect and gather tensors; nodes that fail are named.
#
#   sbatch --nodes=4 slurm/check_nodes.sh            exit code 0: all fit; 3: see the end of the log
#
#SBATCH --job-name=simclr-check
#SBATCH --nodes=2                  # EDIT
#SBATCH --exclusive                # EDIT: ask for what the training will ask for
##SBATCH --partition=gpu           # EDIT
#SBATCH --time=00:10:00
#SBATCH --ntasks-per-node=1
#SBATCH --no-requeue
#SBATCH --output=slurm-%j.out

PYTHON="${SIMCLR_PYTHON:-}"        # EDIT: as in train.sh
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON="$PWD/.venv/bin/python"; } || PYTHON=python3
export SIMCLR_PYTHON="$PYTHON"     # the nodes use it, too

exec "$PYTHON" -m launcher check-job "$@"
