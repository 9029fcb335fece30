#!/bin/bash
# One training on any number of nodes:
#
#   sbatch slurm/train.sh configs/imagenet_resnet50_100ep.yaml [key=value …]     (from the repository's root)
#
# It saves and requeues itself before the time limit and when preempted; `scancel` ends it for good.
# What is marked EDIT depends on the cluster; sbatch's own options win: sbatch --nodes=4 slurm/train.sh …
#
#SBATCH --job-name=simclr
#SBATCH --nodes=1                  # EDIT: any number; the global batch stays what the configuration says
#SBATCH --exclusive                # EDIT: whole nodes with all their GPUs; or e.g. --gpus-per-node=4 --cpus-per-task=32
##SBATCH --mem=0                   # EDIT: all of the node's memory, where a job gets less by itself
##SBATCH --time=24:00:00           # EDIT: without it, the partition's limit
##SBATCH --partition=gpu           # EDIT
##SBATCH --account=project         # EDIT
#SBATCH --ntasks-per-node=1        # one launcher on each node; it starts a process for each GPU
#SBATCH --signal=B:USR1@180        # ask to save 3 minutes before the limit (SLURM may ask up to a minute early)
#SBATCH --requeue
#SBATCH --open-mode=append         # a requeued job keeps its number and its log
#SBATCH --output=slurm-%j.out      # never %x: a job name with slashes leads out of the folder

# SLURM runs a copy of this file, so its own path says nothing; the job starts where sbatch was called.
PYTHON="${SIMCLR_PYTHON:-}"        # EDIT: or export SIMCLR_PYTHON; else .venv here, else python3
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON="$PWD/.venv/bin/python"; } || PYTHON=python3
export SIMCLR_PYTHON="$PYTHON"     # the nodes use it, too
# The code that `launcher slurm` kept for this job is imported, if it is this user's.
for WORD; do
  case "$WORD" in --code=*)
    [ ! -O "${WORD#*=}" ] || export PYTHONPATH="${WORD#*=}${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 ;;
  esac
done

"$PYTHON" -c "import launcher" 2> /dev/null || {
  echo "slurm/train.sh: $PYTHON has no launcher in $PWD: submit from the repository's root, or export SIMCLR_PYTHON" >&2
  exit 2
}
# Until the launcher listens: its workers, and not this process, shall save.
trap "" USR1 USR2
# The launcher takes the place of this script: a job that is more than its training is never requeued.
exec "$PYTHON" -m launcher job "$@"
