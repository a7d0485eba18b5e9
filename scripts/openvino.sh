#!/usr/bin/env bash
# scripts/run_openvino.py in its own environment, .venv-openvino (made on the first call):
#   bash scripts/openvino.sh outputs/tiny/merged outputs/tiny/openvino [16bit|8bit|4bit]
#   bash scripts/openvino.sh ask outputs/tiny/openvino image=photo.jpg question="What is in the picture?"
VENV=${OPENVINO_VENV:-.venv-openvino}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements/openvino.txt

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}
# The package is not installed there, because it needs llamafactory, which is not.
export PYTHONPATH="$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
exec python scripts/run_openvino.py "$@"
