#!/bin/sh
# Parity of every operation and of a small model on this machine's accelerator, then timings.
# Needs Python 3.11 or newer with jax, flax, numpy, tokenizers, safetensors, jinja2, psutil and
# jaxtyping; no network, and none of the service's packages.
#
#   benchmarks/gpu.sh [RESULTS.json]          PYTHON=python3.12 benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
output="${1:-benchmarks/results/gpu.json}"
export JAX_DEFAULT_MATMUL_PRECISION="${JAX_DEFAULT_MATMUL_PRECISION:-highest}" # parity in float32
PYTHONPATH=".:tests" exec "${PYTHON:-python3}" benchmarks/gpu.py "$output"
