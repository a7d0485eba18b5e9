#!/usr/bin/env bash
# Measures the step on this machine's NVIDIA card: bash scripts/gpu.sh [--dry-run] [--core] [--stages 1,2], -h for all
# In the pinned environment (.venv, several GB, made on the first call). With --core or LLAVA_ORPO_GPU_CORE=1 in the
# python at hand, in which torch, transformers and peft are enough for stages 1 to 3; nothing is installed then.
set -euo pipefail
[ "${LLAVA_ORPO_GPU_CORE:-}" != 1 ] || set -- --core "$@"
case " $* " in
    *" --core "*)
        cd "$(dirname "${BASH_SOURCE[0]}")/.."
        PYTHON=${PYTHON:-python3}
        "$PYTHON" -c 'import torch, transformers, peft' || {
            echo "--core needs torch, transformers and peft in $PYTHON; PYTHON=/path/to/python names another one." >&2
            exit 1
        }
        # the package is not installed there, because it needs llamafactory, which is not
        export PYTHONPATH="$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
        ;;
    *)
        source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
        PYTHON=python
        ;;
esac
exec "$PYTHON" scripts/gpu.py "$@"
