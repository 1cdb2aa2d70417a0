#!/bin/sh
# Creates a virtual environment with the peers that the comparisons measure. Evaluation only: nothing of them is used by
# Espalier. DeepSparse 1.8.0 is discontinued and closed (its licence allows evaluation); it needs Python 3.11 or older,
# onnx below 1.15 and so numpy 1.
#
#   sh benchmarks/peers.sh [FOLDER]        FOLDER defaults to .peers; PYTHON names the interpreter (python3.11)
set -eu

folder="${1:-$(dirname "$0")/../.peers}"
python="${PYTHON:-python3.11}"

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; then
    echo "peers.sh: '$python' is missing or not Python 3.10 or 3.11 (DeepSparse 1.8.0 needs <= 3.11); set PYTHON" >&2
    exit 1
fi

"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    "deepsparse==1.8.0" \
    "sparsezoo==1.8.1" \
    "numpy==1.26.4" \
    "onnx==1.14.1" \
    "protobuf==7.36.2" \
    "pydantic==2.14.3" \
    "onnxruntime==1.32.0" \
    "mlcommons-loadgen>=6.0.17" \
    "openvino==2026.4.1"

NM_DISABLE_ANALYTICS=1 "$folder/bin/python" - <<'END'
import deepsparse, onnx, onnxruntime, openvino
print("deepsparse", deepsparse.__version__, "| onnx", onnx.__version__, "| onnxruntime", onnxruntime.__version__,
      "| openvino", openvino.__version__.split("-")[0])
END
echo "peers ready: $folder/bin/python"
