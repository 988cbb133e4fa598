"""What is put around a model or its layers: parametrizations, adapters, compilers, transforms."""

from __future__ import annotations

import copy
import math
import re
import socket
import tempfile
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import paramstats
from paramstats._core.torch_private import REASON
from tools.matrix.looking import Look, Observe, check, same_training
from tools.matrix.rows import NotRunError, row
from tools.matrix.training import batch, classifier, train

Loss = Callable[[Tensor], Tensor]


@row("`parametrizations.weight_norm`", "sklearn", quick=True)
def weight_norm(look: Look) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        parametrizations.weight_norm(model[0])
        return train(model, observe)

    model = same_training(look, run)
    summary = look(model)
    assert "0.parametrizations.weight.original0" in summary
    look({"effective": model[0].weight})
    return "listed as `parametrizations.weight.original0` (magnitudes) and `original1`"


@row("`parametrizations.spectral_norm` and `orthogonal`", "sklearn", quick=True)
def spectral_norm(look: Look) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        parametrizations.spectral_norm(model[0])
        parametrizations.orthogonal(model[3], orthogonal_map="householder")
        return train(model, observe)

    model = same_training(look, run)
    assert look(model)["0.parametrizations.weight.0._u"].kind == "buffer"
    with parametrize.cached():
        look(model)
    effective = look({"w": model[0].weight})["w"]
    parametrize.remove_parametrizations(model[0], "weight")
    assert look(model)["0.weight"].count == effective.count
    return "the power iteration's vectors are buffers; also cached, and removed again"


@row("The older hooks: `nn.utils.weight_norm`, `spectral_norm`", "sklearn", quick=True)
def older_norms(look: Look) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        nn.utils.weight_norm(model[0])
        nn.utils.spectral_norm(model[3])
        return train(model, observe)

    assert "0.weight_g" in look(same_training(look, run))
    return "`weight_g`, `weight_v`; `weight_orig`"


@row("Pruning masks, iterated, then made permanent", "sklearn", quick=True)
def pruning(look: Look) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        for amount in (0.25, 0.5):
            prune.l1_unstructured(model[0], "weight", amount=amount)
            train(model, observe)
        prune.ln_structured(model[3], "weight", amount=0.5, n=2, dim=1)
        return train(model, observe)

    model = same_training(look, run)
    masked = look({"weight": model[0].weight})["weight"]
    assert masked.zero_count >= 0.6 * masked.count
    mask = look(model)["0.weight_mask"]
    assert (mask.kind, mask.zero_fraction) == ("buffer", masked.zero_fraction)
    prune.remove(model[0], "weight")
    assert look(model)["0.weight"].zero_fraction == masked.zero_fraction
    return '`weight_orig` with a mask as buffer; as it acts: `summarize({"w": layer.weight})`'


def tiny_llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train_language_model(model: nn.Module, observe: Observe, steps: int = 2) -> nn.Module:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(steps):
        ids = torch.randint(0, 128, (2, 12))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        observe(model)
        optimizer.step()
    return model


@row("PEFT: LoRA, DoRA, IA3, prompt tuning on a Llama", "peft", "transformers")
def lora(look: Look) -> str:
    import peft

    targets = ["q_proj", "v_proj"]
    configs = [
        peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=targets, use_dora=True, task_type="CAUSAL_LM"),
        peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["norm"]),
        peft.IA3Config(
            target_modules=[*targets, "down_proj"], feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ]  # fmt: skip
    for config in configs:

        def run(observe: Observe, config: peft.PeftConfig = config) -> nn.Module:
            return train_language_model(
                peft.get_peft_model(tiny_llama(), copy.deepcopy(config)), observe
            )

        model = same_training(look, run)
        summary = look(model)
        base = [entry for entry in summary.values() if not entry.requires_grad]
        assert base and all(entry.grad is None for entry in base if entry.kind == "param")
        if isinstance(config, peft.LoraConfig):
            look(model.merge_and_unload())
    return "frozen base: `requires_grad` False, no gradient; adapters under PEFT's own names"


def compile_counters() -> Counter[str]:
    """What was compiled from here on: a row that compiled nothing must not pass."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return counters["stats"]


@row("`torch.compile`d module and training step", "sklearn")
def compiled(look: Look) -> str:
    def module(observe: Observe) -> nn.Module:
        counters = compile_counters()
        model = train(torch.compile(classifier(), backend="aot_eager"), observe)
        assert counters["unique_graphs"] > 0
        return model

    def with_the_call_inside(observe: Observe) -> nn.Module:
        counters = compile_counters()
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        @torch.compile(backend="aot_eager")
        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, paramstats.Summary]:
            loss = functional.cross_entropy(model(images), labels)
            return 2 * loss, paramstats.summarize(model, buffers=True)

        for at in range(3):
            loss, inside = step(*batch(at))
            assert inside == paramstats.summarize(model, buffers=True)
            optimizer.zero_grad()
            loss.backward()
            observe(model)
            optimizer.step()
        assert counters["unique_graphs"] > 0
        return model

    model = same_training(look, module)
    assert "_orig_mod.0.weight" in look(model)
    same_training(look, with_the_call_inside)
    look.refused(
        torch.compile(lambda: paramstats.summarize(model), fullgraph=True, backend="aot_eager"),
        torch._dynamo.exc.Unsupported, re.escape(f"(reason: {REASON})"),
    )  # fmt: skip
    refused = f"refused with `fullgraph=True`: Unsupported: ... (reason: {REASON}) ..."
    look.messages = {refused: None}  # torch's has many lines more
    return (
        "`_orig_mod.` names, as `named_parameters()`; a call in a compiled step breaks its graph; "
        "refused with `fullgraph=True`: torch's hint there, to remove `torch.compiler.disable`, "
        "does not help, move the call out of the compiled code"
    )


@row("`torch.compile` with inductor", "sklearn")
def inductor(look: Look) -> None:
    def run(observe: Observe) -> nn.Module:
        counters = compile_counters()
        model = train(torch.compile(classifier()), observe)
        assert counters["unique_graphs"] > 0
        return model

    try:
        same_training(look, run)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise NotRunError(f"inductor has no working C++ compiler here ({error})") from error


@row("`torch.jit.script` and `torch.jit.trace`", "sklearn", quick=True)
def scripted(look: Look) -> None:
    def script(observe: Observe) -> nn.Module:
        return train(torch.jit.script(classifier()), observe)

    def trace(observe: Observe) -> nn.Module:
        return train(torch.jit.trace(classifier(), batch(0)[0]), observe)

    for run in (script, trace):
        assert "0.weight" in look(same_training(look, run))


@row("Tied weights in a scripted module", quick=True)
def scripted_and_tied(look: Look) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    for model in (Tied(), torch.jit.script(Tied())):
        model(torch.tensor([1, 5])).square().sum().backward()
        assert look(model)["embed.weight"].aliases == ("head.weight",)


@row("`torch.fx` graph modules and `torch.export`", "sklearn", quick=True)
def exported(look: Look) -> None:
    def traced(observe: Observe) -> nn.Module:
        return train(torch.fx.symbolic_trace(classifier()), observe)

    same_training(look, traced)
    exported = torch.export.export(classifier(), (batch(0)[0],))
    look(exported.module())
    look(exported.state_dict)


@row("A call inside what `torch.jit.trace` or `make_fx` traces", quick=True)
def inside_tracers(look: Look) -> str:
    from torch.fx.experimental.proxy_tensor import make_fx

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 10)
            self.seen: list[paramstats.Summary] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(paramstats.summarize(self))
            return self.inner(x)

    images = torch.randn(4, 64)

    def compare() -> int:
        compared = 0
        for trace in (lambda m: torch.jit.trace(m, images), lambda m: make_fx(m)(images)):
            model = Looks()
            trace(model)
            assert model.seen
            for summary in model.seen:
                check(summary["inner.weight"], model.inner.weight)
                check(summary["inner.bias"], model.inner.bias)
                compared += 2
        return compared

    look.each(compare)
    return "statistics of the real tensors; nothing of the call in the graph"


@row("A tensor of `torch.fx.symbolic_trace`", quick=True)
def proxies(look: Look) -> None:
    look.refused(
        lambda: torch.fx.symbolic_trace(lambda w: paramstats.summarize({"w": w})),
        TypeError, "expected a torch.Tensor", "got torch.fx.proxy.Proxy for 'w'",
    )  # fmt: skip


@row("`nn.DataParallel` and `DistributedDataParallel`", "sklearn", quick=True)
def data_parallel(look: Look) -> str:
    import torch.distributed as dist

    def in_turn(observe: Observe) -> nn.Module:
        return train(nn.DataParallel(classifier()), observe)

    def distributed(observe: Observe) -> nn.Module:
        return train(nn.parallel.DistributedDataParallel(classifier()), observe)

    same_training(look, in_turn)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if not dist.is_available() or dist.is_initialized():
        raise NotRunError("a process group is there already" if dist.is_available() else "no gloo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        same_training(look, distributed)
    finally:
        dist.destroy_process_group()
    return "`module.` names; DDP's gradients are views of its buckets"


@row("`torch.func.functional_call`, `nn.utils.stateless`", "sklearn", quick=True)
def functional_calls(look: Look) -> str:
    from torch.func import functional_call
    from torch.nn.utils import stateless

    model = classifier()
    images, labels = batch(0)
    for call in (functional_call, stateless.functional_call):
        params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        for _ in range(2):
            loss = functional.cross_entropy(call(model, params, (images,)), labels)
            grads = torch.autograd.grad(loss, list(params.values()))
            params = {
                name: (p - 0.1 * g).detach().requires_grad_()
                for (name, p), g in zip(params.items(), grads, strict=True)
            }
            look(params)
            look(dict(zip(params, grads, strict=True)))

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            look(self)  # with the parameters that functional_call lent it
            return self.inner(x)

    within = Within()
    lent = {name: torch.randn_like(p) for name, p in within.named_parameters()}
    functional_call(within, lent, (images,))
    look(within)
    return "the dict of parameters is a source as it is; inside the call, the module's own"


@row("vmap ensembles (`stack_module_state`), per-sample gradients", "sklearn", quick=True)
def ensembles(look: Look) -> str:
    from torch.func import functional_call, grad, stack_module_state, vmap

    models = [nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)) for _ in range(3)]
    params, buffers = stack_module_state(models)
    images, labels = batch(0)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(base, (params, buffers), (x,)), y)

    look(params)
    look(vmap(grad(loss), (0, None, None))(params, images, labels))
    one = {name: p.detach()[0] for name, p in params.items()}
    look(vmap(grad(loss), (None, 0, 0))(one, images[:8, None], labels[:8, None]))
    vmap(loss, (0, None, None))(params, images, labels).sum().backward()
    look(params)
    return "stacked parameters and gradients as they are"


def look_from_inside(look: Look, transform: Callable[[Loss], object], **w: Tensor) -> None:
    """`summarize` within a function that torch.func transforms; compared outside of it."""
    inside: list[paramstats.Summary] = []

    def loss(w: Tensor) -> Tensor:
        inside.append(paramstats.summarize({"w": w, "closed over": closed_over}))
        return w.square().sum()

    def compare() -> int:
        inside.clear()
        transform(loss)
        check(inside[0]["closed over"], closed_over)
        if "w" in w:
            check(inside[0]["w"], w["w"])
        else:
            assert math.isnan(inside[0]["w"].mean)
            look.messages[f"skipped: {inside[0].skipped['w']}"] = None
        return 1 + len(w)

    closed_over = torch.randn(50)
    look.each(compare)


@row("A call inside `torch.func.grad`, `jvp`, `vjp`", quick=True)
def inside_grad(look: Look) -> str:
    from torch.func import grad, jvp, vjp

    w = torch.randn(40, 30)
    look_from_inside(look, lambda loss: grad(loss)(w), w=w)
    look_from_inside(look, lambda loss: jvp(loss, (w,), (w,)), w=w)
    look_from_inside(look, lambda loss: vjp(loss, w), w=w)
    return "the values that are differentiated"


@row("A call inside `torch.vmap`", quick=True)
def inside_vmap(look: Look) -> str:
    look_from_inside(look, lambda loss: torch.vmap(loss)(torch.randn(5, 7)))
    look_from_inside(look, lambda loss: torch.vmap(torch.func.grad(loss))(torch.randn(5, 7)))
    return "what is batched is skipped, the rest read"


@row("Fake tensors (`FakeTensorMode`) and the meta device", quick=True)
def fake(look: Look) -> str:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def without_figures() -> int:
        summary = paramstats.summarize(nn.Linear(3, 2, device="meta"))
        assert summary["weight"].shape == (2, 3) and not summary.skipped
        assert all(math.isnan(stats.norm) for stats in summary.values())
        return 0

    with FakeTensorMode():
        model = nn.Linear(3, 2)
    look(model, skipped={"weight": "FakeTensor", "bias": "FakeTensor"})
    look.each(without_figures)
    return "fake: in `summary.skipped`; meta: statistics NaN, and not in `summary.skipped`"


@row(
    "A state_dict, loads with `assign=True` and `mmap=True`, copies, pickles, casts",
    "sklearn",
    quick=True,
)
def copies(look: Look) -> None:
    import io

    model = train(classifier())
    look(model.state_dict())
    other = classifier()
    other.load_state_dict(model.state_dict(), assign=True)
    look(other)
    look(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    look(torch.load(file, weights_only=False))
    with tempfile.NamedTemporaryFile() as weights:
        torch.save(model.state_dict(), weights.name)
        mapped = torch.load(weights.name, mmap=True)
        look(mapped)
        other.load_state_dict(mapped, assign=True)
        look(other)
    look(model.to(torch.bfloat16))
    look(model.half())
    model.share_memory()
    look(model)


@row("An optimizer, or its state_dict", "sklearn", quick=True)
def optimizers(look: Look) -> str:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer=optimizer)
    look.refused(
        lambda: paramstats.summarize(optimizer),
        TypeError,
        "expected an nn.Module",
        "pass the model",
        what="the optimizer",
    )
    look.refused(
        lambda: paramstats.summarize(optimizer.state_dict()),
        TypeError,
        "expected",
        "got dict",
        what="its `state_dict()`",
    )
    names = {id(p): name for name, p in model.named_parameters()}
    look({f"{names[id(p)]}.{key}": value for p, state in optimizer.state.items()
          for key, value in state.items()})  # fmt: skip
    return "both are refused; its moments, as a mapping of names to tensors, are read"
