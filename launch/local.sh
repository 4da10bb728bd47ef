#!/usr/bin/env bash
# This machine, by the deepspeed launcher: a rank a GPU, or --ranks N on the CPU.
#
#   bash launch/local.sh [--ranks N] [--dry-run] [--port N] [--tries N] [train|doctor|compare|memory] ARGUMENTS...
#   bash launch/local.sh --ranks 2 --stage 3 --steps 40 --out runs/first
#
# All scripts of this folder are used alike; what their options and signals mean stands in launch/common.sh.
set -uo pipefail
LAUNCH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

ranks=""
take_options --ranks=ranks -- "$@"
[[ -z $ranks ]] || whole --ranks "$ranks"
check_gpus "${ranks:-1}" "$(usable_gpus)" "this machine"
need deepspeed "pip install 'ds-optim[all]', or bash launch/quickstart.sh"
if [[ ${rest[0]} == compare || ${rest[0]} == memory ]]; then
    # These start ranks of this machine by themselves.
    command=("$python" -m ds_optim "${rest[0]}" ${ranks:+--ranks "$ranks"} "${rest[@]:1}")
    if ((dry_run)); then quoted "${command[@]}" && exit 0; fi
    exec "${command[@]}"
fi
ranks="${ranks:-$(usable_gpus)}"
((ranks > 0)) || ranks=1
command=(deepspeed --num_gpus "$ranks" --master_port "${port:-$(free_port)}" --no_local_rank
    "$LAUNCH/rank.py" "$run_token" "${rest[@]}")
signal_ranks() { signal_here "$1"; }
run_ranks
