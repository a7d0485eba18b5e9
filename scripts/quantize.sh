#!/usr/bin/env bash
# scripts/quantize.py in its own environment, .venv-quantize (5 GB, made on the first call):
#   bash scripts/quantize.sh --model outputs/tiny/merged --method gptq --data demo_train --out outputs/tiny/gptq
VENV=${QUANTIZE_VENV:-.venv-quantize}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements/quantize.txt

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# The package is not installed there, because it needs llamafactory, which is not.
export PYTHONPATH="$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
exec python scripts/quantize.py "$@"
