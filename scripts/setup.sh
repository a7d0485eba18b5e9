# Sourced by quickstart.sh, test.sh, quantize.sh and benchmarks.sh: makes or reuses .venv with the pinned packages
# ($1: the requirements file). Needs only Python 3.11+ and git on the machine. Reuses the environment while the pins stay
# the same.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/progress.sh
source scripts/torch_backend.sh
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
requirements=$1

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; found $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 1
}
# vLLM chooses its wheels itself (serve.sh)
case $requirements in requirements/serve*) ;; *) choose_torch_backend || exit 1 ;; esac
cuda=(-c requirements/cuda13.lock)
case $requirements:${UV_TORCH_BACKEND:-} in requirements/serve*) cuda=() ;; *:?*) cuda=() ;; esac
pins=$(cat requirements.txt requirements/* pyproject.toml)
stamp="$VENV/.installed-$(sha256sum <<<"$pins" | cut -c1-16)-$(basename "$requirements")${UV_TORCH_BACKEND:+-$UV_TORCH_BACKEND}"
if [ ! -e "$stamp" ]; then
    [ -x "$VENV/bin/python" ] || { echo "Making $VENV ..." && "$PYTHON" -m venv "$VENV"; }
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
    uv_install "Installing into $VENV (several GB on a first run)" "$VENV/bin/uv" "$VENV/bin/python" \
        -r "$requirements" "${cuda[@]}"
    touch "$stamp"
fi
export PATH="$PWD/$VENV/bin:$PATH"
export HF_HUB_DISABLE_TELEMETRY=1
