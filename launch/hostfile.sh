#!/usr/bin/env bash
# The nodes of a hostfile, by the stock deepspeed launcher over pdsh and ssh.
#
#   bash launch/hostfile.sh --hostfile FILE [--master ADDRESS] [--dry-run] [--port N] [--tries N] [COMMAND] ARGUMENTS...
#
# FILE has lines "node1 slots=8"; ds-optim hostfile writes it. Every node needs the same checkout, environment and data at
# the same paths, and ssh without a password. Variables named in launch/common.sh (forwarded), in ~/.deepspeed_env, in
# ./.deepspeed_env and in DS_OPTIM_FORWARD="NAME,NAME" go along.
set -uo pipefail
LAUNCH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

hostfile=""
master=""
take_options --hostfile=hostfile --master=master -- "$@"
check_hostfile "$hostfile"
if [[ ${rest[0]} == compare || ${rest[0]} == memory ]]; then
    drive "$(ranks_of "$hostfile")" "$LAUNCH/hostfile.sh" --hostfile "$(realpath "$hostfile")" ${master:+--master "$master"}
fi
need deepspeed "pip install 'ds-optim[all]', or bash launch/quickstart.sh"
need pdsh "install it (apt-get install pdsh), or use launch/openmpi.sh or launch/torchrun.sh"
mapfile -t hosts < <(hosts_of "$hostfile")

folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT
environment_lines >"$folder/deepspeed_env"
# A node whose link is down says nothing: ssh gives it up after some twenty seconds.
environment=(DS_ENV_FILE="$folder/deepspeed_env" PDSH_RCMD_TYPE=ssh
    PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=6 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}")
# What pdsh is given, a shell on each node reads: DeepSpeed quotes only what has a space in it, and not all of that.
words=()
for word in "${rest[@]}"; do
    word="${word//%/%%}"
    if [[ $word == *' '* ]]; then
        word="${word//\\/\\\\}"
        word="${word//\'/\\\'}"
        word="\$'${word// /\\x20}'"
    elif [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
        word="$(printf '%q' "$word")"
    fi
    words+=("$word")
done
# --force_multi: a hostfile of one node may name another machine.
command=(deepspeed --hostfile "$hostfile" --launcher pdsh --force_multi --no_local_rank
    ${master:+--master_addr "$master"} --master_port "${port:-$(free_port)}"
    "$LAUNCH/rank.py" "$run_token" "${words[@]}")
ask_every_s=5
signal_ranks() { signal_hosts "$1" "${hosts[@]}"; }
ranks_left() {
    local host
    for host in "${hosts[@]}"; do
        ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" "pgrep -f '[d]s_optim_run=$run_token'" \
            >/dev/null 2>&1 && return 0
    done
    return 1
}

# pdsh tells that a node has failed, and goes on with the others, whose ranks wait for it.
start_command() {
    rm -f "$folder/status"
    {
        env "${environment[@]}" "${command[@]}" "$@" 2>&1 >&3 | watch_nodes >&2
        local status="${PIPESTATUS[0]}"
        # The first node's status tells why; later ones may be of ranks that were ended for it.
        [[ ! -f $folder/status ]] || status="$(<"$folder/status")"
        return "$status"
    } 3>&1
}
watch_nodes() {
    local line failed=""
    while IFS= read -r line; do
        printf '%s\n' "$line"
        if [[ -z $failed && $line =~ ^pdsh@[^:]*:\ ([^:]*):\ ssh\ exited\ with\ exit\ code\ ([0-9]+) ]]; then
            failed="${BASH_REMATCH[1]}"
            echo "${BASH_REMATCH[2]}" >"$folder/status"
            if [[ ${BASH_REMATCH[2]} == 255 ]]; then
                say "$failed is lost (ssh could not reach it, or its link is down): ending the run on the other nodes"
            else
                say "ranks on $failed ended with status ${BASH_REMATCH[2]}: ending the run on the other nodes"
            fi
            grace_s=15 end_ranks &
        fi
    done
}
if ((dry_run)); then sed 's/^/# environment: /' "$folder/deepspeed_env"; else check_reachable "${hosts[@]}"; fi
run_ranks
