"""What finished runs left: `results.json`, and each run's `trainer_state.json` and `curriculum.json`.

Runs that are compared may come from anywhere, so files are read as if somebody had damaged them on purpose.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from hf_curriculum_distill.files import write_files
from hf_curriculum_distill.lines import printable
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.resuming.record import FILE_NAME as RECORD_FILE

logger = get_logger(__name__)

RESULTS_FILE = "results.json"

# Fields of a record that were worked out from its arguments, the models and the data.
_RESOLVED = ("max_steps", "samples_per_step", "stages", "settings", "projection_matrices", "cached_logits")
_NUM_EXAMPLES = "data.num_examples"
_NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "transformers_version")  # of a student's config.json


def write_results(folder: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json`, a list with one object per trained model, whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    write_files({os.path.join(folder, RESULTS_FILE): f"{json.dumps(list(results), indent=2)}\n".encode()})


def update_results(folder: str, results: Sequence[Mapping[str, Any]], runs: Iterable[str]) -> None:
    """Write the results of a launch into `results.json`, after those of earlier launches.

    Args:
        folder: the output folder of a recipe.
        results: of the runs of this launch that have ended.
        runs: the folders of all runs of this launch, whose earlier results are left out.
    """
    write_results(folder, [*earlier_results(folder, runs), *results])


def earlier_results(folder: str, runs: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a folder's `results.json`, if there is one, but for runs that are trained again or are gone.

    Args:
        folder, runs: see [`update_results`].

    Raises:
        ValueError: the file is damaged.
    """
    if not Path(folder, RESULTS_FILE).is_file():
        return []
    again, earlier = {os.path.realpath(run) for run in runs}, []
    for result in _read_objects(Path(folder)):
        places = _find_places(result["path"], Path(folder))
        is_there = not result["finite"] or any(_find_files(place, TRAINER_STATE_NAME) for place in places)
        if is_there and not again & {os.path.realpath(place) for place in places}:
            earlier.append(result)
    return earlier


def read_results(folders: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of the folders' `results.json`, each run once.

    A run's files are those of its folder or, where `save_state()` was not called, of its last checkpoint. Runs of one
    method that differ in more than the seed get names of their own, see [`_tell_apart`], so that runs of the same
    `method` are repetitions.

    Args:
        folders: each the output of a recipe, the folder of a single run, of `Trainer`'s too, or a checkpoint of one.

    Raises:
        FileNotFoundError: a folder is missing or is neither of them, or a result's run is not found.
        ValueError: a file is damaged.
    """
    results: dict[str, dict[str, Any]] = {}
    sources: list[str] = []
    for folder in map(Path, folders):
        if (folder / RESULTS_FILE).is_file():
            found = _read_results_file(folder)
        elif (run := _find_files(folder) or _find_files(folder, TRAINER_STATE_NAME)) is not None:
            found = [_read_single_run(run)]
        else:
            there = "no such folder"
            if folder.is_dir():
                names = sorted(os.listdir(folder))
                there = f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "nothing"
            raise FileNotFoundError(
                f"{folder} has neither {RESULTS_FILE} (a recipe's output) nor {TRAINER_STATE_NAME} (a finished run, or "
                f"a checkpoint in it); there is {there}."
            )
        for result in found:
            if results.setdefault(os.path.realpath(result["path"]), result) is result:
                sources.append(str(folder))
    return _tell_apart(list(results.values()), sources)


def _read_results_file(folder: Path) -> list[dict[str, Any]]:
    results = _read_objects(folder)
    for result in results:
        if result["finite"]:
            result["path"] = str(_find_run(result["path"], folder))
    return results


def _read_objects(folder: Path) -> list[dict[str, Any]]:
    path = folder / RESULTS_FILE
    results = read_json(path, list)
    for result in results:
        require(path, result, "method", "path", "finite")
        if result.get("seed") is not None:
            require(path, result, "seed")
        if result["finite"]:
            require(path, result, "samples", "steps")
    return results


def _find_run(path: str, folder: Path) -> Path:
    """The folder of a run that `results.json` names, or of its last checkpoint."""
    for place in _find_places(path, folder):
        if (files := _find_files(place, TRAINER_STATE_NAME)) is not None:
            return files
    named = f"{folder / RESULTS_FILE} names the run {printable(path)}"
    raise FileNotFoundError(f"{named}, but there is no {TRAINER_STATE_NAME} in it.")


def _find_places(path: str, folder: Path) -> list[Path]:
    """Where a run may be that `results.json` names: there or, after a move, where the end of the name leads to."""
    parts = Path(path).parts
    ends = [Path(*parts[start:]) for start in range(len(parts))]
    return [Path(path), *(base / end for end in ends for base in (folder, folder.resolve().parent))]


def _find_files(run: Path, *names: str) -> Path | None:
    """A run's folder or, where that lacks the files, its last checkpoint that has them."""
    for folder in (run, *map(Path, reversed(sort_checkpoints(str(run))))):
        if all((folder / name).is_file() for name in names or (TRAINER_STATE_NAME, RECORD_FILE)):
            return folder
    return None


def is_checkpoint(folder: str) -> bool:
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).resolve().name) is not None


def _read_single_run(folder: Path) -> dict[str, Any]:
    """What `results.json` would say of a run."""
    state, record = read_json(folder / TRAINER_STATE_NAME), read_record(folder)
    require(folder / TRAINER_STATE_NAME, state, "log_history", "global_step")
    require(folder / RECORD_FILE, record, "method", "samples_per_step")
    steps, planned = state["global_step"], record.get("max_steps")
    if is_checkpoint(str(folder)) and planned != steps:
        logger.warning("%s is where the run is read from: step %s of %s", *map(printable, (folder, steps, planned)))
    samples = steps * record["samples_per_step"]
    run = {"method": record["method"], "samples": samples, "steps": steps, "finite": True, "path": str(folder)}
    return run if record.get("seed") is None else run | {"seed": record["seed"]}


def read_record(folder: Path) -> dict[str, Any]:
    """A run's `curriculum.json`; of a run of `Trainer`, which has none, what one would say, without arguments.

    The examples of such a run are those that its last log counts or, in a checkpoint, those of one process without
    gradient accumulation; its operations are those that `Trainer` counts.

    Raises:
        ValueError: a file is damaged.
    """
    if (folder / RECORD_FILE).exists():
        return read_json(folder / RECORD_FILE)
    path = folder / TRAINER_STATE_NAME
    state = read_json(path)
    require(path, state, "log_history", "global_step", "max_steps", "total_flos")
    samples = None
    for entry in state["log_history"]:
        if "train_runtime" in entry:
            require(path, entry, "train_runtime", "train_samples_per_second")
            samples = round(entry["train_runtime"] * entry["train_samples_per_second"] / state["max_steps"])
    if not samples:
        require(path, state, "train_batch_size")
        samples = state["train_batch_size"]
        logger.warning(
            "%s does not say how many examples a step took; they are counted as those of one process without gradient "
            "accumulation", path
        )  # fmt: skip
    return {
        "method": "trainer",
        "max_steps": state["max_steps"],
        "samples_per_step": samples,
        "stages": [],
        "step": state["global_step"],
        "student_flops": state["total_flos"],
        "teacher_flops": 0.0,
    }


# ---- which runs are repetitions ----


def _tell_apart(results: Sequence[dict[str, Any]], sources: Sequence[str]) -> list[dict[str, Any]]:
    """The results, with a `method` that only runs share which differ in nothing but their seed.

    Where a method's runs differ in more, its name is followed by the settings that tell them apart if these are one or
    two short ones, else by the folder. Settings are those of `curriculum.json`, and the student's `config.json`. The
    records of earlier versions lack most: what they leave open is taken for the same within one `results.json` only. So
    is the number of training examples, which may follow the seed that draws them.

    Args:
        sources: the folder that each result was read from.
    """
    settings: list[dict[str, Any]] = [{} for _ in results]
    seeds: list[Any] = [None for _ in results]
    finite = [index for index, result in enumerate(results) if result["finite"]]
    for index in finite:
        settings[index], seeds[index] = _read_settings(results[index], sources[index])
    drawn = defaultdict(set)
    for index in finite:
        drawn[results[index]["method"], sources[index]].add(settings[index].get(_NUM_EXAMPLES))
    for index in finite:
        if len(numbers := drawn[results[index]["method"], sources[index]]) > 1:
            settings[index][_NUM_EXAMPLES] = sorted(filter(None, numbers))

    def row(index: int) -> tuple[str, str]:
        return results[index]["method"], json.dumps(settings[index], sort_keys=True)

    for name, values in (("source", sources), ("path", [result["path"] for result in results])):
        runs = Counter((row(index), seeds[index]) for index in finite)
        repeated = {key for (key, _), number in runs.items() if number > 1}  # the same seed again is no repetition
        for index in [index for index in finite if row(index) in repeated]:
            settings[index][name] = values[index]
    for index in set(range(len(results))) - {*finite}:  # has no record: its settings are those of the runs beside it
        beside = [i for i in finite if (results[i]["method"], sources[i]) == (results[index]["method"], sources[index])]
        known = len({row(i) for i in beside}) == 1
        unknown = {"path": results[index]["path"]} if beside else {"source": sources[index]}
        settings[index] = settings[beside[0]] if known else unknown

    methods: dict[str, dict[str, list[int]]] = {}
    for index in range(len(results)):
        method, key = row(index)
        methods.setdefault(method, {}).setdefault(key, []).append(index)
    told_apart = list(results)
    for method, rows in methods.items():
        if len(rows) == 1:
            continue
        if any("source" in settings[index] for index in finite if results[index]["method"] == method):
            logger.warning(
                "%s: some of its runs have the seed of others, or were recorded by a version that wrote no arguments "
                "down; they share a row only with the runs of their own %s", printable(method), RESULTS_FILE
            )  # fmt: skip
        for index, name in _name_rows(method, list(rows.values()), settings, results, {*methods}).items():
            told_apart[index] = results[index] | {"method": name}
    return told_apart


def _read_settings(result: Mapping[str, Any], source: str) -> tuple[dict[str, Any], Any]:
    """What was trained and how, as far as it is recorded, and with which seed."""
    folder = Path(result["path"])
    record = read_record(folder)
    settings = {}
    if record.get("arguments") is None:
        settings["source"] = source
    else:
        require(folder / RECORD_FILE, record, "arguments")
        settings |= {f"arguments.{name}": value for name, value in record["arguments"].items()}
    if (folder / CONFIG_NAME).is_file():
        config = read_json(folder / CONFIG_NAME)
        settings |= {f"student.{name}": value for name, value in config.items() if name not in _NO_SETTINGS}
    if isinstance(data := record.get("data"), dict):
        settings |= {f"data.{name}": value for name, value in data.items() if name != "seed"}
    settings |= {name: record.get(name) for name in _RESOLVED}
    if isinstance(record.get("teacher"), dict) and settings.get("arguments.method", record.get("method")) != "online":
        settings["teacher"] = record["teacher"].get("fingerprint")  # an online teacher's is that of its first weights
    seed = result.get("seed", record.get("seed"))
    return settings, result["path"] if seed is None else json.dumps([seed, record.get("data_seed")])


def _name_rows(
    method: str,
    rows: Sequence[Sequence[int]],
    settings: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    taken: set[str],
) -> dict[int, str]:
    """A name for each result of a method that has several rows."""
    own = [settings[indices[0]] for indices in rows]
    differing = [n for n in dict.fromkeys(chain(*own)) if len({json.dumps(s.get(n), sort_keys=True) for s in own}) > 1]
    for prefix in ("arguments.", "student.", ""):  # the rest follows from these
        if chosen := [name for name in differing if name.startswith(prefix)]:
            break
    paths = [[os.path.abspath(results[index]["path"]) for index in indices] for indices in rows]
    schemes = []
    for folders in [os.path.commonpath(ps) for ps in paths], [ps[0] for ps in paths]:
        base = os.path.commonpath(folders)
        base = os.path.dirname(base) if base in folders else base
        schemes.append([f"{method} ({os.path.relpath(folder, base)})" for folder in folders])
    if len(chosen) <= 2 and all(_is_short(s.get(name)) for name in chosen for s in own) and "source" not in chosen:
        shown = [", ".join(f"{name.rpartition('.')[2]}={s[name]}" for name in chosen) for s in own]
        schemes.insert(0, [f"{method}, {text}" for text in shown])
    names = next((names for names in schemes if len({*names} - taken) == len(rows)), schemes[-1])
    return {index: printable(name) for indices, name in zip(rows, names, strict=True) for index in indices}


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and len(str(value)) <= 20


def settings_that_differ(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Settings that are not the same in all finite runs, and the value of each run; None where it has none.

    Stages, and what follows from other settings, are left out.
    """
    known = [_read_settings(result, result["path"])[0] for result in results if result["finite"]]
    names = [n for n in dict.fromkeys(chain(*known)) if n not in {*_RESOLVED, "source", "arguments.stages"}]
    values = {name.removeprefix("arguments."): [settings.get(name) for settings in known] for name in names}
    return {n: each for n, each in values.items() if len({json.dumps(value, sort_keys=True) for value in each}) > 1}


# ---- what a file holds ----

_LARGEST = 1e30  # more than any run counts or measures


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST  # NaN is not


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= least


def _is_path(value: Any) -> bool:
    try:
        return "\0" not in value and bool(os.fsencode(value))
    except (TypeError, UnicodeEncodeError):
        return False


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, dict) for element in value)


_AT_LEAST_1 = (lambda value: _is_count(value, 1), "a whole number from 1")
_COUNT = (_is_count, "a whole number from 0")
_OBJECTS = (_is_list_of_objects, "a list of objects")
_NUMBER = (_is_number, "a finite number")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (lambda value: isinstance(value, str) and value.isprintable() and value != "", "a printable name"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "path": (_is_path, "the name of a folder"),
    "finite": (lambda value: isinstance(value, bool), "true or false"),
    "arguments": (lambda value: isinstance(value, dict), "an object"),
    "log_history": _OBJECTS,
    "stages": _OBJECTS,
    "until": (lambda value: value is None or _is_count(value), "null or a whole number from 0"),
    **dict.fromkeys(("samples", "steps", "global_step", "max_steps"), _AT_LEAST_1),
    **dict.fromkeys(("samples_per_step", "train_batch_size"), _AT_LEAST_1),
    "step": _COUNT,
}  # all others: a finite number


def read_json(path: Path, kind: type = dict) -> Any:
    """The object or list that a file holds.

    Raises:
        ValueError: it holds something else, or is no JSON.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, kind):
        raise ValueError(f"{path} is damaged: it holds a {type(values).__name__}, not a {kind.__name__}.")
    return values


def require(path: Path, values: Any, *names: str) -> None:
    """Raise a `ValueError` if fields are missing from an object that a file holds, or are of another kind."""
    if missing := [name for name in names if not isinstance(values, dict) or name not in values]:
        raise ValueError(f"{path} is damaged: no {', '.join(missing)} in {reprlib.repr(values)}.")
    for name in names:
        is_right, wanted = _FIELDS.get(name, _NUMBER)
        if not is_right(values[name]):
            raise ValueError(f"{path} is damaged: {name} is {reprlib.repr(values[name])}, not {wanted}.")
