#!/usr/bin/env bash
# Runs a training command until it is done: again, with --resume, after a preemption or the loss of a rank.
#
#   bash launch/requeue.sh OUT COMMAND...     # e.g. runs/big deepspeed --module ds_optim train --out runs/big ...
#
# OUT is what the command has as --out. TRIES (10) bounds how often it is started. The statuses are those that
# `ds-optim train --help` lists; OUT/end.json has them too, for launchers that do not pass them on (torchrun never does,
# `deepspeed` not when a rank was killed).
#
# SIGTERM, SIGUSR1 or Ctrl-C to this script reach the ranks as the file OUT/stop, whatever started them: they save, and it
# exits 75 and does not start again: that is for the batch system. A second one ends them at once (launch/common.sh).
# Under Slurm: #SBATCH --signal=B:USR1@120, and after this script
#   [[ $? == 75 ]] && scontrol requeue "$SLURM_JOB_ID"
set -uo pipefail
LAUNCH="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

case "${1:-}" in -h | --help) show_help "$0" && exit 0 ;; esac
(($# >= 2)) || mistake "usage: bash launch/requeue.sh OUT COMMAND..."
whole TRIES "$tries"
rest=(train --out "$1")
# A script of this folder within is started again from here.
export TRIES=1
command=("${@:2}")

# What starts the ranks is in a group of its own; where that gives them groups of theirs, they are known by this.
export DS_OPTIM_RUN="$run_token"
of_this_run() {
    grep -lzxF "DS_OPTIM_RUN=$run_token" /proc/[0-9]*/environ 2>/dev/null | xargs -r grep -lz '^RANK=' 2>/dev/null |
        cut -d/ -f3
}
# The first request is the file; only what must end at once is sent to processes.
signal_ranks() {
    [[ $1 == KILL ]] || return 0
    kill -KILL -- "-$child" 2>/dev/null || true
    of_this_run | xargs -r kill -KILL 2>/dev/null || true
}
ranks_left() { kill -0 -- "-$child" 2>/dev/null || [[ -n $(of_this_run) ]]; }
run_ranks
