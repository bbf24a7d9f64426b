"""The benchmark of LoRA, on a tiny model."""

import argparse
import importlib

import torch

from tests.support.models import TINY_ENCODER


def test_every_step_trains_and_lora_trains_less(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    bench_lora = importlib.import_module("bench_lora")
    wavlm_config = bench_lora.wavlm_config
    monkeypatch.setattr(bench_lora, "wavlm_config", lambda size: wavlm_config(size, **TINY_ENCODER))
    monkeypatch.setattr(bench_lora, "lengths_in_seconds", lambda count: [0.4, 0.6])
    optimizers = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: optimizers.append(self) or step(self, *a))
    arguments = argparse.Namespace(size="base", layers=1, utterances=2, device="cpu")
    trained = {}
    for name in bench_lora.VARIANTS:
        run, trained[name] = bench_lora.step_of(name, arguments)
        run()
        moments = [s["exp_avg"].abs().sum() for s in optimizers[-1].state.values()]
        assert len(moments) == len(optimizers[-1].param_groups[0]["params"]), name
    of_peft, full, lora, *checkpointed = trained.values()
    assert of_peft < lora < full
    assert checkpointed == [full, lora]
