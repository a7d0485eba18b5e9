#!/usr/bin/env bash
# scripts/serve.py in its own environment, .venv-serve (several GB, made on the first call):
#   bash scripts/serve.sh outputs/llava16_orpo_merged
#   bash scripts/serve.sh outputs/tiny/model adapter=outputs/tiny/orpo_qlora port=8000
# vLLM's CUDA wheel where an NVIDIA GPU is found, else its CPU wheel; SERVE_DEVICE=cuda or cpu chooses.
VENV=${SERVE_VENV:-.venv-serve}
if [ -z "${SERVE_DEVICE:-}" ]; then
    SERVE_DEVICE=cpu
    # Not `nvidia-smi | grep`: the driver's tool also succeeds where it lists nothing.
    case $(nvidia-smi -L 2>/dev/null || true) in *GPU*) SERVE_DEVICE=cuda ;; esac
fi
root=$(dirname "${BASH_SOURCE[0]}")/..
case $SERVE_DEVICE in
    cuda) requirements=requirements/serve.txt ;;
    cpu) requirements=requirements/serve-cpu.txt && export UV_OVERRIDE=requirements/serve-cpu.override ;;
    *) echo "error: SERVE_DEVICE=$SERVE_DEVICE: it must be cuda or cpu." >&2 && exit 2 ;;
esac
source "$root/scripts/setup.sh" "$requirements"

# The package is not installed there, because it needs llamafactory, which is not.
export PYTHONPATH="$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
exec python scripts/serve.py "$@"
