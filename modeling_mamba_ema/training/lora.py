"""LoRA (Hu et al. 2021) in the speech encoder, by peft; everything after the encoder is trained in full.

peft puts its layers into the encoder and nothing around the model, which stays a `MambaEMAForRegression`. What is
trained is saved in checkpoints, the frozen weights are not: `config.lora` says where they come from, and their hash.
Such a folder is no model that can be loaded until [`merge_lora`] has added the adapters to the weights.
"""

import difflib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ..configuration_mamba_ema import MambaEMAConfig
from ..modeling_mamba_ema import MambaEMAForRegression, has_adapters, pretrained_backbone
from ..publishing.checksums import weights_sha256

# Names for what LoRA goes into; WavLM, wav2vec 2.0 and HuBERT call these layers alike.
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "feed_forward": ["intermediate_dense", "output_dense"],
}
# Feng and Narayanan 2023, "PEFT-SER" (arXiv:2306.05350), found LoRA of rank 16 in both layers of the feed-forward part
# the best of the efficient ways to fine-tune WavLM and wav2vec 2.0 for emotion. HuBERT has wav2vec 2.0's layers.
_PEFT_SER = {"r": 16, "lora_alpha": 32, "target_modules": "feed_forward"}
DEFAULTS = {"wavlm": _PEFT_SER, "wav2vec2": _PEFT_SER, "hubert": _PEFT_SER}
# Of peft's LoraConfig. Its other fields are for other models, change frozen weights, or train what is trained anyway.
FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "use_rslora", "use_dora")


def lora_fields() -> dict[str, Any]:
    """The annotations of what `training.lora` takes: [`FIELDS`] of peft's LoraConfig; `ImportError` without peft."""
    hints = typing.get_type_hints(_peft().LoraConfig)
    return {name: hints[name] for name in FIELDS}


def add_lora(model: MambaEMAForRegression, options: Mapping[str, Any], base: str | None, revision: str) -> None:
    """Freeze the speech encoder and put adapters into it, in place.

    Args:
        options: [`FIELDS`] of peft's LoraConfig, the others as in [`DEFAULTS`]. `target_modules` may name [`TARGETS`].
            `layers_to_transform` counts from 0; the default are all layers that the model reads.
        base, revision: folder or Hub name that the encoder's weights come from, and commit, tag or branch there.

    Raises:
        ImportError: peft is not installed.
        ValueError: an encoder that is not trained or is to stay as it is, a model that has adapters, or options that
            are not allowed.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters already; merge_lora adds them to its weights")
    if base is None:
        raise ValueError(
            "training.lora adapts a speech encoder that is trained: name model.pretrained_speech_encoder or "
            "model.pretrained_model"
        )
    if model.config.freeze_speech_encoder:
        raise ValueError(
            "training.lora trains the speech encoder by adapters, but freeze_speech_encoder keeps it as it is; set "
            "model.params.freeze_speech_encoder=false"
        )
    options = _with_defaults(model, options)
    try:
        _peft().inject_adapter_in_model(_peft().LoraConfig(**options), model.speech_encoder.backbone)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training.lora: {error}") from error
    frozen = {name: parameter for name, parameter in model.named_parameters() if _is_of_base(name, parameter)}
    model._keys_to_ignore_on_save = set(frozen)
    digest = weights_sha256(frozen.items())
    model.config.lora = {"options": options, "base": base, "revision": revision, "base_sha256": digest}


def merge_lora(model: MambaEMAForRegression) -> None:
    """Add the adapters of [`add_lora`], or of transformers' `model.add_adapter`, to the weights, in place: an ordinary
    model with the same numbers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)  # refuses NaN
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for part in (model, model.speech_encoder.backbone):
        vars(part).pop("peft_config", None)
    vars(model.config).pop("lora", None)
    model._hf_peft_config_loaded = False
    model._keys_to_ignore_on_save = set()


def load_lora(folder: str | Path) -> MambaEMAForRegression:
    """The model of a checkpoint or an adapter's folder, with its adapters; `config.json` there names what the frozen
    weights come from.

    Raises:
        OSError: files are missing, or the Hub cannot be reached.
        ValueError: a folder without adapters, or frozen weights that are not those of the training.
    """
    folder = Path(folder)
    lora = _saved_lora(folder)
    if lora is None:
        raise ValueError(f"{folder} is no folder of a training with LoRA, so there is nothing to merge")
    config = MambaEMAConfig.from_pretrained(folder)
    del config.lora
    model = MambaEMAForRegression(config)
    backbone = pretrained_backbone(lora["base"], lora["revision"])
    model.speech_encoder.backbone.load_state_dict(backbone.state_dict())
    add_lora(model, lora["options"], lora["base"], lora["revision"])
    require_same_base(folder, model)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if wrong := sorted({*unexpected, *missing} - {*(model._keys_to_ignore_on_save or ())}):
        raise ValueError(f"{folder}: {len(wrong)} weights are missing or have no place, the first is {wrong[0]}")
    return model.eval()


def require_same_base(folder: Path, model: MambaEMAForRegression) -> None:
    """Raise `ValueError` for a checkpoint, or an adapter's folder, that was trained on other frozen weights than the
    model's, or where one of the two has no adapters."""
    saved, own = _saved_lora(folder), getattr(model.config, "lora", None)
    if (saved is None) != (own is None):
        raise ValueError(f"{'the model' if saved is None else folder} has LoRA adapters, the other of the two has none")
    if saved is not None and own is not None and saved["base_sha256"] != own["base_sha256"]:
        raise ValueError(
            f"the adapters in {folder} were trained on other weights than those of {own['base']}, revision "
            f"{own['revision']}, now"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("training.lora needs peft: pip install 'modeling-mamba-ema[train]'") from error
    return peft


def _saved_lora(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("lora") if path.is_file() else None


def _with_defaults(model: MambaEMAForRegression, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with names resolved and defaults filled in. Raises `ValueError` for no dict of [`FIELDS`], or a
    linear layer, or a layer of the encoder, that the model does not read."""
    if not isinstance(options, Mapping) or not options.keys() <= {*FIELDS}:
        raise ValueError(f"training.lora is {options!r}; allowed is a dict of {', '.join(FIELDS)}")
    backbone, read = model.speech_encoder.backbone, max(model.speech_encoder.layers)
    given = {name: value for name, value in options.items() if value is not None}
    options = {"layers_to_transform": list(range(read)), **DEFAULTS[backbone.config.model_type], **given}
    layers, targets = options["layers_to_transform"], options["target_modules"]
    layers = [layers] if isinstance(layers, int) else layers
    if not layers or not all(0 <= layer < read for layer in layers):
        raise ValueError(
            f"training.lora.layers_to_transform is {layers}, but the model reads {read} layers of the encoder, counted "
            "from 0; name some of these, or other speech_encoder_layers"
        )
    names = [targets] if isinstance(targets, str) else targets
    targets = [layer for name in names for layer in TARGETS.get(name, [name])]
    modules = backbone.encoder.layers.named_modules()
    known = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    if unknown := [target for target in targets if target not in known]:
        close = difflib.get_close_matches(unknown[0], known | TARGETS.keys(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known | TARGETS.keys()))}"
        raise ValueError(
            f"training.lora.target_modules names {unknown[0]}, which is no linear layer of the encoder; {hint}"
        )
    return {**options, "target_modules": targets}


def _is_of_base(name: str, parameter: nn.Parameter) -> bool:
    # A published encoder may lack the embedding of masked frames, which is random then, and so belongs to the run.
    return not parameter.requires_grad and not name.endswith("masked_spec_embed")
