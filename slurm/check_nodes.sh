#!/bin/bash
# Are these nodes fit for a training? All ranks connect and gather tensors; nodes that fail are named.
#
#   sbatch --nodes=4 slurm/check_nodes.sh            exit code 0: all fit; 3: see the end of the log
#
#SBATCH --job-name=simclr-check
#SBATCH --nodes=2                  # EDIT
#SBATCH --exclusive                # EDIT: ask for what the training will ask for
#SBATCH --mem=0                    # EDIT
##SBATCH --partition=gpu           # EDIT
#SBATCH --time=00:10:00
#SBATCH --ntasks-per-node=1
#SBATCH --no-requeue
#SBATCH --output=slurm-%j.out

set -u
PYTHON="${SIMCLR_PYTHON:-}"        # EDIT: as in train.sh
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON="$PWD/.venv/bin/python"; } || PYTHON=python3
IN_CONTAINER=()                    # EDIT: as in train.sh
NODE_PYTHON="$PYTHON"              # EDIT: as in train.sh

RUN_DIR="$("$PYTHON" -m launcher plan-check "$@")" || exit $?
srun --immediate=120 --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_JOB_CPUS_PER_NODE%%[(,]*}}" --label \
  ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$NODE_PYTHON" -m launcher node --plan "$RUN_DIR/plan.json"
exec "$PYTHON" -m launcher check-report --run-dir "$RUN_DIR"
