#!/bin/sh
# Download what a machine with torch, transformers, accelerate and peft lacks for benchmarks/gpu.sh: wheels that are
# pure Python, under 60 MiB, for a machine without a network.
#
#     sh benchmarks/gpu_wheels.sh [FOLDER]      # default: gpu-wheels
set -eu
cd "$(dirname "$0")/.."
folder=${1:-gpu-wheels}
mkdir -p "$folder"
names='diffusers|tyro|docstring_parser|typeguard|typing_extensions|ftfy|wcwidth|importlib_metadata|zipp|filelock|jinja2|MarkupSafe'
names="$(grep -iE "^($names)==" constraints.txt | grep -viE '^markupsafe')"
# shellcheck disable=SC2086
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest "$folder" $names
du -sh "$folder"
