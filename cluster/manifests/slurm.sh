#!/usr/bin/env bash
# Slurm: sbatch slurm.sh, from the project's folder on a file system that every node sees, after `make setup` there.
# Whole nodes only: the end of the job stops every Ray on them.
#SBATCH --job-name=dbd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=dbd-%j.log
# Edit above: the size; some sites want --partition and --account. Edit below: what to run, and the interface.
set -euo pipefail
# demo uses CPUs only: name another preset to train on the GPUs
command=("$PWD/.venv/bin/dbd" train demo --storage "$PWD/runs")
interface= # such as ib0; empty where the nodes' host names resolve to addresses that the others reach

export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
if [ -n "$interface" ]; then
    export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="=$interface"
fi

# A token of this job's own, in a file that only its user reads: other users share these networks.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"

# The port is taken from the job's number, so that two jobs of one user do not meet.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_NNODES" -- "${command[@]}"
