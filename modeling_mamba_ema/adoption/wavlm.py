"""Microsoft's own WavLM checkpoints (`WavLM-Large.pt`, Base, Base+) as folders of transformers, to start training from.

The file holds `cfg`, a dict of settings, and `model`, the weights under the names of
https://github.com/microsoft/unilm/blob/master/wavlm/WavLM.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from .weights import load_pickle, with_present_weight_norm

# Their names to transformers', each applied to what the ones before have left.
_NAMES = {
    r"^mask_emb$": "masked_spec_embed",
    r"^layer_norm": "feature_projection.layer_norm",
    r"^post_extract_proj": "feature_projection.projection",
    r"^encoder\.pos_conv\.0": "encoder.pos_conv_embed.conv",
    r"(conv_layers\.\d+)\.0": r"\1.conv",
    r"(conv_layers\.\d+)\.2(\.1)?": r"\1.layer_norm",  # .1: a layer norm stands between two transpositions
    r"self_attn_layer_norm": "layer_norm",
    r"self_attn": "attention",
    r"grep_linear": "gru_rel_pos_linear",
    r"grep_a": "gru_rel_pos_const",
    r"relative_attention_bias": "rel_attn_embed",
    r"\.fc1": ".feed_forward.intermediate_dense",
    r"\.fc2": ".feed_forward.output_dense",
}


def convert_wavlm(file: str | Path, output: str | Path) -> WavLMModel:
    """Write the encoder as a folder that `model.pretrained_speech_encoder` and `from_pretrained_speech_encoder` take.

    Raises:
        OSError: the file is damaged, or the output holds something.
        ValueError: it is no such checkpoint, or its weights do not fit its settings.
    """
    path, output = Path(file), Path(output)
    if not path.is_file():
        raise OSError(f"{path} is no file")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OSError(f"{output} exists and is not empty; name another folder")
    checkpoint = load_pickle(path)
    if not isinstance(checkpoint, dict) or not {"cfg", "model"} <= checkpoint.keys():
        raise ValueError(f"{path.name} is no WavLM of Microsoft, which holds 'cfg' and 'model'")
    try:
        model = WavLMModel(_config(checkpoint["cfg"]))
        model.load_state_dict({_our_name(name): weight for name, weight in checkpoint["model"].items()})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path.name} is no WavLM of Microsoft: {error}") from error
    model.save_pretrained(output)
    Wav2Vec2FeatureExtractor(do_normalize=bool(checkpoint["cfg"]["normalize"])).save_pretrained(output)
    return model.eval()


def _config(cfg: Mapping[str, Any]) -> WavLMConfig:
    # As in "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    layers = re.findall(r"\((\d+), *(\d+), *(\d+)\)\](?: *\* *(\d+))?", cfg["conv_feature_layers"])
    sizes = [tuple(map(int, size)) for *size, times in layers for _ in range(int(times or 1))]
    conv_dim, conv_kernel, conv_stride = map(list, zip(*sizes))
    return WavLMConfig(
        hidden_size=cfg["encoder_embed_dim"],
        num_hidden_layers=cfg["encoder_layers"],
        num_attention_heads=cfg["encoder_attention_heads"],
        intermediate_size=cfg["encoder_ffn_embed_dim"],
        hidden_act=cfg["activation_fn"],
        feat_extract_norm="group" if cfg["extractor_mode"] == "default" else "layer",
        do_stable_layer_norm=cfg["layer_norm_first"],
        conv_dim=conv_dim,
        conv_kernel=conv_kernel,
        conv_stride=conv_stride,
        conv_bias=cfg["conv_bias"],
        num_conv_pos_embeddings=cfg["conv_pos"],
        num_conv_pos_embedding_groups=cfg["conv_pos_groups"],
        num_buckets=cfg["num_buckets"],
        max_bucket_distance=cfg["max_distance"],
    )


def _our_name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = re.sub(theirs, ours, name)
    return with_present_weight_norm(name)
