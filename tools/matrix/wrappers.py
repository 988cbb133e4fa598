"""Rows about parametrizations, adapters, compilers, transforms and copies of models."""

from __future__ import annotations

import copy
import socket
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import paramstats
from tools.matrix.checker import Checker, Observe, same_training
from tools.matrix.rows import NotRunError, row
from tools.matrix.training import batch, classifier, train


@row("`parametrizations.weight_norm`", "sklearn", quick=True)
def weight_norm(check: Checker) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        parametrizations.weight_norm(model[0])
        return train(model, observe)

    model = same_training(check, run)
    summary = check(model)
    assert "0.parametrizations.weight.original0" in summary
    check({"effective": model[0].weight})
    return "listed as `parametrizations.weight.original0` (magnitude) and `original1` (direction)"


@row("`parametrizations.spectral_norm` and `orthogonal`", "sklearn", quick=True)
def spectral_norm(check: Checker) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        parametrizations.spectral_norm(model[0])
        parametrizations.orthogonal(model[3], orthogonal_map="householder")
        return train(model, observe)

    model = same_training(check, run)
    assert check(model)["0.parametrizations.weight.0._u"].kind == "buffer"
    with parametrize.cached():
        check(model)
    effective = check({"w": model[0].weight})["w"]
    parametrize.remove_parametrizations(model[0], "weight")
    assert check(model)["0.weight"].count == effective.count
    return "the vectors of the power iteration are buffers; also with `cached()` and after removal"


@row("Pruning, several times, then made permanent", "sklearn", quick=True)
def pruning(check: Checker) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        for amount in (0.25, 0.5):
            prune.l1_unstructured(model[0], "weight", amount=amount)
            train(model, observe)
        prune.ln_structured(model[3], "weight", amount=0.5, n=2, dim=1)
        return train(model, observe)

    model = same_training(check, run)
    masked = check({"weight": model[0].weight})["weight"]
    assert masked.zero_count >= 0.6 * masked.count
    mask = check(model)["0.weight_mask"]
    assert (mask.kind, mask.zero_fraction) == ("buffer", masked.zero_fraction)
    prune.remove(model[0], "weight")
    assert check(model)["0.weight"].zero_fraction == masked.zero_fraction
    return (
        "listed as `weight_orig`, with the mask as a buffer; for the pruned weight pass "
        '`{"w": layer.weight}`'
    )


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
def lora(check: Checker) -> str:
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

        model = same_training(check, run)
        summary = check(model)
        base = [entry for entry in summary.values() if not entry.requires_grad]
        assert base and all(entry.grad is None for entry in base if entry.kind == "param")
        if isinstance(config, peft.LoraConfig):
            check(model.merge_and_unload())
    return "base weights have `requires_grad=False` and no gradient"


@row("`torch.compile` with inductor and aot_eager", "sklearn")
def compiled(check: Checker) -> None:
    from torch._dynamo.utils import counters

    for backend in ("aot_eager", "inductor"):

        def run(observe: Observe, backend: str = backend) -> nn.Module:
            torch._dynamo.reset()
            counters.clear()
            model = train(torch.compile(classifier(), backend=backend), observe)
            assert counters["stats"]["unique_graphs"] > 0
            return model

        try:
            same_training(check, run)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise NotRunError(f"inductor has no working C++ compiler here ({error})") from error


@row("`torch.fx` graph modules, `torch.export`", "sklearn", quick=True)
def exported(check: Checker) -> None:
    def traced(observe: Observe) -> nn.Module:
        return train(torch.fx.symbolic_trace(classifier()), observe)

    same_training(check, traced)
    exported = torch.export.export(classifier(), (batch(0)[0],))
    check(exported.module())
    check(exported.state_dict)


@row("`nn.DataParallel` and `DistributedDataParallel`", "sklearn", quick=True)
def data_parallel(check: Checker) -> str:
    import torch.distributed as dist

    def in_turn(observe: Observe) -> nn.Module:
        return train(nn.DataParallel(classifier()), observe)

    def distributed(observe: Observe) -> nn.Module:
        return train(nn.parallel.DistributedDataParallel(classifier()), observe)

    same_training(check, in_turn)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if not dist.is_available() or dist.is_initialized():
        raise NotRunError("a process group exists already" if dist.is_available() else "no gloo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        same_training(check, distributed)
    finally:
        dist.destroy_process_group()
    return "DDP's gradients are views of its buckets"


@row("`torch.func.functional_call`, `nn.utils.stateless`", "sklearn", quick=True)
def functional_calls(check: Checker) -> str:
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
            check(params)
            check(dict(zip(params, grads, strict=True)))
    return "pass the dict of parameters"


@row("vmap ensembles (`stack_module_state`), per-sample gradients", "sklearn", quick=True)
def ensembles(check: Checker) -> str:
    from torch.func import functional_call, grad, stack_module_state, vmap

    models = [nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)) for _ in range(3)]
    params, buffers = stack_module_state(models)
    images, labels = batch(0)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(base, (params, buffers), (x,)), y)

    check(params)
    check(vmap(grad(loss), (0, None, None))(params, images, labels))
    one = {name: p.detach()[0] for name, p in params.items()}
    check(vmap(grad(loss), (None, 0, 0))(one, images[:8, None], labels[:8, None]))
    vmap(loss, (0, None, None))(params, images, labels).sum().backward()
    check(params)
    return "stacked parameters and gradients are read as stored"


@row(
    "state_dict, `assign=True`, `mmap=True`, copies, pickles, casts",
    "sklearn",
    quick=True,
)
def copies(check: Checker) -> None:
    import io

    model = train(classifier())
    check(model.state_dict())
    other = classifier()
    other.load_state_dict(model.state_dict(), assign=True)
    check(other)
    check(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    check(torch.load(file, weights_only=False))
    with tempfile.NamedTemporaryFile() as weights:
        torch.save(model.state_dict(), weights.name)
        mapped = torch.load(weights.name, mmap=True)
        check(mapped)
        other.load_state_dict(mapped, assign=True)
        check(other)
    check(model.to(torch.bfloat16))
    check(model.half())
    model.share_memory()
    check(model)


@row("The state of an optimizer", "sklearn", quick=True)
def optimizers(check: Checker) -> str:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer=optimizer)
    check.refused(lambda: paramstats.summarize(optimizer), TypeError)
    names = {id(p): name for name, p in model.named_parameters()}
    check({f"{names[id(p)]}.{key}": value for p, state in optimizer.state.items()
          for key, value in state.items()})  # fmt: skip
    return (
        "an optimizer is refused as the source; `summarize(model, optimizer=optimizer)` reads its "
        "state"
    )
