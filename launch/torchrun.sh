#!/usr/bin/env bash
# torchrun: the same command on every node (Kubernetes, a batch system, several terminals), or on one machine.
#
#   bash launch/torchrun.sh [--ranks N] [--nodes N --rendezvous HOST:PORT [--id NAME]] [COMMAND] ARGUMENTS...
#   srun --ntasks-per-node=1 bash launch/torchrun.sh ...     # takes nodes, host, port and id from the job
#
# --ranks are those of this node. HOST is any of the nodes. --dry-run, --port and --tries as in launch/common.sh.
# torchrun's status is always 1 when a rank failed: what decides about starting again is --out's end.json, on a file system
# that all nodes share. compare and memory need a launcher that starts all nodes from one: hostfile.sh, openmpi.sh, slurm.sbatch.
set -uo pipefail
LAUNCH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

ranks=""
nodes="${SLURM_NNODES:-1}"
rendezvous=""
id="${SLURM_JOB_ID:-ds-optim}"
take_options --ranks=ranks --nodes=nodes --rendezvous=rendezvous --id=id -- "$@"
[[ -z $ranks ]] || whole --ranks "$ranks"
whole --nodes "$nodes"
check_gpus "${ranks:-1}" "$(usable_gpus)" "this machine"
need torchrun "pip install 'ds-optim[all]', or bash launch/quickstart.sh"
ranks="${ranks:-$(usable_gpus)}"
((ranks > 0)) || ranks=1
if [[ -z $rendezvous ]] && ((nodes > 1)); then
    [[ -n ${SLURM_JOB_NODELIST:-} ]] || mistake "$nodes nodes need --rendezvous HOST:PORT, the same on each of them"
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -1)"
    rendezvous="${first:-$SLURM_JOB_NODELIST}:${port:-$((15000 + SLURM_JOB_ID % 17000))}"
fi
rendezvous="${rendezvous:-127.0.0.1:${port:-$(free_port)}}"
[[ $rendezvous == *:* ]] || rendezvous="$rendezvous:${port:-29400}"
[[ $rendezvous =~ ^.+:[0-9]+$ ]] || mistake "--rendezvous $rendezvous: write HOST:PORT"
if [[ ${rest[0]} == compare || ${rest[0]} == memory ]]; then
    ((nodes == 1)) || mistake "${rest[0]} over nodes needs a launcher that starts them all: hostfile.sh, openmpi.sh, slurm.sbatch"
    drive "$ranks" "$LAUNCH/torchrun.sh" --ranks "$ranks"
fi
command=(torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d --rdzv-endpoint "$rendezvous"
    --rdzv-id "$id" "$LAUNCH/rank.py" "$run_token" "${rest[@]}")
signal_ranks() { signal_here "$1"; }
run_ranks
