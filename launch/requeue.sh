#!/usr/bin/env bash
# Runs a training command until it is done: again, with --resume, after a preemption or the loss of a rank.
#
#   bash launch/requeue.sh OUT COMMAND...     # e.g. runs/big deepspeed --module ds_optim train --out runs/big ...
#
# OUT is what the command has as --out. TRIES (10) bounds how often it is started. The statuses are those that
# `ds-optim train --help` lists; OUT/end.json has them too, for launchers that do not pass them on (torchrun never does,
# `deepspeed` not when a rank was killed).
#
# SIGTERM or SIGUSR1 to this script reach the ranks, which save; it then exits 75 and does not start again: that is for
# the batch system. Under Slurm: #SBATCH --signal=B:USR1@120, and after this script
#   [[ $? == 75 ]] && scontrol requeue "$SLURM_JOB_ID"
set -uo pipefail
LAUNCH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

case "${1:-}" in -h | --help) show_help "$0" && exit 0 ;; esac
(($# >= 2)) || mistake "usage: bash launch/requeue.sh OUT COMMAND..."
whole TRIES "$tries"
rest=(train --out "$1")
command=("${@:2}")

# `deepspeed` itself dies of SIGTERM and leaves its ranks running: its child, the launcher of this machine, passes it on.
signal_ranks() {
    kill -0 "$child" 2>/dev/null || return 0
    pkill "-$1" -P "$child" -f deepspeed.launcher.launch || kill "-$1" "$child"
}
run_ranks
