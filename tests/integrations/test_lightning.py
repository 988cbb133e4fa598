"""Lightning: the callback logs the gradients that the module's own hooks see before clipping."""

from __future__ import annotations

import csv
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramstats
from tests.integrations.training import Logged, digits, network, scalars_of, snapshot

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
integration = importlib.import_module("paramstats.integrations.lightning")
ParamStatsCallback = integration.ParamStatsCallback


class Module(lightning.LightningModule):
    """Keeps snapshots of its parameters and gradients from before clipping, at even steps."""

    def __init__(self, make=torch.optim.SGD, scale: float = 1.0, **options) -> None:
        super().__init__()
        self.net = network()
        self.make, self.options, self.scale = make, options, scale
        self.snapshots = {}

    def training_step(self, batch, number):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=0.1, **self.options)

    def on_before_optimizer_step(self, optimizer):
        step = self.trainer.global_step
        if step % 2 == 0 and step not in self.snapshots:
            self.snapshots[step] = snapshot(self, self.scale)


def fit(module, tmp_path, *callbacks, logger=False, batches=8, **options):
    warnings.simplefilter("ignore")  # Lightning warns about the number of workers
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=batches, accelerator="cpu", devices=1, logger=logger,
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=32))
    return trainer


def mixed_precision(growth_interval: int = 2000):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth_interval)
    return lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("mixed", [False, True])
def test_accumulated_gradients_are_logged_before_clipping(backend, tmp_path, mixed):
    module, logged = Module(), Logged()
    plugins = [mixed_precision(growth_interval=2)] if mixed else []
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "plugins": plugins}
    callback = ParamStatsCallback(every=2, log=logged)
    trainer = fit(module, tmp_path, callback, **options)
    assert trainer.global_step == 4
    assert list(module.snapshots) == [0, 2]
    logged.check(module.snapshots)
    assert callback.watcher.summary.scalars() == logged[2]
    assert all(paramstats.summarize(module.snapshots[s]).total.grad.norm > 0.1 for s in (0, 2))
    assert "param_norm/net.0.weight" in logged[0]


def test_gradients_of_an_optimizer_that_unscales_in_its_step_are_logged_unscaled(backend, tmp_path):
    module, logged = Module(torch.optim.Adam, scale=1024.0, fused=True), Logged()
    callback = ParamStatsCallback(every=2, log=logged)
    fit(module, tmp_path, callback, batches=4, plugins=[mixed_precision()])
    logged.check(module.snapshots)


def test_all_loggers_of_the_trainer_get_the_scalars_by_default(tmp_path):
    module = Module()
    loggers = [
        lightning.loggers.CSVLogger(tmp_path, name="csv"),
        lightning.loggers.TensorBoardLogger(tmp_path, name="tensorboard"),
    ]
    fit(module, tmp_path, ParamStatsCallback(every=2), logger=loggers, batches=6)
    expected = {s: paramstats.summarize(m).scalars() for s, m in module.snapshots.items()}
    with open(tmp_path / "csv" / "version_0" / "metrics.csv", newline="") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert {s: {k: float(v) for k, v in row.items()} for s, row in rows.items()} == expected

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload()
    for key in expected[0]:
        single = {s: torch.tensor(statistics[key]).item() for s, statistics in expected.items()}
        assert {e.step: e.value for e in events.Scalars(key)} == single


def test_manual_optimization_with_two_optimizers(tmp_path):
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
    logged.check({step: module.snapshots[step] for step in (0, 4, 8)})


def test_an_optimizer_with_several_evaluations_is_logged_once_per_step(tmp_path):
    module, logged = Module(torch.optim.LBFGS, max_iter=3), Logged()
    fit(module, tmp_path, ParamStatsCallback(every=1, log=logged), batches=3)
    assert list(logged) == [0, 1, 2]
    logged.pop(1)  # the module keeps snapshots of even steps only
    logged.check(module.snapshots)


def test_a_second_fit_starts_at_step_0(tmp_path):
    logged = []
    callback = ParamStatsCallback(every=2, log=lambda *arguments: logged.append(arguments))
    for _ in range(2):
        module = Module()
        module.net[0].weight.data.mul_(1 + len(logged))
        fit(module, tmp_path, callback, batches=3)
        assert [step for _, step in logged[-2:]] == [0, 2]
        assert logged[-1][0] == scalars_of(module.snapshots[2])
    assert len(logged) == 4


def test_a_history_needs_no_logger(tmp_path):
    kept = {}

    class History:
        append = staticmethod(kept.__setitem__)

    fit(Module(), tmp_path, ParamStatsCallback(every=2, history=History()), batches=3)
    assert list(kept) == [0, 2] and "net.0.weight" in kept[2]


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a logger, got Trainer\\(logger=False\\)"):
        fit(Module(), tmp_path, ParamStatsCallback())
    with pytest.raises(ValueError, match="whole number > 0 for every, got 0"):
        ParamStatsCallback(0)
    with pytest.raises(ValueError, match="got 'median'"):
        ParamStatsCallback(stats=("median",))
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        ParamStatsCallback(evry=3)


@pytest.mark.parametrize(
    ("hidden", "is_imported", "base"),
    [
        ("lightning.pytorch", True, "pytorch_lightning.callbacks"),
        ("lightning", False, "pytorch_lightning.callbacks"),
        ("pytorch_lightning", False, "lightning.pytorch.callbacks"),
    ],
)
def test_the_callback_is_for_the_lightning_that_is_used(monkeypatch, hidden, is_imported, base):
    """`lightning` and the older `pytorch_lightning` may both be installed."""
    older = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    boring = importlib.import_module("pytorch_lightning.demos.boring_classes")
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    if hidden == "lightning":  # not installed
        monkeypatch.setitem(sys.modules, "lightning", None)
    if not is_imported:
        monkeypatch.delitem(sys.modules, "pytorch_lightning")
    monkeypatch.delitem(sys.modules, "paramstats.integrations.lightning")
    module = importlib.import_module("paramstats.integrations.lightning")
    assert module.ParamStatsCallback.__mro__[1].__module__.startswith(base)
    if is_imported:
        steps = []
        callback = module.ParamStatsCallback(every=1, log=lambda _, step: steps.append(step))
        warnings.simplefilter("ignore")
        older.Trainer(
            fast_dev_run=2, callbacks=[callback], accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(boring.BoringModel())  # fmt: skip
        assert steps == [0, 1]


def test_without_lightning_the_import_names_what_to_install(monkeypatch):
    for module in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.delitem(sys.modules, "paramstats.integrations.lightning")
    message = r"ParamStatsCallback needs lightning: pip install lightning"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("paramstats.integrations.lightning")
