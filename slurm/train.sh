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
#SBATCH --mem=0                    # EDIT: all of the node's memory
##SBATCH --time=24:00:00           # EDIT: without it, the partition's limit
##SBATCH --partition=gpu           # EDIT
##SBATCH --account=project         # EDIT
#SBATCH --ntasks-per-node=1        # one launcher on each node; it starts a process for each GPU
#SBATCH --signal=B:USR1@180        # ask to save 3 minutes before the limit (SLURM may ask up to a minute early)
#SBATCH --requeue
#SBATCH --open-mode=append         # a requeued job keeps its number and its log
#SBATCH --output=slurm-%j.out      # never %x: a job name with slashes leads out of the folder

set -u
# SLURM runs a copy of this file, so its own path says nothing; the job starts where sbatch was called.
PYTHON="${SIMCLR_PYTHON:-}"        # EDIT: or export SIMCLR_PYTHON; else .venv here, else python3
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON="$PWD/.venv/bin/python"; } || PYTHON=python3
IN_CONTAINER=()                    # EDIT: e.g. (apptainer exec --nv simclr.sif); the lines below stay outside
NODE_PYTHON="$PYTHON"              # EDIT: the interpreter inside the container

# For arrays ARRAY_TASK: the last task's plain number would stand for the whole array.
JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
JOB="${JOB:-$SLURM_JOB_ID}"
RUN_DIR="" STOP_EARLY=""
# The signal goes to the workers. Those that still import torch ignore it, and find the file later.
stop() {
  [ -n "$RUN_DIR" ] || { STOP_EARLY=1; return; }
  : > "$RUN_DIR/STOP_REQUEST.$JOB"
  scancel --signal="$STOP_SIGNAL" "$JOB"
}
STOP_SIGNAL=USR1
trap stop USR1 USR2
trap : TERM CONT                   # stay alive to the end: the workers get these signals, too

RUN_DIR="$("$PYTHON" -m launcher plan "$@")" || exit $?
[ -n "$RUN_DIR" ] || exit 0        # somebody asked for a stop while the job was waiting
! grep -q '"stop_signal": "USR2"' "$RUN_DIR/plan.json" || STOP_SIGNAL=USR2
[ -z "$STOP_EARLY" ] || stop

# In the background, because bash runs a trap only when the foreground command is over.
# kill-on-bad-exit: without it the other nodes wait for a dead one for 5 minutes and more.
# cpus-per-task: since SLURM 22.05 srun no longer takes it from sbatch, and one core would feed all GPUs.
# immediate: if a node was lost between allocation and start, srun would retry for ever.
# The inner trap: the stop signal may come before Python runs.
srun --immediate=120 --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_JOB_CPUS_PER_NODE%%[(,]*}}" --label \
  ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} \
  sh -c 'trap "" USR1 USR2; exec "$@"' sh "$NODE_PYTHON" -m launcher node --plan "$RUN_DIR/plan.json" &
STEP=$!
# `wait` returns early at every signal: ask until the step is really over. RC at once: a $(…) in between would reset $?.
while :; do wait "$STEP"; RC=$?; kill -0 "$STEP" 2>/dev/null || break; done

exec "$PYTHON" -m launcher finish --run-dir "$RUN_DIR" --rc "$RC"
