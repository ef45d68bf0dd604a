#!/bin/sh
# Everything that wants a GPU, in under eight minutes on one card: tests, the card's limits, a UNet's forward pass,
# ReFL updates beside the published loop, scorers in half precision, scoring rates. Prints as it goes; each part has a
# limit of its own, so that a run that is cut keeps what it has.
#
#     sh benchmarks/gpu.sh                                  # results: gpu-results/table.md and *.json
#     sh benchmarks/gpu.sh --dry                            # on a CPU: the same code on the embedded models
#     WHEELS=gpu-wheels sh benchmarks/gpu.sh                # packages from benchmarks/gpu_wheels.sh, without a network
#
# Further flags are those of benchmarks/gpu.py. Needs 8 GB of disk and a card of 24 GB, better 80 GB.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    site=${SITE:-${TMPDIR:-/tmp}/preftune-site}
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" benchmarks/gpu.py "$@"
