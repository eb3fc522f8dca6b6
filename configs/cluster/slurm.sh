#!/bin/bash
# Train on SLURM, on one node or several. The arguments are those of tools/train.py; submit it from the checkout:
#   sbatch --nodes=2 configs/cluster/slurm.sh model=yolov8s data=coco data.root=DIR batch_size=128
# Two minutes before the job's time is up it saves and queues itself again; where SLURM requeues it, by preemption or
# because a node failed, it goes on from what was saved last (trainer.save_every).
#SBATCH --job-name=detkit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

# One task a GPU: srun starts the ranks, and --signal reaches them alone. (torchrun would die of SIGUSR1.)
# What a requeued job starts is the same command in the same folder; resume=auto finds what it did before.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 \
    python tools/train.py run_dir="runs/train/slurm_$SLURM_JOB_ID" resume=auto "$@"
status=$?

# 138: the ranks saved and ended on SIGUSR1. srun returns the highest status of them; one that is slow to end ignores the
# SIGTERM which --kill-on-bad-exit sends it when the first has ended, and SIGKILL, after that, counts as 137.
# 143, on SIGTERM, is left to SLURM: it requeues a preempted job by itself, and one that was cancelled stays so.
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
