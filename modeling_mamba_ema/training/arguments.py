"""Arguments of training: transformers' own, and those that Mamba-EMA adds."""

import atexit
import copy
import inspect
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from .processes import leave_group

# Of `metric_for_best_model`: a lower value of these is better.
_ERRORS = ("loss", "rmse", "mae")
# What transformers does not look at, or only when it is needed.
_AT_LEAST_1 = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "turns_per_chunk"),
    *("max_seconds_per_batch", "early_stopping_patience", "save_total_limit", "worker_timeout", "ddp_timeout"),
    *("eval_accumulation_steps", "dataloader_prefetch_factor"),
)
_AT_LEAST_0 = (
    *("learning_rate", "encoder_learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "mixup_alpha"),
    *("dataloader_num_workers", "seed", "data_seed"),
)
# What transformers ignores without a word: options of a part that is off, and options of these schedules.
_USED_WITH = {
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
}
_WITHOUT_OPTIONS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
_OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")  # how the names of such optimizers begin
_LOWEST = {**dict.fromkeys(_AT_LEAST_1, 1), **dict.fromkeys(_AT_LEAST_0, 0)}


@dataclass
class MambaEMATrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with the arguments that Mamba-EMA adds, and other defaults where conversations need them.

    Raises:
        ValueError: a value that is not allowed, a schedule or an optimizer that cannot be made, an option that would be
            ignored, or a tracker that is not installed.
        ImportError: an optimizer whose library is not installed.
    """

    encoder_learning_rate: float | None = None  # of the speech encoder or its adapters; None: learning_rate
    max_seconds_per_batch: float | None = None  # of audio, over all processes; None: per_device_train_batch_size counts
    # Adapters in a frozen speech encoder: fields of peft's LoraConfig, such as {r: 16, lora_alpha: 32}; None: none.
    lora: dict[str, Any] | None = None
    mixup_alpha: float = 0.0  # of mixup between conversations of a batch, such as 0.2; 0: no mixup
    turns_per_chunk: int = 32  # of a conversation, evaluated at once; bounds memory, changes no result
    early_stopping_patience: int | None = None  # stop after this many evaluations without a better one; None: never
    worker_timeout: float = 300.0  # seconds after which a data loader's process that sends no batch ends the run

    # Defaults that differ from those of TrainingArguments:
    output_dir: str = "outputs/run"
    # The same command goes on from the newest complete checkpoint; null starts again.
    resume_from_checkpoint: str | None = "auto"
    # Pooling, updater and head start from random weights: a higher rate, some steps to reach it, and more epochs.
    learning_rate: float = 1e-4
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.1
    num_train_epochs: float = 10.0
    weight_decay: float = 0.01
    # The result is the best evaluation, chosen by CCC: the mean of the loss over batches is not a CCC.
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "epoch"
    logging_strategy: IntervalStrategy | str = "epoch"
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "ccc"
    save_total_limit: int | None = 2
    # Without it, a resumed run forgets how many evaluations early_stopping_patience has counted.
    restore_callback_states_from_checkpoint: bool = True
    # With the filter, NaN is logged as loss 0, which is a perfect CCC.
    logging_nan_inf_filter: bool = False
    # A last training batch of one turn has no CCC. Evaluation always sees every turn.
    dataloader_drop_last: bool = True
    # Parameters that no output depends on are frozen; looking for more of them in each step takes time.
    ddp_find_unused_parameters: bool | None = False
    # Items of ConversationDataset are no arguments of the model; the collator makes these.
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        if not torch.cuda.is_available():
            self.use_cpu = True  # nothing here was tried on other devices; and accelerate needs it for gloo
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.removeprefix("eval_").startswith(_ERRORS)
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            # On a CPU, TrainingArguments starts the process group without ddp_timeout.
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        if self.disable_tqdm is None:
            self.disable_tqdm = False  # transformers ties it to how much its own logger says
        super().__post_init__()
        if dist.is_initialized():
            atexit.register(leave_group)
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(self, name):
                raise ValueError(f"{name} is for models of classes or of tokens; leave it out")
        for name in ("remove_unused_columns", "prediction_loss_only", "label_names", "batch_eval_metrics"):
            if getattr(self, name):
                raise ValueError(f"{name} would take away what training and evaluation need; leave it out")
        for name, needed in _USED_WITH.items():
            if getattr(self, name, None) and not getattr(self, needed):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but without {needed} nothing reads it")
        sampling = getattr(self, "train_sampling_strategy", "random")
        if sampling != "random" and (sampling != "sequential" or self.max_seconds_per_batch is not None):
            raise ValueError(
                f"train_sampling_strategy is {sampling}; allowed are random, and without max_seconds_per_batch, which "
                "puts turns of similar length together, sequential"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError("early_stopping_patience counts evaluations, but eval_strategy is no")
        by_epoch = self.eval_strategy == IntervalStrategy.EPOCH and self.max_steps <= 0
        if self.load_best_model_at_end and by_epoch and self.eval_delay >= self.num_train_epochs:
            raise ValueError(
                f"eval_delay is {self.eval_delay}, so that none of {self.num_train_epochs} epochs is evaluated"
            )
        missing = sorted(set(self.report_to or ()) - set(get_available_reporting_integrations()))
        if missing:
            available = ", ".join(get_available_reporting_integrations()) or "none"
            raise ValueError(f"report_to names {', '.join(missing)}; the trackers installed here are: {available}")
        self._check_schedule()
        self._check_optimizer()

    def _check_numbers(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, but must be a finite number")
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}, but must be at least {lowest}")
        if self.max_steps == 0:  # transformers would take one step
            raise ValueError("max_steps is 0; allowed are whole numbers from 1, and -1 for num_train_epochs")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}, but must be above 0, or max_steps be given")

    def _check_schedule(self) -> None:
        """Make the schedule once, for a stand-in: options that are missing or unknown end the run now."""
        if self.lr_scheduler_kwargs and self.lr_scheduler_type in _WITHOUT_OPTIONS:
            name = SchedulerType(self.lr_scheduler_type).value
            raise ValueError(f"lr_scheduler_type {name} takes no lr_scheduler_kwargs, got {self.lr_scheduler_kwargs}")
        try:
            get_scheduler(
                self.lr_scheduler_type,
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate),
                num_warmup_steps=0,  # the first value is then made of the options
                num_training_steps=10,
                scheduler_specific_kwargs=cast(Any, self.lr_scheduler_kwargs),
            )
        except (TypeError, ValueError) as error:
            name = SchedulerType(self.lr_scheduler_type).value
            options = f"lr_scheduler_type {name}, lr_scheduler_kwargs {self.lr_scheduler_kwargs}"
            raise ValueError(f"{options}: {error}") from error

    def _check_optimizer(self) -> None:
        """Make the optimizer once, for a stand-in, and refuse names in `optim_args` that transformers does not read."""
        optim, given = OptimizerNames(self.optim).value, self.optim_args or ""
        if optim.startswith(_OWN_GROUPS):
            raise ValueError(f"optim {optim} groups parameters itself, without encoder_learning_rate; take another")
        if self.optim_target_modules:
            raise ValueError(f"optim {optim} does not read optim_target_modules; leave it out")
        parts = [part.split("=") for part in given.replace(" ", "").split(",") if given]
        if any(len(part) != 2 for part in parts):
            raise ValueError(f"optim_args is {given!r}, but must be name=value,name=value")
        try:
            optimizer_class, options = self._optimizer_with(given)
            for name, _ in parts:
                if not self._reads_from_optim_args(name):
                    arguments = inspect.signature(optimizer_class).parameters
                    read = ", ".join(filter(self._reads_from_optim_args, arguments)) or "nothing"
                    raise ValueError(
                        f"{name} would be ignored; of this optimizer's arguments, {read} can be set here. "
                        "weight_decay, adam_beta1, adam_beta2 and adam_epsilon are training arguments of their own"
                    )
            optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"optim {optim}, optim_args {given!r}: {error}") from error

    def _reads_from_optim_args(self, name: str) -> bool:
        """Whether a value of this name changes what the optimizer is made with, or is refused."""
        if name == "weight_decay":  # each of the trainer's groups of parameters has its own
            return False
        try:
            return self._optimizer_with(f"{name}=7") != self._optimizer_with("")
        except (AttributeError, ValueError):
            return True

    def _optimizer_with(self, optim_args: str) -> tuple[Any, dict[str, Any]]:
        """The class that `optim` stands for, and its options."""
        changed = copy.copy(self)
        changed.optim_args = optim_args
        return Trainer.get_optimizer_cls_and_kwargs(changed)
