#!/usr/bin/env bash
# nudenet 3.4.2 (with onnxruntime): NudeDetector
#
# The argument `providers` is accepted and not used: a provider that does not exist raises nothing, and the session runs on the
# one that onnxruntime takes by default. Somebody who asks for a GPU with it measures a CPU. The session itself can be told
# afterwards: detector.onnx_session.set_providers([...]), which does refuse a name that does not exist.
#
# Seen:
#   NudeDetector(providers=["NoSuchExecutionProvider"]): no error, session on CPUExecutionProvider
#   set_providers(["NoSuchExecutionProvider"]): refused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nudenet==3.4.2 onnxruntime==1.31.1 opencv-python-headless 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import sys

from nudenet import NudeDetector

nowhere = "NoSuchExecutionProvider"
session = NudeDetector(providers=[nowhere]).onnx_session
taken = session.get_providers()
print(f'NudeDetector(providers=["{nowhere}"]): no error, session on {", ".join(taken)}')
try:
    session.set_providers([nowhere])
    refused = False
except (ValueError, RuntimeError):
    refused = True
print(f'set_providers(["{nowhere}"]): {"refused" if refused else "accepted"}')
sys.exit(nowhere in taken or not refused)
PYTHON
