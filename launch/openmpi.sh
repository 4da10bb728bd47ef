#!/usr/bin/env bash
# The nodes of a hostfile, by OpenMPI's mpirun; DeepSpeed asks mpi4py for the ranks. Needs pip install '.[mpi]' in this checkout.
#
#   bash launch/openmpi.sh --hostfile FILE [--interface NAME] [--dry-run] [--port N] [--tries N] [COMMAND] ARGUMENTS...
#   bash launch/openmpi.sh --ranks N ...      # this machine
#
# --interface (or GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) is the network interface, named alike on every node.
set -uo pipefail
LAUNCH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

hostfile=""
ranks=""
interface="${GLOO_SOCKET_IFNAME:-${NCCL_SOCKET_IFNAME:-}}"
take_options --hostfile=hostfile --ranks=ranks --interface=interface -- "$@"
[[ -z $ranks ]] || whole --ranks "$ranks"
hosts=()
if [[ -n $hostfile || -z $ranks ]]; then
    check_hostfile "$hostfile"
    ranks="$(ranks_of "$hostfile")"
    mapfile -t hosts < <(hosts_of "$hostfile")
else
    check_gpus "$ranks" "$(usable_gpus)" "this machine"
fi
if [[ ${rest[0]} == compare || ${rest[0]} == memory ]]; then
    drive "$ranks" "$LAUNCH/openmpi.sh" --ranks "$ranks" ${hostfile:+--hostfile "$(realpath "$hostfile")"} \
        ${interface:+--interface "$interface"}
fi
need mpirun "install OpenMPI (apt-get install openmpi-bin)"
((dry_run)) || "$python" -c 'import mpi4py' 2>/dev/null ||
    mistake "$python has no mpi4py: pip install mpi4py on every node"

export MASTER_PORT="${port:-$(free_port)}"
command=(mpirun -np "$ranks" ${hostfile:+--hostfile "$hostfile"} --bind-to none --mca plm_rsh_agent ssh
    -x MASTER_PORT)
[[ -n $hostfile ]] || command+=(--oversubscribe)
[[ $(id -u) != 0 ]] || command+=(--allow-run-as-root)
[[ -z $interface ]] || command+=(--mca oob_tcp_if_include "$interface" --mca btl_tcp_if_include "$interface")
while IFS= read -r name; do
    [[ -z ${!name-} ]] || command+=(-x "$name")
done < <(forwarded | sort -u)
command+=("$python" "$LAUNCH/rank.py" "$run_token" "${rest[@]}")
environment=(MASTER_PORT="$MASTER_PORT")
signal_ranks() {
    if ((${#hosts[@]})); then signal_hosts "$1" "${hosts[@]}"; else signal_here "$1"; fi
}
((dry_run || ${#hosts[@]} == 0)) || check_reachable "${hosts[@]}"
run_ranks
