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
from tests.integrations.training import Logged, StepTruth, digits, network, scalars_of, snapshot

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


class Gan(lightning.LightningModule):
    """A generator and a discriminator; each backward leaves stale gradients in the other."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gen, self.disc = nn.Linear(4, 64), nn.Linear(64, 2)
        self.snapshots = {}

    def training_step(self, batch, number):
        for_gen, for_disc = self.optimizers()
        images, noise = batch[0], torch.randn(len(batch[0]), 4)
        for_disc.zero_grad()
        fake = self.disc(self.gen(noise).detach())
        real = self.disc(images)
        self.manual_backward((nn.functional.softplus(fake) + nn.functional.softplus(-real)).mean())
        for_disc.step()
        for_gen.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.disc(self.gen(noise))).mean())
        for_gen.step()

    def configure_optimizers(self):
        optimizers = [
            torch.optim.AdamW(self.gen.parameters(), lr=0.01),
            torch.optim.SGD(self.disc.parameters(), lr=0.1, momentum=0.9),
        ]
        self.truth = StepTruth(self, *optimizers)
        return optimizers

    def on_before_optimizer_step(self, optimizer):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        copies = snapshot(self)
        kept = self.snapshots.setdefault(self.trainer.global_step // 2 * 2, copies)
        kept |= {name: copies[name] for name, p in self.named_parameters() if id(p) in own}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("optimizer", [False, True])
def test_each_optimizer_of_a_gan_is_read_at_its_own_step(backend, tmp_path, optimizer, mixed):
    module, logged = Gan(), Logged()
    plugins = [mixed_precision(growth_interval=2)] if mixed else []
    callback = ParamStatsCallback(every=4, log=logged, optimizer=optimizer)
    trainer = fit(module, tmp_path, callback, batches=5, plugins=plugins)
    assert trainer.global_step == 10
    if optimizer:
        module.truth.check(logged, {0: 0, 4: 2, 8: 4})
    else:
        logged.check({step: module.snapshots[step] for step in (0, 4, 8)})


class Stepping(Module):
    """Has the truth of its steps. Its loss is infinite when `global_step` is in `overflows`."""

    def __init__(self, *arguments, overflows=(), **options):
        super().__init__(*arguments, **options)
        self.overflows = overflows

    def training_step(self, batch, number):
        loss = super().training_step(batch, number)
        return loss * float("inf") if self.trainer.global_step in self.overflows else loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.truth = StepTruth(self, optimizer)
        return optimizer


@pytest.mark.parametrize("mixed", [False, True])
def test_state_and_updates_are_logged_after_clipping(backend, tmp_path, mixed):
    """Lightning calls backward in a closure inside the optimizer's step."""
    module, logged = Stepping(momentum=0.9), Logged()
    plugins = [mixed_precision(growth_interval=2)] if mixed else []
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "plugins": plugins}
    callback = ParamStatsCallback(every=2, log=logged, optimizer=True)
    fit(module, tmp_path, callback, **options)
    module.truth.check(logged, {0: 0, 2: 2})
    assert callback.watcher.summary.total.grad.norm == pytest.approx(1e-3, rel=1e-3)
    assert logged[2]["update_norm/total"] == callback.watcher.summary.total.update.norm


@pytest.mark.parametrize("options", [{"make": torch.optim.Adam, "fused": True}, {}])
def test_steps_that_the_scaler_skips_are_not_logged(backend, tmp_path, options):
    """A fused optimizer unscales and skips in its own kernel, so its hooks run all the same."""
    module, logged = Stepping(overflows=(0, 3, 5), **options), Logged()
    callback = ParamStatsCallback(every=3, log=logged, optimizer=True)
    fit(module, tmp_path, callback, plugins=[mixed_precision()])
    numbers = {1: 1, 4: 4, 6: 6}
    if not options:  # the hooks did not see steps 0, 3 and 5
        numbers = {1: 0, 4: 2, 6: 3}
    module.truth.check(logged, numbers)


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


def test_an_optimizer_instead_of_a_bool_is_refused():
    with pytest.raises(TypeError, match="expected True or False for optimizer, got SGD"):
        ParamStatsCallback(optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1))
