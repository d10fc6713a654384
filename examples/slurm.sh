#!/bin/bash
# Train on 2 nodes of 8 GPUs under SLURM: sbatch examples/slurm.sh
#
# One process a GPU; srun's variables tell train.py of the others, so no address is given. With
# --ntasks-per-node=1 --gpus-per-node=8 instead, one process takes the 8 GPUs of its node.
# --signal sends SIGTERM to every process 120 seconds before the time is over. Whichever sees it
# first, all of them stop at the same step, save it and end with 143. No "B:" in front of TERM: it
# would signal this script only, and not the processes. --requeue puts a preempted job back into the
# queue, and the line at the end one whose time was over; --init_from=auto goes on where it stopped.
#SBATCH --job-name=gptjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gptjax-%j.log

RUN=$PWD/out/gpt2 # on a file system that all nodes share

srun --kill-on-bad-exit=1 python train.py gpt2 --out_dir="$RUN" --init_from=auto \
    --batch_size=256 --checkpoint_interval=500
code=$?

# 143: stopped by SIGTERM after saving. Anything else that is not 0 is an error that stays.
if [ $code -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
