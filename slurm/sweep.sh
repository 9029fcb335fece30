#!/bin/bash
# Many runs of one configuration, one array task and one run directory each:
#
#   sbatch --array=0-3 slurm/sweep.sh sweep.yaml configs/cifar10_resnet18_100ep.yaml [key=value …]
#
# sweep.yaml holds `grid: {optim.base_lr: [0.3, 0.6], loss.temperature: [0.1, 0.5]}` (four runs) or a `list:` of
# settings. `python -m launcher slurm --sweep sweep.yaml CONFIG` counts the runs and checks each before it submits.
#
#SBATCH --job-name=simclr-sweep
#SBATCH --array=0-3                # EDIT: 0 to the number of runs less one; %4 at the end: four at a time
#SBATCH --nodes=1                  # EDIT: for each run
#SBATCH --exclusive                # EDIT: see train.sh
##SBATCH --mem=0                   # EDIT
##SBATCH --time=24:00:00           # EDIT
##SBATCH --partition=gpu           # EDIT
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out

# The same shell goes on as train.sh, so that SLURM's signals find it.
[ $# -ge 2 ] || { echo "usage: sbatch --array=0-N slurm/sweep.sh SWEEP.yaml CONFIG [key=value …]" >&2; exit 2; }
[ -f slurm/train.sh ] || { echo "slurm/sweep.sh: no slurm/train.sh in $PWD: submit from the repository's root" >&2; exit 2; }
SWEEP="$1"
shift
exec bash slurm/train.sh --sweep="$SWEEP" "$@"
