"""An OCI image layout → a mocker store that `mocker serve` can serve: python layout_store.py LAYOUT STORE

Pulling does the work: this is a registry of a few lines, which serves the layout's blobs as they are.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

layout, store = Path(sys.argv[1]), sys.argv[2]


class Registry(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        top = json.loads((layout / "index.json").read_text())["manifests"][0]
        digest = name if ":" in name else top["digest"]
        body = (layout / "blobs" / digest.replace(":", "/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", top["mediaType"] if ":" not in name else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mocker = Path(__file__).resolve().parent.parent / "mocker.py"
    environment = {**os.environ, "MOCKER_HOME": store, "MOCKER_HUB": f"http://127.0.0.1:{server.server_port}"}
    done = subprocess.run([sys.executable, str(mocker), "pull", "-q", "hello-world"], env=environment)
    server.shutdown()
sys.exit(done.returncode)
