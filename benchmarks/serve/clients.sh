#!/bin/sh
# Real clients, in an environment of their own, against a server that this script starts: tritonclient over HTTP (JSON and
# binary) and gRPC, the openai client, kserve's client, and schemathesis on the OpenAPI description.
#
#   sh benchmarks/serve/clients.sh MODEL [FOLDER]     MODEL is an embedding model with its tokenizer; FOLDER is the
#                                                     environment, build/clients by default; PYTHON its interpreter
set -eu
cd "$(dirname "$0")/../.."
model="$1" folder="${2:-build/clients}" python="${PYTHON:-python3}" port=18080 rpc=18081

if [ ! -x "$folder/bin/python" ]; then
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        "tritonclient[http,grpc]==2.73.0" "openai==3.57.0" "kserve==0.21.0" "schemathesis==4.32.5"
fi

.venv/bin/espalier serve "model=$model" --no-tune --http $port --grpc $rpc &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
"$folder/bin/python" benchmarks/serve/clients.py --http $port --grpc $rpc
"$folder/bin/schemathesis" run "http://127.0.0.1:$port/openapi.json" --url "http://127.0.0.1:$port" \
    --max-examples "${EXAMPLES:-30}" --seed 1 --workers 1 \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
"$folder/bin/python" benchmarks/serve/clients.py --http $port --grpc $rpc
