"""Trainer for conversations: learning rates, batches by seconds, errors that name their cause, complete checkpoints."""

import contextlib
import copy
import logging
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import HubStrategy, TrainOutput, seed_worker

from ..ccc_loss import MISSING_LABEL
from ..data.augmentation import mixed_conversations
from ..data.dataset import ConversationDataset
from ..modeling_mamba_ema import has_adapters
from ..publishing import TrainingFacts, push_model
from ..publishing.checksums import SUMS
from ..publishing.model_card import model_card
from .accumulation import AccumulatedLoss
from .arguments import MambaEMATrainingArguments
from .batches import AudioSecondsBatchSampler, ConversationCollator, seconds_of_turns
from .callbacks import EvaluationLog, Progress, SealCheckpoints, SetEpoch
from .checkpoints import checkpoints_in, require_space_for_checkpoints
from .evaluation import ccc_of_predictions, predict_in_chunks, side_by_side, start_from_context
from .lora import merge_lora, require_same_base
from .optimizer import check_parameter_groups, parameter_groups, require_finite_gradient
from .processes import is_of_transport

logger = logging.getLogger(__name__)


class MambaEMATrainer(Trainer):
    """Trainer with a learning rate of its own for the speech encoder, batches by seconds, and complete checkpoints.

    Arguments are those of `Trainer`, with a `MambaEMAForRegression` (or None and a `model_init`),
    [`MambaEMATrainingArguments`] (else `TypeError`), and [`ccc_of_predictions`] for `compute_metrics` by default.
    """

    def __init__(self, model: nn.Module | None, args: MambaEMATrainingArguments, **kwargs: Any):
        if not isinstance(args, MambaEMATrainingArguments):
            raise TypeError(f"args is {type(args).__name__}, but must be MambaEMATrainingArguments")
        self.save_total_limit = args.save_total_limit
        args = copy.copy(args)
        args.save_total_limit = None  # Trainer would remove old checkpoints before the new one is complete
        args.hub_strategy = HubStrategy.END  # a checkpoint is no release
        super().__init__(model=cast(Any, model), args=args, **kwargs)
        if "compute_metrics" not in kwargs:
            self.compute_metrics = ccc_of_predictions(cast(Any, self.model).config.labels)
        self.args: MambaEMATrainingArguments = args
        self._check_sharding()
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress())
        self.add_callback(SealCheckpoints(self.save_total_limit))
        self.add_callback(EvaluationLog())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self._degenerate: list[torch.Tensor] = []  # since the last log; read there, as a GPU is waited for then
        self._batches: list[dict[str, Any]] = []  # that are accumulated for the next step
        self._accumulated: AccumulatedLoss | None = None  # their loss, once it is known

    def _check_sharding(self) -> None:
        """Refuse FSDP where accelerate would leave it out without a word, and what does not go with it."""
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            raise ValueError("accelerate shards weights (FSDP) on GPUs only; on CPUs, take cpu_two_processes.yaml")
        if not self.is_fsdp_enabled:
            return
        if has_adapters(cast(Any, self.model)):
            raise ValueError("training.lora does not go with FSDP; adapters are small: take many_gpus.yaml")
        train: Any = self.train_dataset
        if getattr(getattr(train, "dataset", train), "context_turns", 0):
            raise ValueError(
                "data.context_turns does not go with FSDP: the processes would run the model a different number of "
                "times, each of which all must share; leave it out, or take many_gpus.yaml"
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's, after a look at the disk. Errors name what was read or saved when they arose.

        Raises:
            OSError: a disk without room for the checkpoints, or one that was full while a checkpoint was saved.
            RuntimeError: a worker process died or froze.
            ValueError: NaN in labels, loss, gradient or weights; adapters of another model.
        """
        if resume_from_checkpoint is not None:
            require_same_base(Path(resume_from_checkpoint), cast(Any, self.model))
        if resume_from_checkpoint is not None and self._had_stopped_early(Path(resume_from_checkpoint)):
            if self.state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(self.state.global_step, float("nan"), {})
        folder = Path(self.args.output_dir)
        if self.args.should_save and self.args.save_strategy != "no":
            # While one is written, those that stay are still there: the best and the newest.
            count = max(1, (self.save_total_limit or 1) + 1 - len(checkpoints_in(folder)))
            require_space_for_checkpoints(folder, cast(nn.Module, self.model), count)
        try:
            with self._naming_files(self.train_dataset, self.eval_dataset):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:  # torch, safetensors and Python have an exception each for a full disk
            unfinished = folder / f"checkpoint-{self.state.global_step}"
            if not unfinished.is_dir() or (unfinished / SUMS).exists() or is_of_transport(error):
                raise
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            free = shutil.disk_usage(folder).free / 1e9
            raise OSError(
                f"{unfinished.name} could not be saved in {folder} ({free:.3f} GB free): {error}. The checkpoints "
                "before it are as they were; with space on the disk, the same command goes on from the newest"
            ) from error

    def _had_stopped_early(self, checkpoint: Path) -> bool:
        """Whether patience was used up where the checkpoint was written; its state is then the trainer's. Else a run
        that is killed between its early stop and its results would train on until the next evaluation."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        saved = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
        count = saved.get("attributes", {}).get("early_stopping_patience_counter", 0) if isinstance(saved, dict) else 0
        stopped = self.args.early_stopping_patience is not None and count >= self.args.early_stopping_patience
        if stopped:
            self.state = state
        return stopped

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        with self._naming_files(test_dataset):
            return super().predict(test_dataset, *args, **kwargs)

    @contextlib.contextmanager
    def _naming_files(self, *datasets: Any) -> Iterator[None]:
        """Where a worker process died or froze, say which file it was reading."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            readers = {pid: name for d in datasets if hasattr(d, "being_read") for pid, name in d.being_read().items()}
            frozen = str(error).startswith("DataLoader timed out")
            alive = {child.pid for child in multiprocessing.active_children()} | {os.getpid()}
            lost = [pid for pid in readers if (pid in alive) == frozen]
            if not lost:
                raise
            if frozen:
                for pid in lost:  # a stopped process would not end with this one
                    os.kill(pid, signal.SIGCONT)
            files = ", ".join(Path(readers[pid]).name for pid in lost if readers[pid]) or "no file"
            # What still refers to the loader keeps its workers registered, and torch would raise anew at any moment.
            traceback.clear_frames(error.__traceback__)
            raise RuntimeError(
                f"step {self.state.global_step}: a process that reads audio {'froze' if frozen else 'died'} while it "
                f"was reading {files} ({type(error).__name__}: {error}). If it was killed, memory ran out most often"
            ) from error

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args, model = self.args, self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            encoder_rate = args.learning_rate if args.encoder_learning_rate is None else args.encoder_learning_rate
            groups = parameter_groups(model, args.weight_decay, args.learning_rate, encoder_rate)
            check_parameter_groups(model, groups)
            self.optimizer = optimizer_class(groups, **options)
            self.optimizer.register_step_pre_hook(
                lambda optimizer, *_: require_finite_gradient(optimizer, self.state.global_step)
            )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Batches by seconds of audio where asked for."""
        if not isinstance(dataset := self.train_dataset, torch.utils.data.Dataset):
            raise ValueError("training needs a train_dataset")
        by_epoch: list[Any] = [dataset] if hasattr(dataset, "set_epoch") else []
        # After a resume in the middle of an epoch, accelerate's wrappers hide these from Trainer's set_epoch.
        self.pop_callback(SetEpoch)
        self.add_callback(SetEpoch(by_epoch))
        if self.args.max_seconds_per_batch is None:
            one_batch = len(cast(Any, dataset)) < self.args.train_batch_size * self.args.world_size
            with self._every_batch() if one_batch else contextlib.nullcontext():
                return self._with_timeout(super().get_train_dataloader())
        sampler = AudioSecondsBatchSampler(
            seconds_of_turns(cast(ConversationDataset, dataset)),
            self.args.max_seconds_per_batch,
            num_processes=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        by_epoch.append(sampler)
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        return self._with_timeout(self.accelerator.prepare(loader))

    def _with_timeout(self, loader: DataLoader) -> DataLoader:
        if loader.num_workers > 0:  # Trainer has no argument for it and would wait for a frozen worker without end
            getattr(loader, "base_dataloader", loader).timeout = self.args.worker_timeout  # within accelerate's wrapper
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the batches of a step are noted, because their loss is one."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._batches, self._accumulated = batches, None
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss. Of accumulated batches it is the loss of all their turns together, with the gradient of the
        next of them. An error names the conversations."""
        if model.training and len(self._batches) > 1 and self.compute_loss_func is None:
            return self._loss_of_accumulated_batches(model)
        inputs, names = self._inputs_of_model(inputs)
        if model.training and "labels" in inputs:
            self._degenerate.append(has_degenerate_label(self._values(inputs["labels"])))
        with self._naming_conversations(names):
            with self._mixed(model, inputs):
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            require_finite_loss(result[0] if isinstance(result, tuple) else result)
        return result

    def _loss_of_accumulated_batches(self, model: nn.Module) -> torch.Tensor:
        count = len(self._batches)
        if self._accumulated is None:
            plain: Any = self.accelerator.unwrap_model(model)
            batches, names = zip(*(self._inputs_of_model(self._prepare_inputs(batch)) for batch in self._batches))
            labels = torch.cat([batch["labels"].flatten(0, 1) for batch in batches])
            self._degenerate.append(has_degenerate_label(self._values(labels)))
            with self._naming_conversations(", ".join(names)):
                predict = partial(self._predict, plain)
                self._accumulated = AccumulatedLoss(predict, plain.loss, batches, self.args.device)
                require_finite_loss(self._accumulated.loss)
        # Trainer divides it by the number of batches, and logs the sum over them.
        loss = self._accumulated.loss + count * self._accumulated.next_share(partial(self._predict, model))
        if not self._accumulated.shares:
            self._batches, self._accumulated = [], None
        return loss

    def _predict(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and labels of the turns that are there, as the loss takes them."""
        inputs = dict(inputs)
        with self._mixed(model, inputs):
            labels = inputs.pop("labels")
            outputs = model(**inputs, return_dict=True)
        predictions, present = side_by_side(outputs), outputs["turn_mask"].bool()
        return predictions[present], cast(Any, self.model).checked_targets(labels, predictions)[present]

    def _values(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels without the spreads that may stand behind them."""
        return labels[..., : len(cast(Any, self.model).config.labels)]

    def _inputs_of_model(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """What the model takes of a batch, with the state before its windows; and the names of its conversations."""
        inputs = dict(inputs)
        names = ", ".join(inputs.pop("conversation_ids", []))
        context_turns = inputs.pop("context_turns", None)
        if context_turns is not None:
            plain = self.accelerator.unwrap_model(cast(nn.Module, self.model))
            inputs = start_from_context(plain, inputs, context_turns, self.args.turns_per_chunk)
        return inputs, names

    @contextlib.contextmanager
    def _naming_conversations(self, names: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"step {self.state.global_step}: {error} (conversations of the batch: {names})") from error

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Trainer's; a conversation of many turns goes through the model in chunks, but with FSDP, where all processes
        must run the model equally often."""
        if self.is_fsdp_enabled or inputs["turn_mask"].shape[1] <= self.args.turns_per_chunk:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return loss, torch.cat(logits, dim=-1) if isinstance(logits, tuple) else logits, labels
        plain = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = predict_in_chunks(plain, inputs, self.args.turns_per_chunk)
            labels, present = inputs["labels"], inputs["turn_mask"].bool()
            loss = plain.loss(logits[present], plain.checked_targets(labels, logits)[present])
        return loss, None if prediction_loss_only else logits, None if prediction_loss_only else labels

    @contextlib.contextmanager
    def _mixed(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
        """Mixup in training, drawn from seed, step and process, so that a resumed run draws the same."""
        if not self.args.mixup_alpha or not model.training:
            yield
            return
        random = np.random.default_rng([self.args.seed, self.state.global_step, self.args.process_index])
        projection = self.accelerator.unwrap_model(model).mamba_ema.projection
        with mixed_conversations(projection, inputs["labels"], self.args.mixup_alpha, random) as labels:
            inputs["labels"] = labels
            yield

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the share of batches from which some label learned nothing."""
        if "loss" in logs and self._degenerate:
            logs["degenerate_batches"] = float(torch.stack(self._degenerate).float().mean())
            self._degenerate = []
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; weights with NaN or infinity are refused by a `ValueError`, because a checkpoint with NaN could
        only be resumed to more of it."""
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"step {self.state.global_step}: {name} holds NaN or infinity; no checkpoint is saved")
        super().save_model(output_dir, _internal_call)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | list[str] | None = None,
        **card: Any,
    ) -> Any:
        """Upload the model, adapters merged, as a release with this package's model card, see `push_model`, and return
        the address of the commit, None in all processes but the first.

        Arguments are those of Trainer's and of [`create_model_card`]; `blocking=False` is refused.
        """
        if not blocking:
            raise ValueError("push_to_hub(blocking=False) is not supported: the release is made and uploaded at once")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        model: Any = self.model
        if has_adapters(model):
            model = copy.deepcopy(model)
            merge_lora(model)
        return push_model(
            model,
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            commit_message=commit_message,
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            tags=[tags] if isinstance(tags, str) else tags,
            training=self._training_facts(**card),
        )

    def create_model_card(  # type: ignore[override]
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        """Write this package's model card to `README.md` in `output_dir`.

        Arguments are those of Trainer's; of the others, finetuned_from and dataset have a place in it.
        """
        if self.is_world_process_zero():
            facts = self._training_facts(language, license, **others)
            card: Any = ModelCard(model_card(cast(Any, self.model).config, facts))
            card.data.tags = [*card.data.tags, *([tags] if isinstance(tags, str) else tags or [])]
            card.save(Path(self.args.output_dir) / "README.md")

    def _training_facts(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        **_: Any,
    ) -> TrainingFacts:
        """What a card says of the training, with the CCC of the evaluation whose weights the model has."""
        evaluations = [entry for entry in self.state.log_history if "eval_ccc" in entry]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            evaluations = [entry for entry in evaluations if entry["step"] == self.state.best_global_step]
        metrics = {name.removeprefix("eval_"): value for name, value in evaluations[-1].items()} if evaluations else {}
        return TrainingFacts(
            results={"validation": metrics} if metrics else {},
            source=", ".join(dataset) if isinstance(dataset, list) else dataset,
            command=None,
            base_model=finetuned_from,
            license=license,
            languages=[language] if isinstance(language, str) else language or (),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._every_batch(), self._in_chunks():
            return self._with_timeout(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._every_batch(), self._in_chunks():
            return self._with_timeout(super().get_test_dataloader(test_dataset))

    @contextlib.contextmanager
    def _in_chunks(self) -> Iterator[None]:
        """Loaders that are made meanwhile pad conversations of many turns a chunk at a time."""
        collator = self.data_collator
        if isinstance(collator, ConversationCollator) and not self.is_fsdp_enabled:
            self.data_collator = partial(collator.in_chunks, turns_per_chunk=self.args.turns_per_chunk)
        try:
            yield
        finally:
            self.data_collator = collator

    @contextlib.contextmanager
    def _every_batch(self) -> Iterator[None]:
        """Trainer would leave out the last batch of an evaluation, and the only batch of a small corpus, too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last


def require_finite_loss(loss: torch.Tensor) -> None:
    """Raise `ValueError` for a loss that is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {float(loss)}, nothing can be learned from it")


def has_degenerate_label(labels: torch.Tensor) -> torch.Tensor:
    """Whether some of the labels (..., labels), -100 where missing, is missing or the same in all turns of the batch of
    all processes, so that its CCC is 0 and teaches nothing."""
    values = labels.detach().flatten(0, -2).float()  # (turns, labels)
    missing = values == MISSING_LABEL
    lowest = values.masked_fill(missing, torch.inf).amin(dim=0)
    highest = values.masked_fill(missing, -torch.inf).amax(dim=0)
    bounds = torch.cat([lowest, -highest])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
    lowest, highest = bounds.chunk(2)
    return (-highest <= lowest).any()
