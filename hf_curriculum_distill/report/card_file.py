"""`README.md`: the model card in a student's folder, merged with what a user has written there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.report.card import CardFacts, make_metadata, make_text
from hf_curriculum_distill.report.figures import PLOT_FILE

logger = get_logger(__name__)

# Our part of a card. The first line holds the metadata that we wrote, to tell them from what a user has changed since.
_SECTION = re.compile(r"<!-- distillation: begin (\{[^\n]*\}) -->\n.*?\n<!-- distillation: end -->", re.DOTALL)
_NOTE = "<!-- This section is written anew whenever the model is saved; text outside of it is kept. -->"


def write_card(folder: str, facts: CardFacts, given: Mapping[str, Any] | None = None) -> None:
    """Write `README.md` into a folder, completely or not at all, and keep what a user has written there.

    A card of ours has a section between two comments, which is renewed; so are the metadata that no one has changed
    since. A card without that section is the user's own: it only gets the metadata that it lacks. One that cannot be
    read stays as it is, with a warning.

    Args:
        folder: of the student.
        facts: see [`CardFacts`].
        given: metadata that replace what is there; lists are added to it.
    """
    path = os.path.join(folder, REPOCARD_NAME)
    new = make_metadata(facts)
    has_plot = os.path.isfile(os.path.join(folder, PLOT_FILE))
    begin = json.dumps(new).replace(">", "\\u003e")
    section = f"<!-- distillation: begin {begin} -->\n{_NOTE}\n\n{make_text(facts, has_plot)}\n\n"
    section += "<!-- distillation: end -->"
    before = None
    if os.path.lexists(path):
        try:
            with open(path, encoding="utf-8", newline="") as file:
                before = file.read()
            card = ModelCard(before)
            found = _SECTION.search(card.text)
            metadata = _merge(card.data.to_dict(), new, json.loads(found[1]) if found else None)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
            logger.warning("The model card %s stays as it is, for it cannot be read: %s", path, error)
            return
        text = card.text if found is None else card.text[: found.start()] + section + card.text[found.end() :]
    else:
        metadata, text = new, f"\n# {facts.name.split('/')[-1]}\n\n{section}\n"
    for name, value in (given or {}).items():
        metadata[name] = _union(metadata.get(name), value) if isinstance(value, list) else value
    card = ModelCard("---\n{}\n---\n")
    card.data, card.text = type(card.data)(**metadata), text
    if str(card) != before:
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(str(card))


def _merge(old: Mapping[str, Any], new: Mapping[str, Any], written: Mapping[str, Any] | None) -> dict[str, Any]:
    """A card's metadata, renewed.

    Args:
        old: those that are there.
        new: ours.
        written: ours when the card was written; None if it is not ours.
    """
    if written is None:
        return {**new, **old}
    merged = dict(old)
    for name in {**written, **new}:
        if name == "model-index":
            results = _eval_results_of(new)
            ours = [*results, *_eval_results_of(written)]
            theirs = [r for r in _eval_results_of(old) if not any(map(r.is_equal_except_value, ours))]
            index = new.get(name) or old.get(name)
            value = eval_results_to_model_index(index[0]["name"], [*results, *theirs]) if results or theirs else None
        elif isinstance(written.get(name, new.get(name)), list):
            theirs = [item for item in _as_list(old.get(name)) if item not in _as_list(written.get(name))]
            value = _union(new.get(name), theirs)
        elif old.get(name) == written.get(name):
            value = new.get(name)
        else:
            continue  # changed by the user
        merged[name] = value
    return {name: value for name, value in merged.items() if value is not None and value != []}


def _eval_results_of(metadata: Mapping[str, Any]) -> list[EvalResult]:
    return model_index_to_eval_results(metadata["model-index"])[1] if metadata.get("model-index") else []


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _union(first: Any, second: Any) -> list[Any]:
    return list(dict.fromkeys([*_as_list(first), *_as_list(second)]))
