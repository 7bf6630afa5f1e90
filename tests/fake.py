"""A registry that serves what a test put into an OCI image layout, lies and all, from a thread.

    with fake.serving(directory) as fake:
        fake.put("image", fake.layout.image([tar]))
        ... mocker pull 127.0.0.1:PORT/image ...
        fake.requests == [("GET", "/v2/image/manifests/latest", 200), ...]

`intercept`, `requests` and the handler's `answer` are as in registry.Hub.
"""

import contextlib
import json
import re

import images
import registry


class Fake:
    def __init__(self, directory):
        self.layout = images.Layout(directory)
        self.names = {}  # "image:latest" → descriptor
        self.seen, self.intercept = [], None

    @property
    def requests(self):
        return list(self.seen)

    def put(self, name, descriptor):
        """Let name[:tag] stand for a manifest; → the reference to pull it by."""
        self.names[name if ":" in name else f"{name}:latest"] = descriptor
        return f"{self.host}/{name}"

    def path(self, digest):
        """The file of a blob; a test may write another content to it."""
        return self.layout.path / "blobs" / digest.replace(":", "/")


class Handler(registry.Handler):
    service = "front"

    def reply(self):
        path = self.path.partition("?")[0]
        name, kind, version = re.fullmatch(r"/v2/(.*)/(manifests|blobs)/(.*)", path).groups()
        found = self.hub.names.get(f"{name}:{version}", {"digest": version})
        file = self.hub.path(found["digest"])
        if not file.is_file():
            return self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
        data = file.read_bytes()
        return self.answer(200, data, {"Content-Type": found.get("mediaType") or media_type(kind, data)})


def media_type(kind, data):
    with contextlib.suppress(ValueError, AttributeError):
        return kind == "manifests" and json.loads(data).get("mediaType") or "application/octet-stream"
    return "application/octet-stream"


@contextlib.contextmanager
def serving(directory):
    fake = Fake(directory)
    with registry.serving(Handler, "127.0.0.1", fake) as fake.host:
        fake.url = f"http://{fake.host}"
        yield fake
