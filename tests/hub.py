"""A server that speaks as much of the Hub's protocol as pushing and loading a model needs, for its real client.

Run as a script with a folder, it trains against the server at HF_ENDPOINT: see [`push`].
"""

import base64
import hashlib
import json
import logging
import os
import re
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = hashlib.sha1(b"commit").hexdigest()
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


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
        repositories, path = self.server.repositories, self.path.partition("?")[0]
        if match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path):
            content = repositories.get(match[1], {}).get(match[2])
            if content is None:
                missing = "EntryNotFound" if match[1] in repositories else "RepoNotFound"
                return self._reply(status=404, X_Error_Code=missing)
            return self._reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        if path.startswith("/api/whoami"):
            return self._reply({"name": "me", "type": "user"})
        match = re.match(r"/api/models/(\w+/\w+)(?:/(tree|revision)/\w+)?(?=(/.*)?$)", path)
        if match is None or match[1] not in repositories:
            return self._reply(status=404, X_Error_Code="RepoNotFound")
        if match[3] and match[2] == "tree":  # of a folder in the repository
            return self._reply(status=404, X_Error_Code="EntryNotFound")
        files = repositories[match[1]]
        if match[2] == "tree":
            found = [{"type": "file", "path": p, "size": len(files[p]), "oid": COMMIT} for p in files]
            return self._reply(found)
        return self._reply({"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    do_HEAD = do_GET

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.headers.get("Authorization") != "Bearer hf_token":
            return self._reply({"error": "Invalid username or password."}, status=401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repository in server.unreachable:
                self.close_connection = True
                return None
            if not repository.startswith("me/"):
                return self._reply({"error": "You have no rights to this namespace."}, status=403)
            server.repositories.setdefault(repository, {})
            return self._reply({"url": f"{server.url}/{repository}", "id": repository})
        if self.path == "/api/validate-yaml":
            server.validated.append(json.loads(body)["content"])
            return self._reply({"errors": [], "warnings": []})
        repository = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if "/commit/" in self.path:
            if failures := server.failures.get(repository):
                status = failures.pop(0)
                self.close_connection = status is None
                return None if status is None else self._reply({"error": "The quota is used up."}, status)
            lines = [json.loads(line) for line in body.splitlines()]
            new = [line["value"] for line in lines if line["key"] == "file"]
            added = {file["path"]: base64.b64decode(file["content"]) for file in new}
            server.repositories[repository] |= added
            server.commits.setdefault(repository, []).append(sorted(added))
            address = f"{server.url}/{repository}/commit/{COMMIT}"
            return self._reply({"success": True, "commitOid": COMMIT, "commitUrl": address})
        return self._reply(status=404)


@contextmanager
def serving():
    """A running server for the user `me`, whose token is `hf_token`.

    It has a `url`, the files of its `repositories` by their path, the paths of each of their `commits`, cards that it
    was asked to validate, and `failures`: for each of the next commits of a repository, the status that it fails with;
    None: the connection ends in its middle. Repositories that are `unreachable` cannot be created for the same reason.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repositories, server.commits, server.validated, server.failures = {}, {}, [], {}
    server.unreachable = set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def push(folder):
    """Distil a student for each strategy and push it; push to a server that fails; try tokens and names that are wrong.

    Prints what happened as an object of JSON.
    """
    import huggingface_hub.constants  # noqa: F401  reads the environment before conftest turns the network off
    from conftest import masked_lm_examples, tiny_bert, weights
    from huggingface_hub import snapshot_download
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

    from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank

    teacher = f"{folder}/secret-place/big-teacher"
    tiny_bert(4, width=24, seed=2).save_pretrained(teacher)
    vocabulary = {name: number for number, name in enumerate(["[PAD]", "[MASK]", "[UNK]", "a", "b", "c"])}
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    data, happened = masked_lm_examples(16), {}

    def make(name, **fields):
        fields = {"max_steps": 4, "save_steps": 2, "push_to_hub": True, "hub_always_push": True} | fields
        fields |= {"use_cpu": True, "disable_tqdm": True, "report_to": "tensorboard"}
        args = CurriculumDistillationConfig(f"{folder}/{name}", per_device_train_batch_size=4, **fields)
        return CurriculumDistillationTrainer(
            tiny_bert(2), args, None, data, data, processing_class=tokenizer, teacher_model=teacher
        )

    for strategy in STRATEGIES:
        trainer = make(strategy, hub_strategy=strategy)
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub(license="mit")
        loaded, student = weights(AutoModelForMaskedLM.from_pretrained(f"me/{strategy}")), weights(trainer.model)
        bank = ProjectionBank.from_pretrained(f"me/{strategy}").fingerprint
        happened[strategy] = bank == trainer.projection_bank.fingerprint and all(
            tensor.equal(loaded[name]) for name, tensor in student.items()
        )

    checkpoints = snapshot_download("me/all_checkpoints")
    os.rename(f"{checkpoints}/checkpoint-2", f"{checkpoints}/last-checkpoint")  # as the strategy "checkpoint" names it
    resumed = make("resumed", push_to_hub=False)
    resumed.train(resume_from_checkpoint=f"{checkpoints}/last-checkpoint")
    happened["resumed"] = all(tensor.equal(loaded[name]) for name, tensor in weights(resumed.model).items())

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    flaky = make("flaky", hub_strategy="checkpoint")
    happened["flaky"] = flaky.train().global_step
    happened["messages"] = [message for message in messages if "push" in message]
    flaky.push_to_hub()
    for name, fields in {
        "no token": {"hub_token": False},
        "wrong token": {"hub_token": "hf_other"},
        "wrong name": {"hub_model_id": "me/my/student"},
        "someone else's": {"hub_model_id": "you/student"},
        "no network": {"hub_model_id": "me/unreachable"},
    }.items():
        try:
            make("wrong", **fields)
        except (ValueError, OSError) as error:
            happened[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(happened))


if __name__ == "__main__":
    push(*sys.argv[1:])
