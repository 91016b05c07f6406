"""What a training publishes: a model card beside every saved student, and what is pushed to the Hub."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from hf_curriculum_distill.lines import one_line
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.preparing.trainer import PreparedTrainer
from hf_curriculum_distill.report.card import CardFacts, describe_dataset
from hf_curriculum_distill.report.card_file import write_card

logger = get_logger(__name__)


class PublishedTrainer(PreparedTrainer):
    """The part of [`CurriculumDistillationTrainer`] that describes the student to those who find it.

    Without stages it is `Trainer`, with its card.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`, with a model card beside the student, its projection bank and `curriculum.json`."""
        super().save_model(output_dir, _internal_call)
        if self._is_adapter and self._declared_stages and self.stage_scheduler:
            self._write_card(output_dir or self.args.output_dir)  # PEFT has put its own tags in place of ours

    def _save_beside(self, folder: str) -> None:
        super()._save_beside(folder)
        if self._declared_stages and self.stage_scheduler:
            self._write_card(folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """As `Trainer`, but the card says how the student was distilled; what a user has written in it is kept.

        `finetuned_from` is the base model in place of the teacher, and `dataset` takes the place of the evaluation's
        data set where `dataset_tags` does not name one on the Hub.
        """
        if not self._declared_stages or not self.stage_scheduler:
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        given = {"language": language, "license": license, "tags": _as_list(tags), "base_model": finetuned_from}
        given |= {"pipeline_tag": (_as_list(tasks) or [None])[0], "datasets": _as_list(dataset_tags)}
        changes: dict[str, Any] = {} if given["pipeline_tag"] is None else {"task": given["pipeline_tag"]}
        if named := _as_list(dataset_tags) or _as_list(dataset):
            changes["eval_data"] = {"id": named[0], "config": (_as_list(dataset_args) or [None])[0], "split": None}
        if model_name is not None and self.hub_model_id is None:
            changes["name"] = model_name
        self._write_card(self.args.output_dir, {n: v for n, v in given.items() if v}, **changes)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer`, but an error says what to do.

        Raises:
            OSError: the repository cannot be created or pushed to.
            ValueError: its name cannot be one.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except ValueError:
            raise  # of a name that no repository can have
        except Exception as error:  # without a network it is one of the client's library, which differs by version
            raise OSError(
                f"Nothing can be pushed to {self.args.hub_model_id or self.args.output_dir!r} on the Hub "
                f"({one_line(error)}); log in with `hf auth login`, pass a hub_token that may write there, or name "
                "another hub_model_id."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As `Trainer`, which copies the weights of the checkpoint to the folder that it pushes, and nothing else."""
        self._save_beside(self.args.output_dir)
        self._report_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """As `Trainer`, and says so if the push has failed."""
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Warn of pushes that have failed in the background, where `Trainer` drops their errors."""
        push = getattr(self, "push_in_progress", None)
        if push is None or not push.is_done():
            return
        for error in dict.fromkeys(one_line(job.exception()) for job in push.jobs if job.exception()):
            logger.warning(
                "A checkpoint was not pushed to %s (%s). It is in %s; the next checkpoint pushes the student again, "
                "and so does trainer.push_to_hub() after the training.",
                self.hub_model_id, error, self.args.output_dir
            )  # fmt: skip
        push.jobs = []

    def _write_card(self, folder: str, given: dict[str, Any] | None = None, **changes: Any) -> None:
        if not (self.args.should_save and self.is_world_process_zero()):
            return
        os.makedirs(folder, exist_ok=True)
        args, state = self.args, self.state
        loaded_best = args.load_best_model_at_end and state.best_model_checkpoint and not self.is_in_train
        on_gpu = args.device.type == "cuda"
        facts = CardFacts(
            name=self.hub_model_id or args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir)),
            model_class=type(self._core).__name__,
            record=self._record(),
            log_history=state.log_history,
            step=state.best_global_step if loaded_best else state.global_step,
            device=f"{args.world_size} x {torch.cuda.get_device_name() if on_gpu else args.device.type}",
            tags=_as_list(getattr(self.model, "model_tags", None)),
            train_data=describe_dataset(self.train_dataset),
            eval_data=describe_dataset(self.eval_dataset),
            is_adapter=self._is_adapter,
        )
        write_card(folder, dataclasses.replace(facts, **changes), given)

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), "peft_config")


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
