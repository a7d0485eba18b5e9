#!/usr/bin/env bash
# From a fresh clone to an aligned, evaluated and exported LLaVA-NeXT on two CPU cores: bash scripts/quickstart.sh
# Makes .venv, the tiny model and the demo world, then trains, evaluates, merges and asks. Shows its progress, live on a
# terminal and every 20 s in a log. It may be stopped and run again: finished steps are reused (remove outputs/ to start
# over).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

# Small kernels: threads that spin while they wait cost more than they give.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export LLAMAFACTORY_VERBOSITY=${LLAMAFACTORY_VERBOSITY:-WARN}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # nothing here comes from a hub
exec python scripts/quickstart.py "$@"
