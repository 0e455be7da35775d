#!/usr/bin/env bash
# Every network on all GPUs of several nodes, one student after the other:
#
#   sbatch --nodes=2 recipes/slurm/torchrun.sh my.yaml micro_batch=32
#
# A recipe's batch is that of all GPUs together. The run directory must be on a file system that all nodes share. Three
# minutes before the time limit the state is saved (torchrun gives that 30 seconds) and the job queued again.
#SBATCH --job-name=msd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

stopping=no
trap 'stopping=requeue; kill -USR1 "$work"' USR1
trap 'stopping=cancel; kill -TERM "$work"' TERM # scancel, or preemption: then Slurm queues it again by itself

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m msdcli distill "$@" &
work=$!

code=0
wait "$work" || code=$?
if [ "$stopping" != no ] && [ "$code" -gt 128 ]; then # the signal ended the wait, not the work
  code=0
  wait "$work" || code=$?
fi
if [ "$stopping" = requeue ]; then # torchrun reports every signal as a failure
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
