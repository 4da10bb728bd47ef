#!/usr/bin/env bash
# Sourced by the scripts that start ranks: their options, the environment that goes along, signals, and starting again.
#
# Every one of them takes its own options first, then a command of ds-optim with its arguments:
#   train (where none is named)   doctor        on every rank
#   compare, memory               driven from here, each cell started on every rank
# Options that all have:
#   --dry-run      print the exact commands and start nothing
#   --port N       of rank 0, for the rendezvous
#   --tries N      how often a run that was preempted (status 75) or lost a rank (69) is started [TRIES, 10]; not again after
#                  a file OUT/stop or --time-limit-s
# SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C to the script reach every rank, as SIGUSR1 and as the file OUT/stop, repeated until
# the ranks have ended: they save, and the script ends with their status, 75, without starting again. A second one after
# more than a second (no SIGUSR1, which may be repeated) ends them at once, as SIGQUIT (Ctrl-\) does. The terminal sends
# Ctrl-C to this script alone: launchers would pass it on as they like.

# shellcheck source=launch/setup_env.sh
source "$LAUNCH/setup_env.sh"

PREEMPTED=75
RANK_LOST=69
dry_run=0
port=""
tries="${TRIES:-10}"
rest=()
command=()
environment=()
asked=0
asked_at=0
child=""
asker=""
# What comes within so many microseconds of a request is the same one: a terminal that closes sends SIGHUP twice.
same_us=1000000
# How often a request to end is repeated.
ask_every_s=2
# How long ranks that lost others may take to end by themselves.
grace_s=5
# What ranks are found by, on any node: it stands on the command line of each, and on no other.
run_token="${DS_OPTIM_RUN:-$(hostname)-$$-$(date +%s)}"

if ! command -v deepspeed >/dev/null && [[ -x $DS_OPTIM_VENV/bin/deepspeed ]]; then
    PATH="$DS_OPTIM_VENV/bin:$PATH"
fi
python="${PYTHON:-$(command -v python || command -v python3 || true)}"
# GPUs that a rank of this machine may take.
usable_gpus() {
    local gpus
    gpus="$(gpu_count)"
    if ((gpus > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]')"
    fi
    echo "$gpus"
}
if [[ -z ${DS_ACCELERATOR:-} && $(usable_gpus) == 0 ]]; then
    export DS_ACCELERATOR=cpu
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

# A user's mistake: one line, status 2.
mistake() {
    printf '%s: error: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 2
}

# What a dry run does without.
need() {
    ((dry_run)) || command -v "$1" >/dev/null || mistake "$1 is not on PATH: $2"
}

# whole OPTION VALUE [MOST]: a whole number from 1.
whole() {
    if [[ ! $2 =~ ^[1-9][0-9]{0,8}$ ]] || (($2 > ${3:-100000})); then
        mistake "$1 $2: write a whole number from 1${3:+ to $3}"
    fi
}

# check_gpus RANKS GPUS WHERE: that ranks of one node do not share a GPU, which NCCL refuses.
check_gpus() {
    [[ ${DS_ACCELERATOR:-cuda} == cuda ]] || return 0
    (($2 == 0 || $1 <= $2)) ||
        mistake "$1 ranks need as many GPUs, and $3 has $2: start $2 or fewer, or set DS_ACCELERATOR=cpu"
}

# take_options --NAME=VARIABLE... -- ARGUMENTS: the script's own options, which come first; what follows is in `rest`.
take_options() {
    local -A known=([--port]=port [--tries]=tries)
    local name
    while [[ $1 != -- ]]; do
        known[${1%%=*}]="${1#*=}"
        shift
    done
    shift
    while (($#)); do
        case "$1" in
            --dry-run) dry_run=1 && shift && continue ;;
            -h | --help) show_help "$0" && exit 0 ;;
        esac
        name="${1%%=*}"
        [[ -n ${known[$name]:-} ]] || break
        if [[ $1 == *=* ]]; then
            printf -v "${known[$name]}" '%s' "${1#*=}"
        else
            (($# >= 2)) || mistake "$1 needs a value"
            printf -v "${known[$name]}" '%s' "$2"
            shift
        fi
        shift
    done
    rest=("$@")
    [[ -z $port ]] || whole --port "$port" 65535
    whole --tries "$tries"
    case "${rest[0]:-}" in
        train | doctor | cell | compare | memory) ;;
        '' | -*) rest=(train ${rest[@]+"${rest[@]}"}) ;;
        *) mistake "unknown option or command ${rest[0]}: write train, doctor, compare or memory before its arguments" ;;
    esac
}

# A port that nobody listens on here and that the kernel gives to no outgoing connection.
free_port() {
    "$python" - <<'PY'
import random, socket
while True:
    port = random.randrange(15000, 32000)
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    print(port)
    break
PY
}

# hosts_of HOSTFILE: the names, in order. ranks_of HOSTFILE: the sum of the slots.
hosts_of() { awk '!/^[[:space:]]*(#|$)/ {print $1}' "$1"; }
ranks_of() { sed -n 's/^[[:space:]]*[^#[:space:]][^[:space:]]*[[:space:]]*slots=\([0-9]*\).*/\1/p' "$1" | awk '{n += $1} END {print n + 0}'; }

check_hostfile() {
    [[ -n $1 ]] || mistake "no hostfile: give --hostfile FILE (ds-optim hostfile writes one)"
    [[ -f $1 ]] || mistake "no such hostfile: $1 (ds-optim hostfile writes one)"
    local line number=0 entry='^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*([[:space:]]+max[-_]slots=[0-9]+)?[[:space:]]*(#.*)?$'
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#|$) || $line =~ $entry ]] ||
            mistake "$1, line $number: '${line%$'\r'}' is not 'NAME slots=N'"
    done <"$1"
    (($(ranks_of "$1") > 0)) || mistake "$1 names no host: write lines such as 'node1 slots=8'"
    local twice
    twice="$(hosts_of "$1" | sort | uniq -d | head -1)"
    [[ -z $twice ]] || mistake "$1 names $twice twice: write it once, with all its slots"
}

# DeepSpeed tries the first host alone; a rank on another that cannot be reached is waited for, for half an hour.
check_reachable() {
    local host bad=0 waiting=()
    for host in "$@"; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null 2>/dev/null &
        waiting+=("$!:$host")
    done
    for host in "${waiting[@]}"; do
        wait "${host%%:*}" && continue
        printf '%s: error: %s\n' "$(basename -- "$0")" \
            "${host#*:} cannot be reached: 'ssh ${host#*:} true' must work without a password" >&2
        bad=1
    done
    ((bad == 0)) || exit 2
}

# Names of the variables that other nodes need: what decides how ranks run, nothing that belongs to one machine.
forwarded() {
    compgen -e | grep -E \
        -e '^(DS|DS_OPTIM|DEEPSPEED|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|HF|TRANSFORMERS|TOKENIZERS|UCX|FI|PYTHON)_?[A-Z0-9_]*$' \
        -e '^(PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|XDG_CACHE_HOME|CUDA_HOME|CUDA_DEVICE_MAX_CONNECTIONS)$' |
        grep -vxE 'DS_ENV_FILE|DS_OPTIM_(ROOT|VENV|CPU_TORCH|CELL_LAUNCHER|RUN)' || true
    sed -E 's/[, ]+/\n/g; /^$/d' <<<"${DS_OPTIM_FORWARD:-}" | sed '/^$/d'
}

# Lines NAME=VALUE as DeepSpeed reads them: it takes a blank line for an error, and a remote shell reads the values.
environment_lines() {
    local file name value
    for file in "$HOME/.deepspeed_env" .deepspeed_env; do
        [[ -f $file ]] && sed -E '/^[[:space:]]*(#|$)/d' "$file"
    done
    while IFS= read -r name; do
        value="${!name-}"
        if [[ $value == *[$'\n"$`\\']* ]]; then
            say "not forwarded: $name (its value has a quote, a dollar sign or a line break)"
        elif [[ -n $value ]]; then
            printf '%s=%s\n' "$name" "$value"
        fi
    done < <(forwarded | sort -u)
}

quoted() {
    local words=() word
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then words+=("$word"); else words+=("$(printf '%q' "$word")"); fi
    done
    echo "${words[*]}"
}

# compare and memory are driven from here: one fresh process group on all nodes for each cell.
#   drive RANKS SCRIPT OPTIONS...    # SCRIPT OPTIONS... cell FOLDER starts the ranks of a cell
drive() {
    local ranks="$1"
    shift
    local name="${rest[0]}"
    local driver=("$python" -m ds_optim "$name" --ranks "$ranks" "${rest[@]:1}")
    export DS_OPTIM_CELL_LAUNCHER
    DS_OPTIM_CELL_LAUNCHER="$(quoted bash "$@" cell)"
    if ((dry_run)); then
        echo "DS_OPTIM_CELL_LAUNCHER=$(printf '%q' "$DS_OPTIM_CELL_LAUNCHER") $(quoted "${driver[@]}")"
        exit 0
    fi
    exec "${driver[@]}"
}

# The run's own folder, from --out.
out_folder() {
    local index
    for index in "${!rest[@]}"; do
        case "${rest[index]}" in
            --out) echo "${rest[index + 1]:-}" && return ;;
            --out=*) echo "${rest[index]#--out=}" && return ;;
        esac
    done
}

signal_here() { pkill "-$1" -f "[d]s_optim_run=$run_token" || true; }

# signal_hosts SIGNAL HOST...: the ranks of this run, on each.
signal_hosts() {
    local signal="$1" host
    shift
    for host in "$@"; do
        ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" \
            "pkill -$signal -f '[d]s_optim_run=$run_token'" 2>/dev/null &
    done
    wait_for_signals
}

wait_for_signals() {
    local job
    for job in $(jobs -pr); do
        [[ $job == "${child:-}" ]] || wait "$job" 2>/dev/null || true
    done
}

pass_on() {
    local now="${EPOCHREALTIME:-$(date +%s.%6N)}"
    now="${now/[.,]/}"
    if [[ $1 != SIGQUIT ]] && ((asked)) && { [[ $1 == SIGUSR1 ]] || ((now - asked_at < same_us)); }; then return; fi
    asked=$((asked + 1))
    asked_at="$now"
    if ((asked == 1)) && [[ $1 != SIGQUIT ]]; then
        say "$1: the ranks save and end; the same again ends them at once"
    else
        say "$1: the ranks are ended at once; earlier checkpoints are as they were"
        asked=2
        [[ -z $child ]] || signal_ranks KILL
    fi
    keep_asking
}

# Nobody is there to be asked before they are started, and between two tries.
keep_asking() {
    if ((asked)) && [[ -n $child && -z $asker ]]; then
        ask_ranks &
        asker=$!
    fi
}

# Ranks that still start hear it when they can.
ask_ranks() {
    while kill -0 "$child" 2>/dev/null; do
        if [[ -n $out ]]; then mkdir -p -- "$out" && : >"$out/stop"; fi
        signal_ranks USR1
        sleep "$ask_every_s"
    done
}

# What tells one file of this name in OUT from another.
mark_of() { [[ -z $out || ! -f $out/$1 ]] || stat -c '%i %y' -- "$out/$1"; }
noted() { sed -n "s/.*\"$1\": \([a-z0-9]*\).*/\1/p" "$out/end.json"; }

# Whether the run in OUT may be begun anew: it left no checkpoint, and has not come to its end. What an earlier run left
# is not this one's before its settings are there.
unfinished() {
    ((${SLURM_RESTART_COUNT:-0} > 0)) && return
    ((try > 1)) && [[ $(mark_of settings.json) != "$earlier" ]] && return
    [[ -f $out/end.json ]] && [[ $(noted status) == "$PREEMPTED" || $(noted status) == "$RANK_LOST" ]]
}

start_command() { env ${environment[@]+"${environment[@]}"} "${command[@]}" "$@"; }

# Runs `command` under `environment`, again with --resume while that helps. The scripts define signal_ranks SIGNAL.
run_ranks() {
    local out try status before earlier resume fresh
    if ((dry_run)); then
        quoted env ${environment[@]+"${environment[@]}"} "${command[@]}"
        exit 0
    fi
    out="$(out_folder)"
    earlier="$(mark_of settings.json)"
    [[ ${rest[0]} == train ]] || tries=1
    trap 'pass_on SIGTERM' TERM
    trap 'pass_on Ctrl-C' INT
    trap 'pass_on SIGHUP' HUP
    trap 'pass_on SIGUSR1' USR1
    trap 'pass_on SIGQUIT' QUIT
    for ((try = 1; try <= tries; try++)); do
        child=""
        if ((asked)); then return "$PREEMPTED"; fi
        resume=()
        if [[ -n $out && " ${rest[*]} " != *" --resume "* ]]; then
            if compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null; then
                resume=(--resume)
            elif [[ " ${rest[*]} " != *" --force "* ]] && unfinished; then
                resume=(--force)
            fi
        fi
        before="$(mark_of end.json)"
        # A group of its own: see above.
        set -m
        start_command ${resume[@]+"${resume[@]}"} </dev/null &
        child=$!
        set +m
        keep_asking
        # A signal ends `wait` before the child ends.
        while :; do
            wait "$child"
            status=$?
            kill -0 "$child" 2>/dev/null || break
        done
        # Ranks whose launcher has gone wait for a peer that will not come.
        if ((status != 0)); then end_ranks; fi
        if ((asked)); then
            [[ -z $asker ]] || wait "$asker"
            [[ -z $out ]] || rm -f -- "$out/stop"
        fi
        fresh=0
        if [[ -n $out && -f $out/end.json && $(mark_of end.json) != "$before" ]]; then fresh=1; fi
        # A rank that met a mistake before it joined is known by this status alone: the others note that it is gone.
        if ((status != 0 && status != 2 && fresh)); then
            status="$(noted status)"
        elif ((status != 0 && status != 2 && asked == 1)); then
            # It had not begun: nothing is lost.
            status=$PREEMPTED
        elif ((status > 128)) && [[ ${rest[0]} == train ]]; then
            # A rank was killed before any of them could note it.
            status=$RANK_LOST
        fi
        ((status == PREEMPTED || status == RANK_LOST)) || return "$status"
        say "ended with status $status, try $try of $tries"
        ((asked == 0)) || return "$status"
        if ((fresh)) && [[ $(noted again) == false ]]; then return "$status"; fi
    done
    return "$status"
}

# What is left of a run gets half a minute to save when it was asked to end, else a few seconds.
end_ranks() {
    local seconds="$grace_s"
    ((asked == 0)) || seconds=30
    sleep 1
    while ((seconds > 0)) && ranks_left; do
        sleep 1
        seconds=$((seconds - 1))
    done
    signal_ranks KILL
}

ranks_left() { pgrep -f "[d]s_optim_run=$run_token" >/dev/null; }
