"""Optimizer state by parameter, in summaries of all kinds of parameters."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn, optim

import paramstats
from tests import oracle
from tests.test_optimizer import check_update, doubled, rms, set_gradients, watched

NAN, INF = math.nan, math.inf


def sgd(params) -> optim.SGD:
    return optim.SGD(params, lr=0.1, momentum=0.9)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=dtype))


OPTIMIZERS = [optim.AdamW, sgd]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: optim.AdamW(params, amsgrad=True),
        lambda params: optim.AdamW(params, fused=True),
        sgd,
        optim.Adagrad,
        lambda params: optim.RMSprop(params, centered=True, momentum=0.5),
        optim.NAdam,
        optim.Adafactor,
        optim.Adadelta,
        optim.ASGD,
        optim.Rprop,
    ],
)
def test_every_tensor_and_number_of_the_state_is_read(backend, make):
    torch.manual_seed(0)
    params = {"a": parameter(30, 20), "b": parameter(7, dtype=torch.float64)}
    optimizer = make(params.values())
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    summary = paramstats.summarize(params, optimizer=optimizer)
    for name, p in params.items():
        state = summary[name].optimizer.state
        assert state.keys() == {k for k, v in optimizer.state[p].items() if v is not None}
        for key, stats in state.items():
            oracle.check(stats, torch.as_tensor(optimizer.state[p][key]))
        if "step" in state:
            assert summary[name].optimizer.step == 2
        oracle.check(summary[name], p)
        oracle.check(summary[name].grad, p.grad)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_groups_tied_frozen_and_unused_parameters(backend, make):
    torch.manual_seed(0)
    names = ("tied", "again", "frozen", "unused", "elsewhere", "used")
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in names})
    model["again"].weight = model["tied"].weight
    model["frozen"].weight.requires_grad_(False)
    others = [model[name].weight for name in ("frozen", "unused", "used")]
    groups = [
        {"params": [model["tied"].weight], "lr": 0.5, "weight_decay": 0.25, "name": "tied"},
        {"params": others, "lr": torch.tensor(0.125)},
    ]
    optimizer = make(groups)
    watcher = watched(model, optimizer)
    before = doubled(dict(model.named_parameters()))
    x = torch.randn(4, 3)
    for name in ("tied", "again", "used", "elsewhere"):
        x = model[name](x)
    x.square().sum().backward()
    optimizer.step()
    summary = watcher.summary
    assert set(summary) == {f"{name}.weight" for name in names} - {"again.weight"}
    for name, p in model.named_parameters():
        entry, dw = summary[name], p.detach().double() - before[name]
        if name == "elsewhere.weight":
            assert entry.update is None and entry.optimizer is None and entry.grad is not None
            assert math.isnan(entry.update_ratio)
            continue
        check_update(entry.update, dw, 1e-7)
        assert entry.update.zero_count == int((dw == 0).sum())
        lr, decay = (0.5, 0.25) if name == "tied.weight" else (0.125, make is not sgd and 0.01)
        assert (entry.optimizer.lr, entry.optimizer.weight_decay) == (lr, decay)
        if name in ("frozen.weight", "unused.weight"):
            method = "copy" if make is sgd and name == "unused.weight" else "no gradient"
            assert entry.optimizer.update_method == method
            assert entry.update.norm == 0 and not entry.optimizer.state and entry.grad is None
    numbers = summary["tied.weight"].optimizer.hyperparameters
    expected = {"beta1": 0.9, "beta2": 0.999} if make is optim.AdamW else {"momentum": 0.9}
    assert expected.items() <= numbers.items() and "name" not in numbers


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_views_and_tables_of_summaries_have_the_optimizer(backend, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
    optimizer = make(model.parameters())
    watcher = watched(model, optimizer)
    before = doubled(dict(model.named_parameters()))
    set_gradients(dict(model.named_parameters()))
    optimizer.step()
    summary = watcher.summary
    for other in (pickle.loads(pickle.dumps(summary)), copy.deepcopy(summary)):
        assert other == summary
    entry = summary["0.0.weight"]
    filtered = summary.filter(include=r"^0\.0")
    assert set(filtered) == {"0.0.weight", "0.0.bias"} and filtered["0.0.weight"] == entry
    assert entry != paramstats.summarize(model)["0.0.weight"]
    assert entry.to_dict()["update"] == entry.update.to_dict()
    assert entry.to_dict()["optimizer"]["hyperparameters"] == dict(entry.optimizer.hyperparameters)

    params = dict(model.named_parameters())
    for prefix, stats in {
        "0.0": filtered.total,
        "0": summary.filter(include=r"^0\.").total,
        "": summary.total,
    }.items():
        names = [name for name in params if name.startswith(prefix)]
        w, g, dw, m = (
            torch.cat([x.flatten() for x in tensors])
            for tensors in (
                [params[name].detach().double() for name in names],
                [params[name].grad.double() for name in names],
                [params[name].detach().double() - before[name] for name in names],
                [
                    optimizer.state[params[name]][entry.optimizer.momentum].double()
                    for name in names
                ],
            )
        )
        check_update(stats.update, dw, 1e-7)
        assert stats.update_ratio == pytest.approx((dw.norm() / w.norm()).item(), rel=1e-5)
        for key, a, b in (("update", dw, g), (entry.optimizer.momentum, m, g)):
            expected = (a @ b / a.norm() / b.norm()).item()
            assert stats.optimizer.cosine("grad", key) == pytest.approx(expected, abs=1e-5)
    scalars = summary.scalars(stats=("norm", "rms"), depth=1)
    for prefix in ("0", "1"):
        total = summary.filter(include=rf"^{prefix}\.").total
        assert scalars[f"update_norm/{prefix}"] == pytest.approx(total.update.norm, rel=1e-12)
        assert scalars[f"update_ratio/{prefix}"] == pytest.approx(total.update_ratio, rel=1e-12)
        if make is optim.AdamW:
            expected = total.optimizer.rms
            assert scalars[f"optimizer_rms/{prefix}"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_layouts_in_memory(backend, make):
    """Empty tensors, numbers, transposed ones, channels last, and tensors with gaps."""
    torch.manual_seed(0)
    params = {
        "empty": parameter(0, 3),
        "number": parameter(),
        "transposed": nn.Parameter(torch.randn(4, 5).t()),
        "channels last": nn.Parameter(
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        ),
        "gaps": nn.Parameter(torch.randn(6, 6)[:, ::2]),
        "other gradient": parameter(5, 4),
    }
    optimizer = make(params.values())
    watcher = watched(params, optimizer)
    before = doubled(params)
    for p in params.values():
        p.grad = torch.randn_like(p)
    params["other gradient"].grad = torch.randn(4, 5).t()
    optimizer.step()
    for name, p in params.items():
        entry, dw = watcher.summary[name], p.detach().double() - before[name]
        if name == "empty":  # whose state is not read, so that the formula has no operands
            assert entry.update is None or entry.update.count == 0
            assert math.isnan(entry.optimizer.cosine("update", "grad"))
            continue
        check_update(entry.update, dw, 4e-7)
        products = dw.flatten() @ p.grad.double().flatten() / dw.norm() / p.grad.double().norm()
        assert entry.optimizer.cosine("update", "grad") == pytest.approx(products.item(), abs=1e-4)
    assert not watcher.summary.skipped


def test_lazy_parameters_are_read_once_they_have_a_shape(backend):
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = optim.AdamW(model.parameters())
    watcher = watched(model, optimizer)
    assert paramstats.summarize(model, optimizer=optimizer)["0.weight"].update is None
    model(torch.randn(2, 4)).sum().backward()
    before = doubled(dict(model.named_parameters()))
    optimizer.step()
    for name, p in model.named_parameters():
        check_update(watcher.summary[name].update, p.detach().double() - before[name], 1e-7)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_updates_of_complex_parameters_are_nan_with_a_reason(backend, new_warnings, make):
    torch.manual_seed(0)
    params = {"real": parameter(3), "complex": parameter(5, dtype=torch.complex64)}
    optimizer = make(params.values())
    watcher = watched(params, optimizer)
    (params["complex"].abs().sum() + params["real"].sum()).backward()
    with pytest.warns(RuntimeWarning, match=r"'complex \(update\)' could not be read"):
        optimizer.step()
    summary = watcher.summary
    assert summary.skipped.keys() == {"complex (update)"}
    entry = summary["complex"]
    assert math.isnan(entry.update.norm) and math.isnan(entry.update_ratio)
    assert math.isnan(entry.optimizer.cosine("update", "grad"))
    assert entry.optimizer.update_method is None
    key = entry.optimizer.momentum
    oracle.check(entry.optimizer.state[key], optimizer.state[params["complex"]][key])
    assert summary["real"].update.count == 3


@pytest.mark.parametrize(
    "make",
    [
        optim.SparseAdam,
        optim.Adagrad,
        lambda params: optim.SGD(params, lr=0.1, momentum=0.5),
    ],
)
def test_sparse_gradients(backend, make):
    torch.manual_seed(0)
    model = nn.Embedding(10, 3, sparse=True)
    optimizer = make(model.parameters())
    watcher = watched(model, optimizer)
    for rows in ([1, 3, 3], [1, 4]):
        before = model.weight.detach().clone().double()
        optimizer.zero_grad()
        (torch.arange(3) * model(torch.tensor(rows))).sum().backward()
        optimizer.step()
        entry = watcher.summary["weight"]
        dw, g = model.weight.detach().double() - before, model.weight.grad.to_dense().double()
        check_update(entry.update, dw)
        assert entry.update.zero_count == int((dw == 0).sum())
        expected = ((dw * g).sum() / dw.norm() / g.norm()).item()
        assert entry.optimizer.cosine("update", "grad") == pytest.approx(expected, abs=1e-6)
        assert not watcher.summary.skipped
    if make is optim.SparseAdam:  # its step is a number
        state = optimizer.state[model.weight]
        root = (state["exp_avg_sq"].double() / (1 - 0.999 ** state["step"])).sqrt()
        lag = rms(g / root.clamp(min=1e-8))
        assert entry.optimizer.rms == pytest.approx(lag, rel=1e-6)
        assert entry.optimizer.eps_fraction == (root < 1e-8).double().mean().item()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_nan_and_infinite_gradients(backend, make):
    p = nn.Parameter(torch.ones(6))
    optimizer = make([p])
    watcher = watched({"p": p}, optimizer)
    p.grad = torch.tensor([NAN, INF, -INF, 1.0, 2.0, 0.0])
    optimizer.step()
    entry = watcher.summary["p"]
    dw = p.detach().double() - 1
    assert entry.update.nonfinite_count == int((~dw.isfinite()).sum())
    assert entry.update.finite.count == int(dw.isfinite().sum())
    check_update(entry.update.finite, dw[dw.isfinite()], 1e-7)
    for value in (entry.update.norm, entry.update_ratio, entry.optimizer.cosine("update", "grad")):
        assert math.isnan(value)
    assert math.isnan(entry.optimizer.cosine("grad", entry.optimizer.momentum))
    assert math.isnan(entry.optimizer.rms)


def test_values_of_8_bit_codes(backend):
    """bitsandbytes stores codes, a table of 256 values, and a factor per block of 256."""
    torch.manual_seed(0)
    p, table, scales = parameter(20, 35), torch.linspace(-1, 1, 256), torch.rand(3)
    codes = torch.randint(256, p.shape, dtype=torch.uint8)
    optimizer = optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"step": 3, "state1": codes, "qmap1": table, "absmax1": scales}
    entry = paramstats.summarize({"p": p}, optimizer=optimizer)["p"]
    values = table[codes.long()].flatten() * torch.cat([s.expand(256) for s in scales])[:700]
    assert entry.optimizer.state.keys() == {"step", "state1"} and entry.optimizer.step == 3
    oracle.check(entry.optimizer.state["state1"], values)


class Packed(torch.Tensor):
    """A tensor of 8-bit codes with the interface of torchao's optimizer states."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        if self.scale is None:
            raise NotImplementedError("not these")
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_states_of_subclasses_are_dequantized_or_have_a_reason(backend, new_warnings):
    torch.manual_seed(0)
    p = parameter(4, 5)
    p.grad = torch.randn_like(p)
    codes = torch.randint(-100, 100, p.shape, dtype=torch.int8)
    optimizer = optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"exp_avg": Packed(codes, 0.5), "other": Packed(codes, None)}
    with pytest.warns(RuntimeWarning, match=r"'p \(other\)' could not be read"):
        summary = paramstats.summarize({"p": p}, optimizer=optimizer)
    assert summary.skipped.keys() == {"p (other)"}
    entry, values = summary["p"], 0.5 * codes.double()
    oracle.check(entry.optimizer.state["exp_avg"], values)
    assert math.isnan(entry.optimizer.state["other"].norm)
    expected = (values * p.grad).sum() / values.norm() / p.grad.double().norm()
    assert entry.optimizer.cosine("exp_avg", "grad") == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"expected 'update' and 'grad'.*got 'grad' and 'other'"):
        entry.optimizer.cosine("grad", "other")
