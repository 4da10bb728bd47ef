#!/usr/bin/env bash
# Sets up .venv and runs the checks, then the tests.
#
#   bash tests/run.sh [--full] [--gpus N] [options of pytest]
#
# Without --full a few minutes of tests, with it all of them (tests/README.md). --gpus N runs
# the ranks on N GPUs over NCCL. On two cores or more two files run at a time, those with ranks
# first (-n 0: one after the other). Fails if any check or test fails.
set -euo pipefail

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch/setup_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then show_help "$0" && exit 0; fi
setup_env dev
cd -- "$DS_OPTIM_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

failed=()
check() {
    say "$*"
    "$@" || failed+=("$1")
}
check ruff check .
check ruff format --check .
check mypy
if command -v shellcheck >/dev/null; then
    check shellcheck --external-sources launch/*.sh launch/slurm.sbatch tests/*.sh .ci/run
fi
((${#failed[@]} == 0)) || fail "not clean: ${failed[*]} (the tests were not run)"

# The page of estimate is looked at in a browser, where there is one or apt-get has it.
if [[ " $* " == *" --full "* && $(id -u) == 0 ]] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    say "installing chromium"
    { timeout 300 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y -qq chromium; } >&2 ||
        say "it cannot be installed: tests that need it are skipped"
fi

gpus=0
for ((i = 1; i <= $#; i++)); do
    case "${!i}" in
        --gpus=*) gpus="${!i#--gpus=}" ;;
        --gpus) ((i < $#)) && { next=$((i + 1)) && gpus="${!next}"; } ;;
    esac
done
beside=()
if [[ $gpus == 0 ]]; then
    # (async_io, for state in files, needs libaio-dev: its tests are skipped without)
    build_ops cpu ShareMemCommBuilder FusedAdamBuilder CPUAdamBuilder AsyncIOBuilder
    # (without --all it answers OMP_NUM_THREADS)
    (($(nproc --all) > 1)) && beside=(-n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0)
fi

say "pytest ${beside[*]} $*"
exec python -m pytest "${beside[@]}" "$@"
