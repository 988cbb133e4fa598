"""Groups of tensors: model, optimizer and other, by the names of many kinds of checkpoints."""

from __future__ import annotations

import pytest
import torch

from paramstats.checkpoints import summarize_file
from paramstats.checkpoints._groups import assign_groups
from paramstats.checkpoints._stored_tensors import StoredTensor

KINDS = {"m": "model", "o": "optimizer", "x": "other"}


def test_state_of_a_generator_is_told_by_its_size(tmp_path):
    state = torch.Generator().get_state()
    torch.save({"w": torch.ones(2), "gen": state}, tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    assert summary.file.groups == {"w": "model", "gen": "other"} and summary.total.count == 2


CHECKPOINTS = {
    "plain": "m:layers.0.weight m:layers.0.bias x:bn.num_batches_tracked m:logit_scale",
    "plain, module of an unlucky name": "m:optimizer_head.weight m:optimizer.weight m:opt.bias "
    "m:state.0.weight m:optimizer_state_embedding.weight m:metrics.weight m:scaler.mean",
    "nested": "m:model.w o:optimizer.state.0.step o:optimizer.state.0.exp_avg x:epoch",
    "suffixes": "m:model_state_dict.w o:optimizer_state_dict.state.0.exp_avg x:loss "
    "x:scheduler_state_dict.base x:scaler_state_dict.scale",
    "optimizer alone": "o:state.0.step o:state.0.exp_avg o:state.1.square_avg o:state.2.custom",
    "optimizer by name": "o:state.layers.0.weight.exp_avg_sq o:optim.param_groups.w.lr",
    "a model called OPT": "m:opt.decoder.pos_embed m:opt.decoder.weight",
    "momentum": "m:net.w o:optimizer.state.0.momentum_buffer",
    "rng alone": "x:cpu:uint8 x:cuda:uint8 x:cuda.0:uint8",
    "accelerate": "x:random_state.0 x:torch_manual_seed:uint8 x:torch_cuda_manual_seed.0:uint8",
    "hugging face": "m:model.embed_tokens.weight m:lm_head.weight m:score.weight",
    "lightning": "m:state_dict.net.weight m:state_dict.metrics.tp o:optimizer_states.0.state.0.step"
    " x:lr_schedulers.0.best x:callbacks.EarlyStopping.best_score x:loops.fit_loop.x"
    " x:hyper_parameters.weight",
    "deepspeed": "m:module.w x:lr_scheduler.x o:optimizer.state.0.exp_avg",
    "deepspeed zero": "o:optimizer_state_dict.single_partition_of_fp32_groups.0 "
    "o:optimizer_state_dict.base_optimizer_state.state.0.exp_avg",
    "megatron": "m:model.language_model.w m:model0.w m:model1.w o:optimizer.optimizer.state.0.step "
    "o:optimizer.fp32_from_fp16_params.0.0 x:opt_param_scheduler.x "
    "x:rng_state.0.torch_rng_state:uint8 x:rng_state.0.cuda_rng_state:uint8",
    "megatron core": "m:decoder.layers.w o:optimizer.state.exp_avg.decoder.layers.weight "
    "o:optimizer.state.fp32_param.decoder.layers.weight x:rng_state/shard_0_1",
    "chained": "m:decoder.w o:chained_0.optimizer.state.fp32_param.decoder.weight",
    "distributed": "m:model.layers.0.weight o:optim.state.layers.0.weight.exp_avg "
    "o:optim.state.layers.0.weight.step x:train_dataloader.x x:lr_scheduler.x",
    "composer": "m:state.model.w o:state.optimizers.AdamW.state.w.step x:rng.0.torch:uint8",
    "fairseq": "m:model.w o:last_optimizer_state.state.0.exp_avg",
    "timm": "m:state_dict.w x:state_dict_ema.w o:optimizer.state.0.step x:amp_scaler.scale",
    "yolo": "m:model.0.conv.weight x:ema.0.conv.weight o:optimizer.state.0.momentum_buffer",
    "ema alone": "m:ema.0.weight m:ema.0.bias x:epoch o:optimizer.state.0.step",
    "ema": "m:model.0.weight x:model_ema.0.weight",
    "ema in the state_dict": "m:state_dict.model.w x:state_dict.model_ema.w m:state_dict.cond.w",
    "ema of something that is not there": "m:state_dict.vae.w:3,3 m:state_dict.model_ema.w:2,2",
    "ema of a codebook": "m:embedding m:ema_w m:quantize.ema_w",
    "gan": "m:generator.w m:discriminator.w o:optim_g.state.0.step o:d_optim.state.0.step",
    "gan, short": "m:g.w m:d.w x:g_ema.w o:g_optim.state.0.exp_avg",
    "gan, camel case": "m:netG.w m:netD.w o:optG.state.0.step o:optimizerD.state.0.sum",
    "optimizers of other names": "m:w o:sgd.state.0.step o:sgd.state.0.momentum_buffer "
    "m:sgd.weight o:a.adam.state.w.step o:a.adam.state.w.exp_avg m:a.state.0.step",
    "flax": "m:params.dense.kernel o:opt_state.0.mu.dense.kernel x:step",
}


def stored(name: str, *others: str, shape=(), dtype="float32", group="model") -> StoredTensor:
    return StoredTensor(name, shape, getattr(torch, dtype), (), aliases=others, group=group)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_groups_of_known_checkpoints(kind):
    tensors, expected = [], {}
    for word in CHECKPOINTS[kind].split():
        letter, name, *more = word.split(":")
        shape = tuple(map(int, more[0].split(","))) if more and more[0] != "uint8" else ()
        of_bytes = {"shape": (16,), "dtype": "uint8"}
        given = of_bytes if more == ["uint8"] else {"shape": shape}
        tensors.append(stored(name, **given))
        expected[name] = KINDS[letter]
    assert {t.name: t.group for t in assign_groups(tensors)} == expected


def test_a_tensor_is_of_the_model_if_one_of_its_names_is():
    tensors = [stored("ema.w", "model.w"), stored("ema.v"), stored("model.v")]
    assert [t.group for t in assign_groups(tensors)] == ["model", "other", "model"]


def test_a_group_that_a_reader_knows_is_kept():
    tensors = [stored("w_scale", group="other"), stored("w"), stored("exp_avg", group="other")]
    assert [t.group for t in assign_groups(tensors)] == ["other", "model", "other"]


def test_long_names_take_no_long_time():
    names = ["opt_" * 10**5, ".".join(["optimizer_x"] * 10**5), "ema_." * 10**5, "_" * 10**5]
    assert len(assign_groups([stored(name) for name in names])) == 4


def test_the_total_is_that_of_the_model(tmp_path):
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, 3.0)
    torch.nn.init.constant_(model.bias, 4.0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.full((1, 2), 1e6)).sum().backward()
    optimizer.step()
    torch.nn.init.constant_(model.weight, 3.0)
    torch.nn.init.constant_(model.bias, 4.0)
    content = {"rng": torch.get_rng_state(), "optimizer": optimizer.state_dict()}
    torch.save({**content, "model": model.state_dict()}, tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    assert list(summary)[:2] == ["model.weight", "model.bias"] and len(summary) == 9
    assert summary.total.count == 3 and summary.total.norm == pytest.approx((9 + 9 + 16) ** 0.5)
