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

(($# >= 2)) || {
    echo "usage: bash launch/requeue.sh OUT COMMAND..." >&2
    exit 2
}
out="$1"
shift
preempted=75
rank_lost=69
asked=0

# `deepspeed` itself dies of SIGTERM and leaves its ranks running: its child, the launcher of this machine, passes it on.
# shellcheck disable=SC2317,SC2329  # the traps below call it
pass_on() {
    asked=1
    pkill -TERM -P "$child" -f deepspeed.launcher.launch || kill -TERM "$child"
}
trap pass_on TERM USR1

for ((try = 1; try <= ${TRIES:-10}; try++)); do
    resume=()
    # A run that was ended before its first checkpoint starts anew.
    if compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null; then resume=(--resume); fi
    rm -f "$out/end.json"
    "$@" ${resume[@]+"${resume[@]}"} &
    child=$!
    # A signal ends `wait` before the child ends.
    while :; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if ((status != 0)); then
        noted="$(sed -n 's/.*"status": \([0-9]*\).*/\1/p' "$out/end.json" 2>/dev/null)"
        status="${noted:-$status}"
    fi
    ((status == preempted || status == rank_lost)) || exit "$status"
    echo "== ended with status $status, try $try of ${TRIES:-10}" >&2
    ((asked)) && exit "$status"
done
exit "$status"
