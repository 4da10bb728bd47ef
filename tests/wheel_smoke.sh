#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel beside this Python's packages, and trains from it: without a
# compiler, with a home that cannot be written to, and from another folder than the checkout.
#
#   bash tests/wheel_smoke.sh [PYTHON]     # one that has torch, DeepSpeed and setuptools; default: python3
#
# Nothing is downloaded, and nothing stays.
set -euo pipefail

python="$(command -v "${1:-python3}")"
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
say() { printf '== %s\n' "$*"; }

say "sdist, and the wheel of it"
mkdir "$work/source" "$work/dist" "$work/wheel" "$work/bin" "$work/run"
cp -r "$root"/{ds_optim,pyproject.toml,README.md,LICENSE} "$work/source"
find "$work/source" -name __pycache__ -prune -exec rm -rf {} +
(cd "$work/source" && "$python" -c "import sys; from setuptools import build_meta
build_meta.build_sdist(sys.argv[1])" "$work/dist" >"$work/log" 2>&1) || { cat "$work/log"; exit 1; }
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$work"/dist/*.tar.gz

say "all files of the package are in it"
"$python" - "$root" "$work"/wheel/*.whl <<'PY'
import sys, zipfile
from pathlib import Path

root, names = Path(sys.argv[1]), set(zipfile.ZipFile(sys.argv[2]).namelist())
files = {p.relative_to(root).as_posix() for p in (root / "ds_optim").rglob("*") if p.is_file() and p.suffix != ".pyc"}
left_out = sorted(files - names)
assert not left_out, f"not in the wheel: {left_out}"
print(f"{len(files)} files, {Path(sys.argv[2]).stat().st_size / 1024:.0f} KiB")
PY

say "installed, without a compiler and with a home that cannot be written to"
"$python" -m pip install --quiet --no-deps --no-index --target "$work/site" "$work"/wheel/*.whl
for tool in bash env uname; do ln -s "$(command -v "$tool")" "$work/bin/$tool"; done
# alone PATH COMMAND...
alone() {
    (cd "$work/run" && env -i PATH="$1" HOME=/proc PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1 \
        DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "$python" "${@:2}")
}
alone "$work/bin" - >"$work/log" 2>&1 <<'PY' || { cat "$work/log"; exit 1; }
import torch, ds_optim
from ds_optim.machine import rendezvous

assert "site" in ds_optim.__file__, ds_optim.__file__
rendezvous.prepare()  # what ds_optim.initialize begins with; DeepSpeed itself builds an op on a CPU
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
config = {"train_batch_size": 4, "optimizer": {"type": "LionMuon", "params": {"lr": 0.01}}}
optimizer, rest = ds_optim.from_config(model, config)
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
losses = []
for step in range(3):
    loss = (model(x) - x).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
print("trained", losses)
PY
tail -1 "$work/log"
alone "$work/bin" -m ds_optim version
alone "$work/bin" -m ds_optim estimate --params 1e9 >/dev/null
say "fine"
