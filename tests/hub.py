"""A server that speaks as much of the Hub's protocol as pushing and loading a model needs, for its real client.

Run as a script, it distils a student, pushes it to the server at HF_ENDPOINT, and loads it from there.
"""

import base64
import hashlib
import json
import re
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = hashlib.sha1(b"commit").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _reply(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        files = self.server.files
        if match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", self.path):
            content = files.get(match[2])
            if content is None:
                return self._reply(status=404, X_Error_Code="EntryNotFound")
            return self._reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        if self.path.startswith("/api/whoami"):
            return self._reply({"name": "me", "type": "user"})
        if re.fullmatch(r"/api/models/\w+/\w+/tree/\w+(\?.*)?", self.path):
            sizes = {path: len(content) for path, content in files.items()}
            return self._reply([{"type": "file", "path": p, "size": n, "oid": COMMIT} for p, n in sizes.items()])
        if "/tree/" in self.path:
            return self._reply(status=404, X_Error_Code="EntryNotFound")
        if self.path.startswith("/api/models/"):
            return self._reply({"id": "me/student", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        return self._reply(status=404)

    do_HEAD = do_GET

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        url = f"http://{self.headers['Host']}/me/student"
        if self.headers.get("Authorization") != "Bearer hf_token":
            return self._reply({"error": "no token"}, status=401)
        if self.path == "/api/repos/create":
            return self._reply({"url": url, "id": "me/student"})
        if self.path == "/api/validate-yaml":
            server.validated.append(json.loads(body)["content"])
            return self._reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            new = [line["value"] for line in lines if line["key"] == "file"]
            added = {file["path"]: base64.b64decode(file["content"]) for file in new}
            server.files |= added
            server.commits.append(sorted(added))
            return self._reply({"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/commit/{COMMIT}"})
        return self._reply(status=404)


@contextmanager
def serving():
    """A running server: `files` by their path, the paths of each of its `commits`, cards to validate, and its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files, server.commits, server.validated = {}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def push(folder, strategy):
    import huggingface_hub.constants  # noqa: F401  reads the environment before conftest turns the network off
    from conftest import masked_lm_examples, tiny_bert
    from transformers import AutoModelForMaskedLM

    from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank

    teacher = f"{folder}/secret-place/big-teacher"
    tiny_bert(4, width=24, seed=2).save_pretrained(teacher)
    args = CurriculumDistillationConfig(
        f"{folder}/student",
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        report_to="tensorboard",
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    student, data = tiny_bert(2), masked_lm_examples(16)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, eval_dataset=data, teacher_model=teacher)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="mit")
    loaded = AutoModelForMaskedLM.from_pretrained("me/student").state_dict()
    assert all(tensor.equal(loaded[name]) for name, tensor in student.state_dict().items())
    assert ProjectionBank.from_pretrained("me/student").fingerprint == trainer.projection_bank.fingerprint


if __name__ == "__main__":
    push(*sys.argv[1:])
