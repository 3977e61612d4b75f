#!/usr/bin/env bash
# A ring on Slurm: sbatch cluster/slurm.sh conf=/shared/my.yaml run_dir=/shared/runs/one [key=value ...]
# From the root of this project, which must lie on a file system that all nodes see, set up by
# `make setup EXTRA=gpu`.
#SBATCH --job-name=caprl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=caprl-%j.log
set -euo pipefail

root=${CAPRL_ROOT:-$PWD}
export PATH="$root/.venv/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1

# One token for this job alone, in a file that only its user can read; never on a command line.
export RAY_AUTH_TOKEN_PATH=$root/.caprl-token-$SLURM_JOB_ID
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | grep -m1 '\.')
port=$((20000 + SLURM_JOB_ID % 20000))

srun --nodes=1 --ntasks=1 --overlap -w "$head" \
  ray start --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 --block &
for attempt in $(seq 60); do
  ray status --address="$address:$port" >/dev/null 2>&1 && break
  [ "$attempt" = 60 ] && { echo "slurm.sh: Ray's head did not come up on $head" >&2; exit 1; }
  sleep 2
done
if [ "${#nodes[@]}" -gt 1 ]; then
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --overlap \
    -w "$(IFS=,; echo "${nodes[*]:1}")" ray start --address="$address:$port" --block &
fi

# The ring waits for its places itself: workers may still be on their way.
python -m caprl_async.run "$@" ring.address="$address:$port"
