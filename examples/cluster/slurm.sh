#!/bin/bash
# A recipe on several machines with SLURM; the folders of the recipe (parent, out, corpus) are seen by all of them.
#   sbatch examples/cluster/slurm.sh examples/cluster/llama-3.1-70b.yaml
# Interrupted or requeued, the same job goes on where it was.
#SBATCH --job-name=puzzle
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=puzzle-%j.log
set -euo pipefail

recipe=${1:?expected a recipe: sbatch slurm.sh RECIPE.yaml}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=8        # 64 cores for 8 processes
export HF_HUB_OFFLINE=1         # machines that compute often reach no hub

# One torchrun on each machine starts a process for each of its GPUs; they meet at the first machine.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${machines[0]}:29500" \
  -m puzzle.worker "$recipe"
