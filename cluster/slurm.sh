#!/bin/bash
# A job on machines that Slurm gives: Ray starts on each of them, the job runs on the first, Ray stops when it ends.
#
#   sbatch --nodes=4 --gpus-per-node=4 cluster/slurm.sh run my_job.yaml cluster.workers=16     what follows is what follows `distill`
#
# The job goes on where it was when the time is up or a machine is lost: submit the same line again. All machines are alike, so leave the
# labels out of the job file. cluster.storage has to be a folder, or a bucket, that all of them reach.

#SBATCH --job-name=distillery
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail
# ADAPT: where Distillery is installed, on a file system that all machines see.
source "${DISTILLERY_HOME:-$SLURM_SUBMIT_DIR}/.venv/bin/activate"

# A secret of this job alone: who has no token is refused, also other users of the same machines.
umask 077
RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH

export RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
# Short, because the path of a socket has at most 107 bytes; of this job, because another may be on the machine.
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ulimit -n "$(ulimit -H -n)"                         # a file a part, a socket a worker

# The port follows from the job, so that two jobs on one machine do not meet.
srun --kill-on-bad-exit=1 ray symmetric-run --address="$head:$((20000 + SLURM_JOB_ID % 10000))" --min-nodes="$SLURM_NNODES" \
  --dashboard-host=127.0.0.1 --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
  --disable-usage-stats -- python -m jobs "$@" cluster.address=auto
