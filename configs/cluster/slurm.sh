#!/bin/bash
# Train on one or more SLURM nodes. Takes the arguments of tools/train.py; submit it from the checkout:
#   sbatch --nodes=2 configs/cluster/slurm.sh model=yolov8s data=coco data.root=DIR batch_size=128
# Two minutes before its time limit, the job saves and requeues itself. If SLURM requeues it, after a preemption or a
# node failure, it resumes from the last save (trainer.save_every).
#SBATCH --job-name=detkit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

# One task per GPU: srun starts the ranks, and only they receive --signal. (SIGUSR1 would kill torchrun.)
# A requeued job runs the same command in the same folder, where resume=auto finds the run.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 \
    python tools/train.py run_dir="runs/train/slurm_$SLURM_JOB_ID" resume=auto "$@"
status=$?

# 138: the ranks saved and exited on SIGUSR1. srun returns their highest status. When the first rank has exited,
# --kill-on-bad-exit sends SIGTERM to the others, which they ignore, and then SIGKILL, which counts as 137.
# 143, after SIGTERM, needs no action: SLURM requeues a preempted job itself, and a cancelled job must not be requeued.
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
