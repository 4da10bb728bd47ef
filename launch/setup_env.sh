#!/usr/bin/env bash
# Sourced by the scripts of this repository: makes .venv in the checkout, once, and puts it on PATH.
# (Where the checkout's path has a space in it, the environment lies in the user's cache instead.)
#
#   source launch/setup_env.sh
#   setup_env [EXTRA]          # EXTRA: an optional dependency of pyproject.toml, such as dev
#   build_ops cpu NAME...      # DeepSpeed's C++ ops, built before anything waits for them
#
# Needs python3 (or what PYTHON names) 3.10 to 3.13. What a build needs beside it (a C++ compiler,
# Python's headers) is installed with apt-get where that is possible, else named.

DS_OPTIM_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
DS_OPTIM_VENV="$DS_OPTIM_ROOT/.venv"
# torch cannot link an extension against itself where its own path has a space.
if [[ $DS_OPTIM_VENV == *[[:space:]]* ]]; then
    DS_OPTIM_VENV="${XDG_CACHE_HOME:-$HOME/.cache}/ds-optim/venv-$(cksum <<<"$DS_OPTIM_ROOT" | cut -d' ' -f1)"
fi
# The newest torch inside the range of pyproject.toml; pinned on CPU so that runs compare.
DS_OPTIM_CPU_TORCH="torch==2.13.0"

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# show_help SCRIPT: the comment that it starts with.
show_help() { sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$1"; }

gpu_count() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        nvidia-smi -L | grep -c '^GPU '
    else
        echo 0
    fi
}

_ensure_build_tools() {
    local python="$1" missing=()
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    "$python" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        missing+=(python3-dev)
    command -v "${CXX:-c++}" >/dev/null || missing+=(g++)
    ((${#missing[@]} == 0)) && return
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        fail "install these first: ${missing[*]} (Debian and Ubuntu: sudo apt-get install ${missing[*]})"
    fi
    say "installing ${missing[*]}"
    apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >&2
}

_install() {
    local python="$1" extra="$2"
    local pip=("$DS_OPTIM_VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
    if [[ ! -x $DS_OPTIM_VENV/bin/pip ]]; then
        say "making $DS_OPTIM_VENV"
        "$python" -m venv "$DS_OPTIM_VENV"
    fi
    # torch first: what it is decides what DeepSpeed's setup finds.
    say "installing torch (once)"
    if [[ $(gpu_count) == 0 ]]; then
        "${pip[@]}" "$DS_OPTIM_CPU_TORCH"
    else
        "${pip[@]}" "torch$("$python" - "$DS_OPTIM_ROOT/pyproject.toml" <<'PY'
import re, sys
print(re.search(r'"torch([^"]*)"', open(sys.argv[1], encoding="utf-8").read()).group(1))
PY
)"
    fi
    say "installing ds-optim and what it needs (once)"
    "${pip[@]}" --editable "$DS_OPTIM_ROOT${extra:+[$extra]}"
}

setup_env() {
    local extra="${1:-}" python="${PYTHON:-python3}" stamp wanted
    command -v "$python" >/dev/null || fail "no $python: install Python 3.10 to 3.13, or set PYTHON to one"
    "$python" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info < (3, 14))' ||
        fail "$python is none of 3.10 to 3.13: set PYTHON to one that is"
    _ensure_build_tools "$python"
    mkdir -p "$DS_OPTIM_VENV"
    # Two scripts started at once must not install into one environment together.
    exec 9>"$DS_OPTIM_VENV/setup.lock"
    if command -v flock >/dev/null; then flock 9; fi
    stamp="$DS_OPTIM_VENV/installed${extra:+-$extra}"
    # The path is part of it: a moved checkout has a .venv whose scripts point to the old place.
    # What nvidia-smi sees is part of it too: another torch belongs to it.
    wanted="$( (cat "$DS_OPTIM_ROOT/pyproject.toml" && printf '%s %s' "$DS_OPTIM_CPU_TORCH" "$DS_OPTIM_ROOT") |
        cksum) $(gpu_count)"
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
        _install "$python" "$extra"
        printf '%s' "$wanted" >"$stamp"
    fi
    exec 9>&-
    # DeepSpeed finds its ninja through PATH; its ops are kept with the environment that built them,
    # because another version of ninja or torch would build them again.
    export PATH="$DS_OPTIM_VENV/bin:$PATH"
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$DS_OPTIM_VENV/torch_extensions}"
}

build_ops() {
    local accelerator="$1"
    shift
    say "building DeepSpeed's C++ ops where they are not built yet: $*"
    DS_ACCELERATOR="$accelerator" python - "$@" >"$DS_OPTIM_VENV/build_ops.log" 2>&1 <<'PY' ||
import sys
from ds_optim.machine.extensions import load_op

for name in sys.argv[1:]:
    load_op(name)
PY
        say "some did not build (see $DS_OPTIM_VENV/build_ops.log): what needs them will say so"
}
