"""Optimizer groups: every trainable parameter in one, with its rate and decay; no step on a bad gradient."""

import pytest
import torch

from modeling_mamba_ema.training.optimizer import check_parameter_groups, parameter_groups, require_finite_gradient
from tests.support.models import tiny_model
from tests.support.tiny_corpus import make_trainer


@pytest.mark.parametrize("pooling", ["mean", "attention", "multihead_attention", "attentive_statistics"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group_and_gets_a_gradient(tmp_path, train_split, pooling, frozen):
    model = tiny_model(
        speech_encoder_pooling=pooling,
        speech_encoder_layers=[1, 2],
        freeze_speech_encoder=frozen,
        ema_decay_learnable=True,
    )
    trainer = make_trainer(tmp_path, train_split, model)
    optimizer = trainer.create_optimizer()
    check_parameter_groups(model, optimizer.param_groups)
    batch = trainer.data_collator([train_split[i] for i in range(6)])
    trainer.compute_loss(model.train(), batch).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The last addend of a softmax over time is the same for all frames and cancels: its gradient is 0 but for rounding.
    assert [name for name in without if not name.endswith("attention.bias")] == []


def test_a_parameter_left_out_or_put_in_twice_is_named():
    model = tiny_model()
    groups = parameter_groups(model, 0.1, 1e-3, 1e-5)
    check_parameter_groups(model, groups)
    with pytest.raises(ValueError, match="not in exactly one optimizer group"):
        check_parameter_groups(model, groups[1:])
    with pytest.raises(ValueError, match="not in exactly one optimizer group"):
        check_parameter_groups(model, [*groups, groups[0]])


@pytest.mark.promise("C-07")
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipping", "no clipping"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, train_split, max_grad_norm):
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.speech_encoder.attention.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(ValueError, match="the gradient's norm is nan"):
        make_trainer(tmp_path, train_split, model, max_grad_norm=max_grad_norm).train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_in_half_precision_the_scaler_skips_a_gradient_that_is_not_finite(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    optimizer.register_step_pre_hook(lambda optimizer, *_: require_finite_gradient(optimizer, 1))
    scaler = torch.amp.GradScaler("cpu")
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, torch.ones(3)) == (factor == torch.inf)


def test_the_encoder_has_its_own_rate_and_a_log_d_and_dt_bias_do_not_decay():
    model = tiny_model(speech_encoder_layers=[0, 1], ema_decay_learnable=True)
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1e-3, encoder_learning_rate=1e-5)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates[id(model.speech_encoder.attention.weight)] == (1e-3, 0.1)
    assert rates[id(model.speech_encoder.backbone.encoder.layers[0].feed_forward.output_dense.weight)] == (1e-5, 0.1)
    mixer = model.mamba_ema.conversation_encoder.layers[0].mixer
    assert all(rates[id(p)] == (1e-3, 0.0) for p in (mixer.A_log, mixer.D, mixer.dt_bias))


def test_a_frozen_encoder_is_in_no_optimizer_group_and_a_model_without_anything_to_train_is_refused():
    model = tiny_model(freeze_speech_encoder=True)
    options = {"weight_decay": 0.0, "learning_rate": 1e-3, "encoder_learning_rate": 1e-3}
    grouped = {id(p) for group in parameter_groups(model, **options) for p in group["params"]}
    assert not grouped & {id(p) for p in model.speech_encoder.backbone.parameters()}
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), **options)
