"""`watch` logs the statistics of the right step, once each, and refuses wrong arguments early."""

from __future__ import annotations

import errno
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramstats
from tests.integrations.deferred import defer_summaries_of_watch
from tests.integrations.training import Logged, StepTruth, loss, network, scalars_of, snapshot


@pytest.fixture
def transfers(monkeypatch):
    return defer_summaries_of_watch(monkeypatch)


def test_a_plain_loop_logs_gradients_before_clipping(backend):
    model, logged, snapshots = network(), Logged(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = paramstats.watch(model, every=3, log=logged)
    assert watcher.summary is None
    for step in range(8):
        optimizer.zero_grad()
        loss(model, step).backward()
        if step % 3 == 0:
            snapshots[step] = snapshot(model)
        watcher.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert list(snapshots) == [0, 3, 6]
    logged.check(snapshots)
    assert watcher.summary.scalars() == logged[6]


# ---- gradient scalers ----------------------------------------------------------------------------


@pytest.mark.parametrize("as_number", [True, False])
def test_scaled_and_accumulated_gradients_are_logged_unscaled(backend, as_number):
    model, logged, snapshots = network(), Logged(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    watcher = paramstats.watch(model, logged, every=2)
    scales = set()
    for step in range(6):
        for part in range(2):
            scaler.scale(loss(model, 2 * step + part) / 2).backward()
        scales.add(scaler.get_scale())
        if step % 2 == 0:
            snapshots[step] = snapshot(model, scaler.get_scale())
        watcher.step(grad_scale=scaler.get_scale() if as_number else scaler)
        scaler.unscale_(optimizer)
        if step in snapshots:  # torch unscales to the same values
            for name, p in model.named_parameters():
                assert torch.equal(p.grad, snapshots[step][name].grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(scales) > 1, "the scale did not change"
    logged.check(snapshots)


def test_the_scaler_is_asked_on_due_steps_only(model):
    calls = []

    class Scaler:
        def get_scale(self) -> float:
            calls.append(1)
            return 2.0

    watcher = paramstats.watch(model, Logged(), every=4)
    for _ in range(8):
        watcher.step(grad_scale=Scaler())
    assert len(calls) == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_that_has_unscaled_is_refused(enabled):
    model, logged = network(), Logged()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    watcher = paramstats.watch(model, logged, every=1)
    scaler.scale(loss(model, 0)).backward()
    assert paramstats.summarize(model, grad_scale=scaler) == paramstats.summarize(
        model, grad_scale=scaler.get_scale()
    )
    scaler.unscale_(optimizer)
    if not enabled:
        watcher.step(grad_scale=scaler)
        assert logged[0] == scalars_of(snapshot(model))
        return
    for then in (lambda: scaler.step(optimizer), scaler.update):
        with pytest.raises(ValueError, match=r"^paramstats: expected .* before scaler\.uns"):
            watcher.step(grad_scale=scaler)
        with pytest.raises(ValueError, match=r"before scaler\.unscale_"):
            paramstats.summarize(model, grad_scale=scaler)
        then()
    optimizer.zero_grad()
    scaler.scale(loss(model, 0)).backward()
    expected = snapshot(model, 1024.0)
    watcher.step(grad_scale=scaler)
    logged.check({2: expected})


def test_a_scaler_of_two_optimizers_needs_the_optimizer():
    """One optimizer has stepped while the gradients of the other are still scaled."""
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (two, one)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    logged = []
    watcher = paramstats.watch(one, lambda scalars, step: logged.append(scalars), stats="norm")
    scaler.scale(two(one(torch.ones(4, 3)).detach()).mean()).backward()
    scaler.step(optimizers[0])
    scaler.scale(two(one(torch.ones(4, 3))).mean()).backward()
    with pytest.raises(ValueError, match="several optimizers, name the one"):
        watcher.step(grad_scale=scaler)
    watcher.step(grad_scale=scaler, optimizer=optimizers[1], step=50)
    assert logged[0]["grad_norm/weight"] == pytest.approx(one.weight.grad.norm().item() / 1024)
    scaler.unscale_(optimizers[1])
    with pytest.raises(ValueError, match=r"before scaler\.unscale_"):
        watcher.step(grad_scale=scaler, optimizer=optimizers[1], step=100)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_of_checkpointed_modules_are_logged(use_reentrant):
    model, logged = network(), Logged()
    x = torch.randn(4, 64, requires_grad=True)
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    expected = snapshot(model)
    paramstats.watch(model, logged).step()
    logged.check({0: expected})


# ---- which steps are logged ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (10, [17, 18, 19, 20, 29, 31, 39, 40, None, 50], [17, 20, 31, 40, 50]),  # resumed at 17
        (4, [*range(6), *range(6)], [0, 4, 0, 4]),  # restarted
        (2, [0, 0, 1, 1, 2, 2, 3], [0, 2]),  # several batches per step
        (2, [None] * 5, [0, 2, 4]),
    ],
)
def test_the_first_step_and_multiples_of_every_are_logged(model, every, steps, expected):
    logged = []
    watcher = paramstats.watch(model, lambda _, step: logged.append(step), every=every)
    for step in steps:
        watcher.step(step=step)
    assert logged == expected


def test_deferred_statistics_are_logged_at_the_next_call(model, transfers):
    logged, expected = Logged(), paramstats.summarize(model).scalars()
    watcher = paramstats.watch(model, logged, every=3)
    watcher.step()
    assert not logged and watcher.summary is not None
    assert transfers[-1].waits == 0, "the loop waited"
    watcher.step()
    assert logged == {0: expected} and transfers[-1].waits == 1
    watcher.step()
    watcher.step()
    watcher.close()
    assert logged == {0: expected, 3: expected}
    watcher.close()
    assert list(logged) == [0, 3]


def test_deferred_statistics_of_every_step_are_logged_in_order(model, transfers):
    logged = Logged()
    with paramstats.watch(model, logged, every=1) as watcher:
        for step in range(4):
            watcher.step()
            assert list(logged) == list(range(step))
    assert list(logged) == [0, 1, 2, 3]


def test_deferred_statistics_of_optimizers_are_logged_at_the_next_step(transfers):
    model, logged = network(), Logged()
    optimizers = [torch.optim.Adam(layer.parameters()) for layer in model[::2]]
    truth = StepTruth(model, *optimizers)
    loss(model, 0).backward()
    with paramstats.watch(model, logged, every=1, optimizer=optimizers) as watcher:
        for n in range(2):
            for optimizer in optimizers:
                optimizer.step()
            assert list(logged) == list(range(n)), "the loop waited"
        optimizers[0].step()
        truth.check(logged, {0: 0, 1: 1})
        assert [t.waits for t in transfers] == [1, 1, 1, 1, 0]
        assert list(watcher.summary) == ["0.weight", "0.bias"]
    assert list(logged) == [0, 1, 2] and "update_norm/0.bias" in logged[2]
    optimizers[0].step()
    assert len(transfers) == 5, "the hooks are still there"


def test_a_log_may_close_the_watcher():
    """torch raises an error if a hook of an optimizer is removed while its hooks are called."""
    model, logged = network(), []

    def log(scalars: dict[str, float], step: int) -> None:
        logged.append(step)
        watcher.close()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = paramstats.watch(model, log, every=1, optimizer=optimizer)
    other = Logged()
    paramstats.watch(model, other, every=1, optimizer=optimizer)
    for batch in range(2):
        loss(model, batch).backward()
        optimizer.step()
    assert logged == [0] and list(other) == [0, 1]


def test_the_optimizer_of_accelerate_is_watched():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    truth, logged = StepTruth(model, optimizer), Logged()
    prepared, accelerated = accelerator.prepare(model, optimizer)
    with paramstats.watch(prepared, logged, every=2, optimizer=accelerated) as watcher:
        for batch in range(10):
            with accelerator.accumulate(prepared):
                accelerator.backward(loss(prepared, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1e-3)
                accelerated.step()
                accelerated.zero_grad()
    truth.check(logged, {0: 0, 2: 2, 4: 4})
    assert watcher.summary.total.grad.norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("is_ready", [False, True])
def test_after_an_error_the_watcher_does_not_wait(model, transfers, is_ready):
    logged = Logged()
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="diverged"),
        paramstats.watch(model, logged) as watcher,
    ):
        watcher.step()
        transfers[-1].is_ready = is_ready
        raise RuntimeError("diverged")
    assert list(logged) == ([0] if is_ready else [])


@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_step_whose_logging_failed_is_not_logged_again(model, monkeypatch, is_deferred):
    if is_deferred:
        defer_summaries_of_watch(monkeypatch)
    logged = []

    def log(scalars: dict[str, float], step: int) -> None:
        logged.append(step)
        raise ConnectionError("no network")

    watcher = paramstats.watch(model, log, every=1)
    calls = [watcher.step, watcher.step, watcher.step]
    if is_deferred:
        watcher.step()
        calls = [watcher.step, watcher.step, watcher.close]
    for call in calls:
        with pytest.raises(ConnectionError):
            call()
    watcher.close()
    assert logged == [0, 1, 2]


# ---- histories -----------------------------------------------------------------------------------


def test_a_history_gets_the_summaries_without_waiting(model, transfers):
    kept = {}

    class History:
        append = staticmethod(kept.__setitem__)

    watcher = paramstats.watch(model, every=2, history=History())
    for _ in range(3):
        watcher.step()
    assert list(kept) == [0, 2] and kept[2] is watcher.summary is not None
    assert [transfer.waits for transfer in transfers] == [0, 0]


@pytest.mark.parametrize("raising", ["loop", "log"])
def test_after_an_exception_the_history_of_a_path_is_written_and_closed(model, tmp_path, raising):
    path = tmp_path / "run.jsonl"

    def log(scalars, step):
        if raising == "log":
            raise OSError("the logger is down")

    def loop():
        with paramstats.watch(model, log, history=path, every=1) as watcher:
            watcher.step()
            raise OSError("the loop failed")

    with pytest.raises(OSError, match="logger is down" if raising == "log" else "loop failed"):
        loop()
    assert [step for step, _ in paramstats.History.load(path)] == [0]


def test_flush_logs_and_keeps_the_history_open(model, tmp_path):
    path = tmp_path / "run.jsonl"
    with paramstats.watch(model, history=path, every=1) as watcher:
        watcher.step()
        watcher.flush()
        watcher.step()
    assert [step for step, _ in paramstats.History.load(path)] == [0, 1]


def test_running_a_script_again_does_not_continue_its_file(model, tmp_path):
    path = tmp_path / "run.jsonl"
    with paramstats.watch(model, history=path) as watcher:
        watcher.step()
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"^paramstats.watch: expected a new file.*resume=Tr"):
        paramstats.watch(model, history=path)
    assert path.read_bytes() == before
    with paramstats.watch(model, history=paramstats.History(path, resume=True)) as watcher:
        watcher.step(step=50)
    assert [step for step, _ in paramstats.History.load(path)] == [0, 50]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_before_there_is_a_group_torchruns_first_rank_opens_the_path(
    model, tmp_path, monkeypatch, rank
):
    monkeypatch.setenv("RANK", rank)
    path = tmp_path / "run.jsonl"
    with paramstats.watch(model, history=path) as watcher:
        watcher.step()
    assert path.exists() == (rank == "0") == (watcher.history is not None)


def test_a_full_disk_ends_no_training(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with paramstats.watch(model, history=tmp_path / "run.jsonl", every=1) as watcher:
        monkeypatch.setattr("paramstats._history.writer.open", fail, raising=False)
        with pytest.warns(RuntimeWarning, match="cannot write .*No space left on device"):
            watcher.step()
        watcher.step()
        with pytest.warns(RuntimeWarning, match="lacks 2 entries"):
            watcher.close()


def test_a_history_can_be_the_path_of_a_file_which_watch_closes(model, tmp_path, monkeypatch):
    closed = []
    close = paramstats.History.close
    monkeypatch.setattr(paramstats.History, "close", lambda self: closed.append(close(self)))
    path = tmp_path / "run.jsonl"
    with paramstats.watch(model, history=str(path), every=2) as watcher:
        for _ in range(3):
            watcher.step()
        assert not closed
    assert len(closed) == 1
    history = paramstats.History.load(path)
    assert list(history.steps) == [0, 2] and "0.weight" in history


# ---- what is read and logged ---------------------------------------------------------------------


def test_arguments_of_summarize_and_scalars_apply(model):
    logged = Logged()
    patterns = (pattern for pattern in ("weight", "2"))  # can be iterated only once
    watcher = paramstats.watch(
        model, logged, every=1, key="l2_norm/{kind}/{name}", stats=("norm",), totals=False,
        include=patterns, exclude=re.compile("0"), params=False, correction=0,
    )  # fmt: skip
    watcher.step()
    watcher.step()
    assert logged[0].keys() == logged[1].keys() == {"l2_norm/grad/2.weight", "l2_norm/grad/2.bias"}
    expected = paramstats.summarize(model, correction=0)["2.bias"].grad
    assert watcher.summary["2.bias"].grad == expected


@pytest.mark.parametrize("kind", ["step", "optimizer", "separate"])
def test_distributions_and_rows_add_only_the_keys_that_stats_names(kind):
    logged, seen = [], []

    def run(**options: object) -> None:
        model = network()
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model[::2]]

        def log(scalars: dict[str, float], step: int) -> None:
            logged.append(scalars)
            seen.append(watcher.summary)

        if kind == "optimizer":
            options["optimizer"] = optimizers
        watcher = paramstats.watch(model, log, every=1, **options)
        if kind == "separate":
            watcher.separate(optimizers)
        loss(model, 0).backward()
        for optimizer in optimizers:
            if kind == "separate":
                watcher.step(optimizer=optimizer)
            optimizer.step()
        if kind == "step":
            watcher.step()
        watcher.close()

    run()
    run(distribution=True, rows=r"^0\.weight$")
    assert logged[0].keys() == logged[1].keys() and len(logged[0]) >= 40
    entry = seen[1]["0.weight"]
    assert entry.histogram.count == 1024 and entry.grad.histogram.count == 1024
    assert len(entry.rows) == len(entry.grad.rows) == 16 and seen[1]["2.weight"].rows is None
    run(distribution=r"2\.weight", stats=("norm", "kurtosis"))
    assert [key for key in logged[2] if "kurtosis" in key] == [
        "param_kurtosis/2.weight", "grad_kurtosis/2.weight"]  # fmt: skip
    assert logged[2]["grad_kurtosis/2.weight"] == seen[2]["2.weight"].grad.kurtosis > 1
    with pytest.raises(ValueError, match="expected distribution= with 'kurtosis' in stats"):
        run(rows=True, stats=("norm", "kurtosis"))


def test_the_log_finds_the_summary_of_its_step(model, transfers):
    """Also where statistics are logged one step later."""
    found = []

    def log(scalars: dict[str, float], step: int) -> None:
        assert scalars["param_mean/0.weight"] == watcher.summary["0.weight"].mean
        found.append(step)

    with paramstats.watch(model, log, every=1) as watcher:
        for _ in range(3):
            watcher.step()
            with torch.no_grad():
                model[0].weight.add_(1)
        assert found == [0, 1] and not watcher.summary.ready()
    assert found == [0, 1, 2]


def test_buffers_and_mappings_can_be_watched():
    model, logged = nn.BatchNorm1d(3), Logged()
    paramstats.watch(model, logged, buffers=True, grads=False).step()
    assert "buffer_mean/running_var" in logged[0]
    logged = Logged()
    paramstats.watch(model.state_dict(), logged, grads=False).step()
    assert logged[0]["param_mean/running_var"] == 1.0


class Module:
    """Has the signature of `LightningModule.log_dict`, whose second argument is not a step."""

    def log_dict(self, dictionary, prog_bar=False, logger=None):
        raise AssertionError("called")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": [1]}, TypeError, "expected a module or a mapping .*got list"),
        ({"log": None}, ValueError, "expected log=, history= or on_finding=, got none"),
        ({"on_finding": 3}, TypeError, "expected a function of a finding for on_finding, got 3"),
        ({"log": "wandb"}, TypeError, "expected a function of scalars and step .*'wandb'"),
        ({"log": Module().log_dict}, TypeError, r"take \(scalars, step\).*log_dict.*lambda"),
        ({"log": lambda scalars: None}, TypeError, r"take \(scalars, step\).*lambda scalars, step"),
        ({"every": 0}, ValueError, "whole number > 0 for every, got 0"),
        ({"every": 2.0}, ValueError, "whole number > 0 for every, got 2.0"),
        ({"every": True}, ValueError, "whole number > 0 for every, got True"),
        ({"stats": ("median",)}, ValueError, "got 'median'"),
        ({"stats": "stddev"}, ValueError, "got 'stddev'; did you mean 'std'"),
        ({"key": "{layer}"}, ValueError, "got 'layer'"),
        ({"key": "{stat}/{name}"}, ValueError, "expected a key for each statistic"),
        ({"include": "("}, re.error, "for include"),
        ({"exclude": 3}, TypeError, "for exclude"),
        ({"correction": float("nan")}, ValueError, "finite number for correction"),
        ({"log": None, "history": 3}, TypeError, "a History or a path for history, got 3"),
    ],
)
def test_bad_arguments_are_refused_before_training(model, arguments, error, message):
    with pytest.raises(error, match=rf"^paramstats\.\w+: .*{message}"):
        paramstats.watch(**{"source": model, "log": print, **arguments})
