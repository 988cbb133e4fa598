"""Lightning: what its Trainer has logged is what its own hooks saw before clipping."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramstats
from tests.integrations.moments import Logged, digits, moment, network, scalars_of

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
integration = importlib.import_module("paramstats.integrations.lightning")
ParamStatsCallback = integration.ParamStatsCallback


class Module(lightning.LightningModule):
    """Digits; keeps copies of its gradients as they are before they are clipped."""

    def __init__(self, make=torch.optim.SGD, scale: float = 1.0, **options) -> None:
        super().__init__()
        self.net = network()
        self.make, self.options, self.scale = make, options, scale
        self.moments = {}

    def training_step(self, batch, number):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=0.1, **self.options)

    def on_before_optimizer_step(self, optimizer):
        step = self.trainer.global_step
        if step % 2 == 0 and step not in self.moments:
            self.moments[step] = moment(self, self.scale)


def fit(module, tmp_path, *callbacks, logger=False, batches=8, **options):
    warnings.simplefilter("ignore")  # Lightning's, about workers and the like
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=batches, accelerator="cpu", devices=1, logger=logger,
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=32))
    return trainer


def scaled(init_scale: float = 1024.0):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    return lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("mixed", [False, True])
def test_accumulated_and_clipped(backend, tmp_path, mixed):
    module, logged = Module(), Logged()
    plugins = [scaled()] if mixed else []
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "plugins": plugins}
    callback = ParamStatsCallback(every=2, log=logged)
    trainer = fit(module, tmp_path, callback, **options)
    assert trainer.global_step == 4
    assert list(module.moments) == [0, 2]
    logged.check(module.moments)
    assert callback.watcher.summary.scalars() == logged[2]
    assert all(paramstats.summarize(module.moments[s]).total.grad.norm > 0.1 for s in (0, 2))
    assert "param_norm/net.0.weight" in logged[0]


def test_an_optimizer_that_unscales_while_it_steps(backend, tmp_path):
    module, logged = Module(torch.optim.Adam, scale=1024.0, fused=True), Logged()
    precision = lightning.plugins.MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)
    )
    fit(module, tmp_path, ParamStatsCallback(every=2, log=logged), batches=4, plugins=[precision])
    logged.check(module.moments)


def test_all_loggers_have_it_by_default(tmp_path):
    module = Module()
    loggers = [
        lightning.loggers.CSVLogger(tmp_path, name="csv"),
        lightning.loggers.TensorBoardLogger(tmp_path, name="tensorboard"),
    ]
    fit(module, tmp_path, ParamStatsCallback(every=2), logger=loggers, batches=6)
    expected = {s: paramstats.summarize(m).scalars() for s, m in module.moments.items()}
    with open(tmp_path / "csv" / "version_0" / "metrics.csv", newline="") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert {s: {k: float(v) for k, v in row.items()} for s, row in rows.items()} == expected

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload()
    for key in expected[0]:
        single = {s: torch.tensor(statistics[key]).item() for s, statistics in expected.items()}
        assert {e.step: e.value for e in events.Scalars(key)} == single


def test_manual_optimization_of_several(tmp_path):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, number):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, number))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.net[::2]]

    module, logged = Manual(), Logged()
    trainer = fit(module, tmp_path, ParamStatsCallback(every=4, log=logged), batches=5)
    assert trainer.global_step == 10
    logged.check({step: module.moments[step] for step in (0, 4, 8)})


def test_an_optimizer_that_evaluates_several_times(tmp_path):
    module, logged = Module(torch.optim.LBFGS, max_iter=3), Logged()
    fit(module, tmp_path, ParamStatsCallback(every=1, log=logged), batches=3)
    assert list(logged) == [0, 1, 2]
    logged.pop(1)  # the module keeps even ones
    logged.check(module.moments)


def test_a_second_fit_starts_again(tmp_path):
    logged = []
    callback = ParamStatsCallback(every=2, log=lambda *both: logged.append(both))
    for _ in range(2):
        module = Module()
        module.net[0].weight.data.mul_(1 + len(logged))
        fit(module, tmp_path, callback, batches=3)
        assert [step for _, step in logged[-2:]] == [0, 2]
        assert logged[-1][0] == scalars_of(module.moments[2])
    assert len(logged) == 4


def test_history_alone(tmp_path):
    kept = {}

    class History:
        append = staticmethod(kept.__setitem__)

    fit(Module(), tmp_path, ParamStatsCallback(every=2, history=History()), batches=3)
    assert list(kept) == [0, 2] and "net.0.weight" in kept[2]


def test_what_can_not_be(tmp_path):
    with pytest.raises(ValueError, match="expected a logger, got Trainer\\(logger=False\\)"):
        fit(Module(), tmp_path, ParamStatsCallback())
    with pytest.raises(ValueError, match="whole number > 0 for every, got 0"):
        ParamStatsCallback(0)
    with pytest.raises(ValueError, match="got 'median'"):
        ParamStatsCallback(stats=("median",))
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        ParamStatsCallback(evry=3)


USED = """
import sys
{prepare}
from paramstats.integrations.lightning import ParamStatsCallback
print(ParamStatsCallback.__mro__[1].__module__)
import pytorch_lightning.demos.boring_classes
trainer = pytorch_lightning.Trainer(
    fast_dev_run=2, callbacks=[ParamStatsCallback(every=1, log=lambda _, step: print(step))],
    accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(pytorch_lightning.demos.boring_classes.BoringModel())
"""


@pytest.mark.parametrize(
    ("prepare", "base"),
    [
        ("import pytorch_lightning", "pytorch_lightning.callbacks"),
        ("sys.modules['lightning'] = None", "pytorch_lightning.callbacks"),
        ("", "lightning.pytorch.callbacks"),
    ],
)
def test_either_lightning(prepare, base, tmp_path):
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    code = USED.format(prepare=prepare)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    lines = out.stdout.splitlines()
    assert lines[0].startswith(base) and lines[-2:] == ["0", "1"]


def test_without_lightning(monkeypatch):
    for module in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.delitem(sys.modules, "paramstats.integrations.lightning")
    message = r"ParamStatsCallback needs lightning: pip install lightning"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("paramstats.integrations.lightning")
