"""Healthy trainings with a loop of their own: agents, adversaries, target networks, averages."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.clinic.data import batch, classify, digits
from tests.clinic.models import mlp
from tests.clinic.training import Observe, Training, adamw, fit, nothing


def byol() -> Training:
    """Self-supervision with a target network: a moving average without gradients."""
    online = mlp(3, 64, norm=nn.BatchNorm1d, outputs=32)
    target = copy.deepcopy(online)
    target.requires_grad_(True)  # as many implementations leave it
    model = nn.ModuleDict({"online": online, "predict": mlp(2, 32, inputs=32, outputs=32)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model["target"] = target

    def loop(observe: Observe) -> None:
        for _ in range(80):
            x, _ = batch()
            a, b = (x + 0.2 * torch.randn_like(x) for _ in range(2))
            optimizer.zero_grad()
            with torch.no_grad():
                goal = F.normalize(target(b), dim=1)
            out = F.normalize(model["predict"](online(a)), dim=1)
            loss = (2 - 2 * (out * goal).sum(1)).mean()
            loss.backward()
            observe(loss.item())
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(target.parameters(), online.parameters(), strict=True):
                    p.lerp_(q, 0.02)

    return Training(model, optimizer, loop)


def _walk(n: int, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Return random states of a walk on a line and whether a step to the right is good."""
    state = torch.randn(n, 8)
    return state, ((state @ goal) > 0).long()


def dqn() -> Training:
    goal = torch.randn(8)
    model = nn.ModuleDict({name: mlp(3, 32, inputs=8, outputs=2) for name in ("q", "target")})
    model["target"].load_state_dict(model["q"].state_dict())
    optimizer = torch.optim.Adam(model["q"].parameters(), lr=3e-3)

    def loop(observe: Observe) -> None:
        for step in range(120):
            state, good = _walk(64, goal)
            action = torch.randint(0, 2, (64,))
            reward = (action == good).float()
            with torch.no_grad():
                following = model["target"](_walk(64, goal)[0]).max(1).values
            optimizer.zero_grad()
            value = model["q"](state).gather(1, action[:, None])[:, 0]
            loss = F.smooth_l1_loss(value, reward + 0.5 * following)
            loss.backward()
            observe(loss.item())
            optimizer.step()
            if step % 40 == 39:
                model["target"].load_state_dict(model["q"].state_dict())

    return Training(model, optimizer, loop)


def actor_critic(critic: bool = True) -> Training:
    """Policy gradients of a bandit with states; the figure that falls is the missed reward."""
    goal = torch.randn(8)
    model = nn.ModuleDict({"actor": mlp(3, 32, inputs=8, outputs=2)})
    if critic:
        model["critic"] = mlp(3, 32, inputs=8, outputs=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loop(observe: Observe) -> None:
        for _ in range(120):
            state, good = _walk(32, goal)
            policy = torch.distributions.Categorical(logits=model["actor"](state))
            action = policy.sample()
            reward = (action == good).float()
            base = model["critic"](state)[:, 0] if critic else torch.tensor(0.5)
            loss = -(policy.log_prob(action) * (reward - base.detach())).mean()
            loss = loss - 0.01 * policy.entropy().mean()
            if critic:
                loss = loss + 0.5 * F.mse_loss(base, reward)
            optimizer.zero_grad()
            loss.backward()
            observe(1 - reward.mean().item())
            optimizer.step()

    return Training(model, optimizer, loop)


def gan(wasserstein: bool = False) -> Training:
    """Adversaries, with a gradient penalty if their loss is the Wasserstein distance.

    The number that falls is the distance between the mean images.
    """
    leaky = functools.partial(nn.LeakyReLU, 0.2)
    model = nn.ModuleDict(
        {
            "generator": mlp(3, 64, inputs=16, outputs=64, norm=nn.BatchNorm1d),
            "critic": mlp(3, 64, act=leaky, outputs=1),
        }
    )
    generator, critic = model["generator"], model["critic"]
    parts = (generator, critic)
    optimizers = [torch.optim.Adam(p.parameters(), lr=1e-3, betas=(0.5, 0.99)) for p in parts]

    def penalty(real: Tensor, fake: Tensor) -> Tensor:
        mixed = real.lerp(fake, torch.rand(64, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        return ((slope.norm(dim=1) - 1) ** 2).mean()

    def loop(observe: Observe) -> None:
        for _ in range(120):
            real, _ = batch()
            fake = generator(torch.randn(64, 16))
            model.zero_grad()
            score = critic(fake)
            (-score if wasserstein else F.softplus(-score)).mean().backward(retain_graph=True)
            critic.zero_grad()
            fake = fake.detach()
            if wasserstein:
                loss = (critic(fake) - critic(real)).mean() + 10 * penalty(real, fake)
            else:
                loss = (F.softplus(critic(fake)) + F.softplus(-critic(real))).mean()
            loss.backward()
            observe((fake.mean(0) - real.mean(0)).norm().item())
            for o in optimizers:
                o.step()

    return Training(model, optimizers, loop)


def averaged(decay: float | None = None) -> Training:
    """A model with an average of its weights as a part of the observed one."""
    net = mlp()
    multi = None if decay is None else torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=multi)
    training = fit(
        net, classify(net), adamw(3e-3), 80, after=lambda model, step: mean.update_parameters(net)
    )
    return Training(nn.ModuleDict({"net": net, "mean": mean}), training.optimizer, training.loop)


def lightning() -> Training:
    import lightning as library

    class Digits(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()
            self.observe: Observe = nothing

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return self.loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.observe(self.loss.item())

        def configure_optimizers(self) -> Any:
            return made

    model = Digits()
    made = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*digits()), batch_size=64, shuffle=True
    )

    def loop(observe: Observe) -> None:
        model.observe = observe
        quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
        trainer = library.Trainer(
            max_steps=60, max_epochs=-1, accelerator="cpu", **dict.fromkeys(quiet, False)
        )
        trainer.fit(model, data)

    return Training(model, made, loop)


def sam() -> Training:
    """Sharpness-aware minimization: the gradient is taken at a shifted point."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loop(observe: Observe) -> None:
        for _ in range(60):
            x, labels = batch()
            parameters = list(model.parameters())
            slopes = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters)
            norm = torch.stack([g.norm() for g in slopes]).norm()
            shifts = [0.05 * g / norm for g in slopes]
            for sign in (1, -1):
                with torch.no_grad():
                    for p, shift in zip(parameters, shifts, strict=True):
                        p.add_(shift, alpha=sign)
                if sign == 1:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), labels)
                    loss.backward()
            observe(loss.item())
            optimizer.step()

    return Training(model, optimizer, loop)
