"""Microsoft's own WavLM checkpoints: the encoder that transformers' conversion of the same weights gives."""

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from modeling_mamba_ema import MambaEMAForRegression
from modeling_mamba_ema.adoption import convert_wavlm
from tests.support.models import TINY_ENCODER
from tests.support.programs import call_command, call_program
from tests.support.tiny_corpus import write_run

# Transformers' names and Microsoft's, by https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/
# models/wavlm/convert_wavlm_original_pytorch_checkpoint_to_pytorch.py, whose direction is the other one.
OUTSIDE = {
    "masked_spec_embed": "mask_emb",
    "feature_projection.layer_norm": "layer_norm",
    "feature_projection.projection": "post_extract_proj",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
    "encoder.pos_conv_embed.conv.bias": "encoder.pos_conv.0.bias",
    "encoder.layer_norm": "encoder.layer_norm",
}
IN_A_LAYER = {
    **{f"attention.{which}_proj": f"self_attn.{which}_proj" for which in ("k", "v", "q", "out")},
    "attention.gru_rel_pos_linear": "self_attn.grep_linear",
    "attention.rel_attn_embed": "self_attn.relative_attention_bias",
    "attention.gru_rel_pos_const": "self_attn.grep_a",
    "layer_norm": "self_attn_layer_norm",
    "feed_forward.intermediate_dense": "fc1",
    "feed_forward.output_dense": "fc2",
    "final_layer_norm": "final_layer_norm",
}


def microsofts_name(name, norm):
    if name.startswith("feature_extractor"):
        layer_norm = ".2." if norm == "group" else ".2.1."
        return name.replace(".conv.", ".0.").replace(".layer_norm.", layer_norm)
    names, start = OUTSIDE, ""
    if name.startswith("encoder.layers."):
        names, start = IN_A_LAYER, ".".join(name.split(".")[:3]) + "."
    for theirs, ours in names.items():
        if name.startswith(start + theirs):
            return start + ours + name[len(start + theirs) :]
    raise AssertionError(name)


@pytest.fixture(params=["group", "layer"])
def checkpoint(request, tmp_path):
    """A small WavLM of transformers, and Microsoft's file of the same weights: of Base's kind and of Large's."""
    torch.manual_seed(0)
    norm = request.param
    config = WavLMConfig(**TINY_ENCODER, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    model = WavLMModel(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    cfg = {
        "extractor_mode": "default" if norm == "group" else "layer_norm",
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 64,
        "encoder_attention_heads": 2,
        "activation_fn": "gelu",
        "layer_norm_first": norm == "layer",
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "conv_bias": False,
        "normalize": norm == "layer",
        "conv_pos": 16,
        "conv_pos_groups": 2,
        "num_buckets": 320,
        "max_distance": 800,
        "dropout": 0.0,
    }
    weights = {microsofts_name(name, norm): weight for name, weight in model.state_dict().items()}
    torch.save({"cfg": cfg, "model": weights}, tmp_path / "WavLM-Large.pt")
    return model, tmp_path / "WavLM-Large.pt"


def test_the_converted_encoder_gives_transformers_frames_and_starts_a_training(checkpoint, tmp_path, corpus, capsys):
    model, file = checkpoint
    assert call_command("adopt", file, tmp_path / "wavlm") == 0
    assert "model.pretrained_speech_encoder=" in capsys.readouterr().out
    waveform = torch.randn(1, 8_000)
    again = WavLMModel.from_pretrained(tmp_path / "wavlm").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(waveform)[0], model(waveform)[0], rtol=0, atol=0)
    ours = MambaEMAForRegression.from_pretrained_speech_encoder(tmp_path / "wavlm")
    assert ours.config.do_normalize is (model.config.feat_extract_norm == "layer")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ours.speech_encoder.backbone.state_dict()[name], weight, rtol=0, atol=0)


def test_files_that_are_none_are_refused_and_the_file_itself_names_the_way(tmp_path, corpus, capsys):
    torch.save({"model": {}}, tmp_path / "WavLM-Base.pt")
    with pytest.raises(ValueError, match="WavLM-Base.pt is no WavLM of Microsoft, which holds 'cfg' and 'model'"):
        convert_wavlm(tmp_path / "WavLM-Base.pt", tmp_path / "out")
    torch.save({"model": {}, "cfg": {"conv_feature_layers": "[(16,10,5)]"}}, tmp_path / "WavLM-Base.pt")
    with pytest.raises(ValueError, match="is no WavLM of Microsoft: 'encoder_embed_dim'"):
        convert_wavlm(tmp_path / "WavLM-Base.pt", tmp_path / "out")
    (tmp_path / "WavLM-Base+.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(OSError, match="is damaged"):
        convert_wavlm(tmp_path / "WavLM-Base+.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = write_run(tmp_path / "run.yaml", corpus, tmp_path / "run")
    option = f"model.pretrained_speech_encoder={tmp_path / 'WavLM-Base.pt'}"
    assert call_program("examples/run_finetune.py", run, option) == 1
    assert "becomes one by `mamba-ema adopt" in capsys.readouterr().err
