#!/usr/bin/env bash
# The oldest and the newest Python, torch and DeepSpeed that the package names, each in an environment of its own:
# installs the core there, lists it and times its import; then with [all], runs the tests of what depends on them.
#
#   bash tests/versions.sh                        # all below
#   bash tests/versions.sh PYTHON TORCH [DEEPSPEED] [PACKAGE...]
#
#   bash tests/versions.sh python3.10 2.9.1 0.19.8
#   bash tests/versions.sh python3.12 2.13.0 0.19.8 'transformers<5'
#
# An environment takes up to 7 GB, since torch from PyPI is the CUDA build; the environment is removed unless
# KEEP=1, and stands in VERSIONS_DIR (default: a temporary folder). Docs: docs/support.md#verified-on.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# Oldest and newest of each, met by as few environments as can be.
PAIRS=("python3.10 2.9.0 0.19.8" "python3.11 2.13.0 0.19.8 transformers<5" "python3.13 2.14.1 0.19.8")
# Where the package touches torch and DeepSpeed: private names, files of checkpoints, layouts, compiled code.
TESTS=(tests/unit/test_{optimizers,defaults_of_torch,plain_tensors,native,fused,momentum,polar,routing,groups}.py
    tests/unit/test_{config,config_reading,convert_config,checkpoint_loadable,bf16_masters,unstepped,locks}.py
    tests/distributed/test_{first_step,same_gradients,checkpoint,schedulers,ways_in,convert_config}.py
    tests/end_to_end/test_core_alone.py)

say() { printf '== %s\n' "$*"; }

try() {
    local python="$1" torch="$2" deepspeed="$3" home venv status=0
    shift 3
    command -v "$python" >/dev/null || { say "$python is not here: torch $torch was not run"; return 1; }
    home="${VERSIONS_DIR:-$(mktemp -d)}"
    venv="$home/$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-torch$torch"
    say "$("$python" --version), torch $torch, DeepSpeed $deepspeed${*:+, $*}: $venv"
    [[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet "torch==$torch" setuptools
    "$venv/bin/pip" install --quiet "deepspeed==$deepspeed" "$root"
    "$venv/bin/pip" list --format freeze | tr '\n' ' '
    printf '\n%s MiB\n' "$(du -sm "$venv/lib" | cut -f1)"
    (
        cd "$root"
        export PATH="$venv/bin:$PATH" PYTHONPATH="$root" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
        export TORCH_EXTENSIONS_DIR="$venv/torch_extensions"
        python -c 'import time, torch; began = time.process_time(); import ds_optim; ds_optim.initialize, ds_optim.Lion
print(f"import ds_optim: {time.process_time() - began:.2f} s beyond torch")'
        pip install --quiet "${root}[all]" pytest hypothesis
        (($# == 0)) || pip install --quiet "$@"
        pip uninstall --quiet --yes ds-optim # the checkout's is tested
        python -m pytest -q -p no:cacheprovider "${TESTS[@]}"
    ) || status=$?
    [[ -n ${KEEP:-} ]] || rm -rf -- "$venv"
    return "$status"
}

if (($# >= 2)); then
    try "$1" "$2" "${3:-0.19.8}" "${@:4}"
else
    failed=0
    for pair in "${PAIRS[@]}"; do
        read -ra words <<<"$pair"
        try "${words[@]}" || failed=1
    done
    exit "$failed"
fi
