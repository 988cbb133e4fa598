"""Healthy trainings that need a loop, a loss or a model of their own."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.clinic.data import classify, digits, tokens
from tests.clinic.models import (
    Layer,
    Transformer,
    gpt2,
    mlp,
    transformers,
    unet,
)
from tests.clinic.training import Observe, Training, adamw, fit, nothing, optimizer

nadam = optimizer("NAdam", 3e-3)
adagrad = optimizer("Adagrad", 1e-2)


def pooled(model: nn.Module) -> Any:
    """Predict tokens from the last hidden states, so that the model's pooler is not used."""
    model.head = nn.Linear(32, 32)

    def loss(step: int) -> Tensor:
        t = tokens(16, 16, 32)
        out = model.head(model(t[:, :-1]).last_hidden_state)
        return F.cross_entropy(out.flatten(0, 1), t[:, 1:].flatten())

    return loss


def t5() -> nn.Module:
    model = transformers(
        "T5", "T5ForConditionalGeneration", vocab_size=32, d_model=32, d_kv=16, d_ff=64,
        num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return Layer(lambda self, x: self.t5(input_ids=x[0], decoder_input_ids=x[1]).logits, t5=model)


def encoder_decoder() -> nn.Module:
    def call(self: Any, x: tuple[Tensor, Tensor]) -> Tensor:
        source, target = (self.embed(t) + self.position[:, : t.shape[1]] for t in x)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))

    core = nn.Transformer(32, 2, 2, 2, 64, dropout=0.0, batch_first=True)
    position = nn.Parameter(0.02 * torch.randn(1, 32, 32))
    members = {"embed": nn.Embedding(32, 32), "position": position}
    return Layer(call, **members, transformer=core, head=nn.Linear(32, 32))


def copy_task(model: nn.Module) -> Any:
    """Return the loss of repeating a sequence."""

    def loss(step: int) -> Tensor:
        t = tokens(16, 12, 31) + 1
        shifted = F.pad(t, (1, 0))[:, :-1]
        return F.cross_entropy(model((t, shifted)).flatten(0, 1), t.flatten())

    return loss


def rare(model: nn.Module) -> Any:
    """Return the loss of sequences in which most of 256 tokens never or rarely occur."""

    def loss(step: int) -> Tensor:
        t = tokens(4, 16, 32)
        t = torch.where(torch.rand(t.shape) < 0.01, t + 64, t)
        return F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())

    return loss


def word2vec() -> nn.Module:
    return Layer(
        lambda self, t: self.center(t) @ self.context.weight.T,
        center=nn.Embedding(128, 16),
        context=nn.Embedding(128, 16),
    )


def pairs(model: nn.Module) -> Any:
    def loss(step: int) -> Tensor:
        t = tokens(64, 2, 128)
        return F.cross_entropy(model(t[:, 0]), t[:, 1])

    return loss


def frozen_embedding() -> nn.Module:
    model = Transformer()
    model.embed.requires_grad_(False)
    return model


def checkpointed() -> nn.Module:
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def dropout() -> nn.Module:
    return mlp(4, 96, act=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.3)))


def siren() -> nn.Module:
    """Return a network with sines as activations."""
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
    for layer in layers:
        bound = math.sqrt(6 / 64) / 2
        nn.init.uniform_(layer.weight, -bound, bound)
    sine = [Layer(lambda self, x: torch.sin(2 * x)) for _ in layers]
    pairs = [module for pair in zip(layers, sine, strict=True) for module in pair]
    return nn.Sequential(*pairs, nn.Linear(64, 1))


def _batch(n: int = 64) -> tuple[Tensor, Tensor]:
    x, labels = digits()
    rows = torch.randint(0, len(x), (n,))
    return x[rows], labels[rows]


def vae() -> Training:
    model = nn.ModuleDict({"encoder": mlp(3, 64, outputs=16), "decoder": mlp(3, 64, inputs=8)})
    model["decoder"][-1] = nn.Linear(64, 64)

    def loss(step: int) -> Tensor:
        x, _ = _batch()
        mean, log_var = model["encoder"](x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
        return ((model["decoder"](z) - x) ** 2).sum(1).mean() + 0.1 * divergence

    return fit(model, loss, adamw(3e-3), 100)


def diffusion() -> Training:
    model = nn.ModuleDict({"time": nn.Linear(1, 64), "net": unet()})

    def loss(step: int) -> Tensor:
        x, _ = _batch(32)
        t = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        noisy = t.cos() * (2 * x - 1) + t.sin() * noise
        return F.mse_loss(model["net"](noisy + model["time"](t)), noise)

    return fit(model, loss, adamw(3e-3), 80)


def siamese() -> Training:
    model = mlp(3, 64, outputs=16)

    def loss(step: int) -> Tensor:
        (a, la), (b, lb) = _batch(), _batch()
        distance = (model(a) - model(b)).norm(dim=1)
        same = (la == lb).float()
        return (same * distance**2 + 0.1 * (1 - same) * F.relu(1 - distance) ** 2).mean()

    return fit(model, loss, adamw(1e-3), 80)


def simclr() -> Training:
    model = mlp(4, 64, norm=nn.BatchNorm1d, outputs=16)

    def loss(step: int) -> Tensor:
        x, _ = _batch()
        a, b = (F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))

    return fit(model, loss, adamw(3e-3), 60)


def graph(attention: bool = False) -> Training:
    """Classify the nodes of a graph of digits, whose edges are nearest neighbors."""
    x, labels = (part[:400] for part in digits())
    near = torch.cdist(x, x).topk(6, largest=False).indices
    adjacency = torch.zeros(400, 400).scatter_(1, near, 1)

    def mix(self: Any, h: Tensor) -> Tensor:
        weights = adjacency
        if attention:
            score = F.leaky_relu(self.left(h) + self.right(h).T)
            weights = score.masked_fill(adjacency == 0, -1e9).softmax(1)
        else:
            weights = adjacency / adjacency.sum(1, keepdim=True)
        return self.linear(weights @ h)

    def layer(n: int, out: int) -> nn.Module:
        ends = {"left": nn.Linear(n, 1), "right": nn.Linear(n, 1)} if attention else {}
        return Layer(mix, linear=nn.Linear(n, out), **ends)

    model = nn.Sequential(layer(64, 32), nn.ReLU(), layer(32, 32), nn.ReLU(), layer(32, 10))
    return fit(model, lambda step: F.cross_entropy(model(x), labels), adamw(1e-2), 60)


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
            x, _ = _batch()
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
    """The figure that falls is the distance between the mean images."""
    model = nn.ModuleDict(
        {
            "generator": mlp(3, 64, inputs=16, outputs=64, norm=nn.BatchNorm1d),
            "critic": mlp(3, 64, act=lambda: nn.LeakyReLU(0.2), outputs=1),
        }
    )
    generator, critic = model["generator"], model["critic"]
    kind = torch.optim.RMSprop if wasserstein else torch.optim.Adam
    optimizers = [kind(part.parameters(), lr=1e-3) for part in (generator, critic)]

    def loop(observe: Observe) -> None:
        for _ in range(120):
            real, _ = _batch()
            fake = generator(torch.randn(64, 16))
            model.zero_grad()
            if wasserstein:
                (-critic(fake).mean()).backward(retain_graph=True)
            else:
                F.softplus(-critic(fake)).mean().backward(retain_graph=True)
            critic.zero_grad()
            if wasserstein:
                (critic(fake.detach()).mean() - critic(real).mean()).backward()
            else:
                both = F.softplus(critic(fake.detach())) + F.softplus(-critic(real))
                both.mean().backward()
            observe((fake.mean(0) - real.mean(0)).norm().item())
            for o in optimizers:
                o.step()
            if wasserstein:
                with torch.no_grad():
                    for p in critic.parameters():
                        p.clamp_(-0.1, 0.1)

    return Training(model, optimizers, loop)


def multi_task() -> Training:
    """Classes and the sum of all pixels, whose losses have different sizes."""
    model = nn.ModuleDict({"trunk": mlp(3, 64, outputs=64)})
    model["classes"], model["sum"] = nn.Linear(64, 10), nn.Linear(64, 1)

    def loss(step: int) -> Tensor:
        x, labels = _batch()
        h = model["trunk"](x).relu()
        error = F.mse_loss(model["sum"](h)[:, 0], x.sum(1))
        return F.cross_entropy(model["classes"](h), labels) + 0.1 * error

    return fit(model, loss, adamw(3e-3), 80)


def distillation() -> Training:
    model = nn.ModuleDict({"student": mlp(2, 32), "teacher": mlp(3, 96)})
    x, labels = digits()
    teacher = model["teacher"]
    trained = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(40):
        trained.zero_grad()
        F.cross_entropy(teacher(x), labels).backward()
        trained.step()
    teacher.zero_grad()
    teacher.requires_grad_(False)

    def loss(step: int) -> Tensor:
        batch, _ = _batch()
        goal = (teacher(batch) / 2).softmax(1)
        return F.cross_entropy(model["student"](batch) / 2, goal)

    return fit(model, loss, adamw(1e-2), 80)


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


def second_order() -> Training:
    """A loss behind a step of gradient descent, as in MAML."""
    model = mlp(3, 32)

    def loss(step: int) -> Tensor:
        (x, a), (y, b) = _batch(), _batch()
        parameters = dict(model.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), a)
        slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), slopes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, moved, (y,)), b)

    return fit(model, loss, adamw(3e-3), 60)


def sam() -> Training:
    """Sharpness-aware minimization: the gradient is taken at a shifted point."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loop(observe: Observe) -> None:
        for _ in range(60):
            x, labels = _batch()
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


def flow() -> Training:
    """A normalizing flow: affine couplings whose last layers start at zero."""

    def coupling() -> nn.Module:
        net = mlp(3, 64, inputs=32, outputs=64)
        nn.init.zeros_(net[-1].weight)
        return net

    model = nn.ModuleList(coupling() for _ in range(4))

    def loss(step: int) -> Tensor:
        x, _ = _batch()
        x = 2 * x - 1 + 0.1 * torch.randn_like(x)
        total = torch.zeros(len(x))
        for net in model:
            a, b = x.chunk(2, 1)
            shift, scale = net(a).chunk(2, 1)
            scale = scale.tanh()
            x = torch.cat([b * scale.exp() + shift, a], 1)
            total = total + scale.sum(1)
        return (0.5 * (x**2).sum(1) - total).mean()

    return fit(model, loss, adamw(1e-3), 80)
