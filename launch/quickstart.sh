#!/usr/bin/env bash
# Sets up .venv and compares four optimizers under three ZeRO stages on two local ranks.
#
#   bash launch/quickstart.sh [options of ds-optim compare that replace the ones below]
#
# Two GPUs or more: NCCL. Otherwise: two CPU ranks over gloo. Ends with the table, the report's path, and what the
# same optimizers would hold of a model of 8B parameters.
set -euo pipefail

# shellcheck source=launch/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then show_help "$0" && exit 0; fi
setup_env all
cd -- "$DS_OPTIM_ROOT"
ranks=2
if (($(gpu_count) >= ranks)); then
    export DS_ACCELERATOR=cuda
else
    export DS_ACCELERATOR=cpu
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
    build_ops cpu ShareMemCommBuilder FusedAdamBuilder
fi
# Results of before stay where they are.
out="runs/quickstart"
for ((number = 2; ; number++)); do
    [[ -e $out ]] || break
    out="runs/quickstart-$number"
done
ds-optim compare --optimizers adamw,lion,muon,lion_muon --stages 1,2,3 --ranks "$ranks" \
    --steps 40 --out "$out" "$@"
say "a model this small is mostly activations; of Llama 8B, estimated, a rank of 8 would hold, in GiB:"
exec ds-optim estimate --model docs/models/llama-8b.json --optimizers adamw,lion,muon,lion_muon --stages 3 --ranks 8
