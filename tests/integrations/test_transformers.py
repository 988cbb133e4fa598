"""transformers: the callback logs the gradients as they are before the Trainer clips them."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
import torch
from torch import nn

import paramstats
from tests.integrations.deferred import defer_summaries_of_watch
from tests.integrations.training import Logged, StepTruth, snapshot

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
integration = importlib.import_module("paramstats.integrations.transformers")
ParamStatsCallback, reporters = integration.ParamStatsCallback, integration.reporters

logging.getLogger("transformers").setLevel(logging.ERROR)


def gpt2(n_layer: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=n_layer, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.1, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts(count: int = 48) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": t, "labels": t} for t in tokens]


class Trainer(transformers.Trainer):
    """Keeps snapshots of its model after backward, and after clipping."""

    scaler: torch.amp.GradScaler | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.snapshots, self.clipped = {}, {}

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            self.snapshots[self.state.global_step + 1] = snapshot(self.model, scale)
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.clipped[self.state.global_step + 1] = snapshot(self.model)
        return norm


class ScalingTrainer(Trainer):
    """Scales losses as fp16=True does on a GPU; accelerate refuses fp16 on a CPU."""

    def create_optimizer(self, *args, **kwargs):
        self.scaler = self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=2
        )
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        self.accelerator.native_amp = (
            True  # after the model was prepared, so that there is no autocast
        )
        return super().training_step(*args, **kwargs)


def trainer_of(folder, model, *callbacks, kind=Trainer, **options):
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 5, "per_device_train_batch_size": 4,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 2, "seed": 0, "learning_rate": 1e-2, **options,
        }
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=texts(), callbacks=list(callbacks))


@pytest.mark.parametrize("kind", [Trainer, ScalingTrainer])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0])
def test_accumulated_gradients_are_logged_unscaled_and_before_clipping(
    tmp_path, monkeypatch, kind, max_grad_norm
):
    if kind is ScalingTrainer:
        import accelerate

        monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "fp16")
    taken, take = [], paramstats.Watcher.take
    monkeypatch.setattr(
        paramstats.Watcher, "take", lambda *arguments: taken.append(0) or take(*arguments)
    )
    logged = Logged()
    callback = ParamStatsCallback(every=2, log=logged)
    trainer = trainer_of(
        tmp_path, gpt2(), callback, kind=kind,
        gradient_accumulation_steps=2, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 5
    logged.check({step: trainer.snapshots[step] for step in (1, 2, 4)})
    assert len(taken) == 3, "read more than the last part of an accumulation"
    assert callback.watcher.summary.scalars() == logged[4]
    if max_grad_norm:
        norm = paramstats.summarize(trainer.clipped[2]).total.grad.norm
        assert norm == pytest.approx(max_grad_norm, rel=1e-3), "clipping was not active"
    if kind is ScalingTrainer:
        assert trainer.scaler.get_scale() > 1024.0, "the scale did not change"


def with_truth(kind):
    """Return a Trainer that knows the truth of its optimizer's steps."""

    class WithTruth(kind):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            self.truth = StepTruth(self.model, optimizer)
            return optimizer

    return WithTruth


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Trainer, {"optim": "adamw_torch", "weight_decay": 0.1}),
        (Trainer, {"optim": "adafactor"}),
        (ScalingTrainer, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    ],
)
def test_state_and_updates_are_logged_after_clipping(tmp_path, monkeypatch, kind, options):
    if kind is ScalingTrainer:
        import accelerate

        monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "fp16")
    transfers = defer_summaries_of_watch(monkeypatch) if kind is ScalingTrainer else []
    logged = Logged()
    callback = ParamStatsCallback(every=2, log=logged, optimizer=True)
    trainer = trainer_of(
        tmp_path, gpt2(n_layer=1), callback, kind=with_truth(kind),
        gradient_accumulation_steps=2, max_grad_norm=1e-3, **options,
    )  # fmt: skip
    trainer.train()
    trainer.truth.check(logged, {1: 0, 2: 1, 4: 3})
    assert callback.watcher.summary.total.grad.norm == pytest.approx(1e-3, rel=1e-3)
    assert [t.waits for t in transfers] == [1] * len(transfers)


def test_a_resumed_training_continues_its_history(tmp_path):
    path, options = tmp_path / "run.jsonl", {"save_strategy": "steps", "save_steps": 3}
    for last, checkpoint in [(3, None), (7, str(tmp_path / "checkpoint-3"))]:
        history = paramstats.History(path, resume=True)
        callback = ParamStatsCallback(every=2, history=history, optimizer=True)
        trainer = trainer_of(tmp_path, gpt2(n_layer=1), callback, max_steps=last, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        history.close()
    assert list(paramstats.History.load(path).steps) == [1, 2, 4, 6]
    assert callback.watcher.summary["transformer.ln_f.bias"].optimizer.step == 6


def test_a_training_after_one_that_failed_is_logged_once(tmp_path):
    class Fails(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise OSError("the data is gone")
            return super().training_step(*args, **kwargs)

    logged = []
    callback = ParamStatsCallback(1, log=lambda _, step: logged.append(step), optimizer=True)
    trainer = trainer_of(tmp_path, gpt2(n_layer=1), callback, kind=Fails)
    for _ in range(2):
        with pytest.raises(OSError, match="the data is gone"):
            trainer.train()
    assert logged == [1, 2, 1, 2]


def test_an_accumulation_cut_short_by_the_end_of_an_epoch_is_logged(tmp_path):
    logged = Logged()  # 12 batches per epoch: 2 steps of 5 batches and one of 2
    trainer = trainer_of(
        tmp_path, gpt2(n_layer=1), ParamStatsCallback(every=1, log=logged),
        gradient_accumulation_steps=5, max_steps=-1, num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    assert list(logged) == [1, 2, 3, 4, 5, 6]
    logged.check(trainer.snapshots)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 6 renames an argument
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_checkpointed_layers_are_logged(tmp_path, use_reentrant, frozen):
    model, logged = gpt2(), Logged()
    if frozen:  # only layers inside checkpointed segments are trained
        for p in [*model.transformer.wte.parameters(), *model.transformer.wpe.parameters()]:
            p.requires_grad_(False)
        model.transformer.ln_f.requires_grad_(False)
        model.enable_input_require_grads()
    trainer = trainer_of(
        tmp_path, model, ParamStatsCallback(every=2, log=logged), max_steps=3,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    trainer.train()
    logged.check({step: trainer.snapshots[step] for step in (1, 2)})


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    logged = Logged()
    trainer = trainer_of(
        tmp_path, gpt2(n_layer=1), ParamStatsCallback(every=2, log=logged),
        torch_compile=True, torch_compile_backend="aot_eager",
    )  # fmt: skip
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    logged.check({step: trainer.snapshots[step] for step in (1, 2, 4)})


def test_parameters_have_hooks_on_due_steps_only(tmp_path):
    hooked = {}

    class LooksForHooks(Trainer):
        def training_step(self, *args, **kwargs):
            step = self.state.global_step + 1
            hooked[step] = any(p._post_accumulate_grad_hooks for p in self.model.parameters())
            return super().training_step(*args, **kwargs)

    model = gpt2(n_layer=1)
    trainer_of(
        tmp_path, model, ParamStatsCallback(every=3, log=Logged()), kind=LooksForHooks
    ).train()
    assert hooked == {1: True, 2: False, 3: True, 4: False, 5: False}
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_reporters_of_the_trainer_get_the_scalars(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, gpt2(), report_to="tensorboard", max_steps=3)
    trainer.add_callback(ParamStatsCallback(every=2, log=reporters(trainer), stats=("norm",)))
    trainer.train()
    assert "grad_norm/" not in capsys.readouterr().out
    assert not any(key.startswith("grad_norm/") for row in trainer.state.log_history for key in row)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    for step in (1, 2):
        summary = paramstats.summarize(trainer.snapshots[step])
        for name, entry in summary.items():
            (value,) = (
                e.value for e in events.Scalars(f"train/grad_norm/{name}") if e.step == step
            )
            assert value == torch.tensor(entry.grad.norm).item()
    assert [e.step for e in events.Scalars("train/loss")] == [2]


def test_a_second_training_starts_at_step_1(tmp_path):
    kept = []

    class History:
        def append(self, step, summary):
            kept.append((step, next(iter(summary))))

    trainer = trainer_of(tmp_path, gpt2(), ParamStatsCallback(2, history=History()), max_steps=2)
    trainer.train()
    trainer.train()
    assert kept == 2 * [(1, "transformer.wte.weight"), (2, "transformer.wte.weight")]


def test_gradients_without_autograd_are_reported(tmp_path):
    class SetsGradients(Trainer):
        def training_step(self, model, *args, **kwargs):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            return torch.tensor(1.0)

    logged = Logged()
    trainer = trainer_of(tmp_path, gpt2(), ParamStatsCallback(log=logged), kind=SetsGradients)
    with pytest.warns(RuntimeWarning, match="nothing is logged at step 1, because no hook saw"):
        trainer.train()
    assert not logged


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected log=, history= or on_finding=, got none"):
        ParamStatsCallback()
    with pytest.raises(ValueError, match="whole number > 0 for every, got 0"):
        ParamStatsCallback(0, log=print)
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        ParamStatsCallback(log=print, evry=3)
    with pytest.raises(ValueError, match="expected a Trainer with reporters, got report_to="):
        reporters(trainer_of(tmp_path, gpt2()))


def test_without_transformers_the_import_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "paramstats.integrations.transformers")
    message = r"ParamStatsCallback needs transformers: pip install transformers"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("paramstats.integrations.transformers")
