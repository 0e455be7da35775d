#!/usr/bin/env bash
# One student per task of a Slurm array, each on one GPU; here for a recipe with 5 students:
#
#   sbatch --array=0-4 recipes/slurm/array.sh my.yaml seed=1
#
# Three minutes before the time limit the student is saved and its task queued again, until it is finished. When all are,
# `msd distill my.yaml seed=1` measures the run. The teacher is trained by whichever task comes first; the others wait.
#SBATCH --job-name=msd
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail

stopping=no
trap 'stopping=requeue; kill -USR1 "$work"' USR1
trap 'stopping=cancel; kill -TERM "$work"' TERM # scancel, or preemption: then Slurm queues it again by itself

srun msd distill "$@" --student "$SLURM_ARRAY_TASK_ID" &
work=$!

code=0
wait "$work" || code=$?
if [ "$stopping" != no ] && [ "$code" -gt 128 ]; then # the signal ended the wait, not the work
  code=0
  wait "$work" || code=$?
fi
if [ "$stopping" = requeue ] && [ "$code" -eq 75 ]; then # 75: saved and not finished
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  exit 0
fi
exit "$code"
