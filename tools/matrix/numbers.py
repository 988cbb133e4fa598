"""Rows about quantization and number formats."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import paramstats
from tools.matrix.checker import Checker
from tools.matrix.rows import NotRunError, row
from tools.matrix.training import batch, train


def linears(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A trained model whose sizes suit every kind of quantization."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    return train(model).to(dtype)


@row("Dynamic int8 (`quantize_dynamic`)", "sklearn", quick=True)
def dynamic_int8(check: Checker) -> str:
    torch.backends.quantized.backend = "fbgemm"
    model = torch.ao.quantization.quantize_dynamic(linears(), {nn.Linear}, dtype=torch.qint8)
    model(batch(0)[0])
    assert len(check(model)) == 0
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
    check({f"{name}.weight": layer.weight() for name, layer in layers.items()})
    check({f"{name}.bias": layer.bias() for name, layer in layers.items()})
    check.refused(
        lambda: paramstats.summarize(model.state_dict()),
        TypeError, "expected a torch.Tensor", "got torch.dtype", "leave it out with exclude",
    )  # fmt: skip
    check.each(lambda: len(paramstats.summarize(model.state_dict(), exclude=r"_packed_params")) - 4)
    return (
        "torch lists no parameters of such a model `q`: pass `{name: layer.weight()}`, whose "
        'dequantized values are read. `q.state_dict()` needs `exclude="_packed_params"`'
    )


@row("Static quantization: observers, fake quantization, qint8 per channel", "sklearn", quick=True)
def static_int8(check: Checker) -> None:
    torch.backends.quantized.backend = "fbgemm"
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
        torch.ao.quantization.DeQuantStub(),
    )  # fmt: skip
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(model.train(), inplace=True)
    images = batch(0)[0]
    for _ in range(2):
        model.zero_grad()
        model(images).logsumexp(1).mean().backward()
        check(model)
    converted = torch.ao.quantization.convert(model.eval())
    weights = {f"{i}.weight": converted[i].weight() for i in (1, 3)}
    assert all(w.qscheme() == torch.per_channel_affine for w in weights.values())
    check(weights)


def _torchao(check: Checker, config: object) -> None:
    from torchao.quantization import quantize_

    model = linears(torch.bfloat16)
    quantize_(model, config)
    model(batch(0)[0].to(torch.bfloat16))
    check(model)
    check(model.state_dict())


@row("torchao: int8, float8 and unpacked int4, int2 weights", "torchao", "sklearn")
def torchao_weights(check: Checker) -> str:
    from torchao import quantization as q

    for config in (
        q.Int8WeightOnlyConfig(),
        q.Int8DynamicActivationInt8WeightConfig(),
        q.Float8WeightOnlyConfig(),
        q.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        q.IntxWeightOnlyConfig(weight_dtype=torch.int2),
    ):
        _torchao(check, config)
    return "read with `dequantize()`; shape and dtype are those of the subclass"


@row("torchao: packed int4 (`Int4WeightOnlyConfig`)", "torchao", "sklearn")
def torchao_int4(check: Checker) -> None:
    from torchao.quantization import Int4WeightOnlyConfig

    try:
        _torchao(check, Int4WeightOnlyConfig(group_size=32))
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise NotRunError(f"torchao has no kernels for this machine ({error})") from error


@row("torchao: NF4 base weights under LoRA", "torchao", "sklearn")
def torchao_nf4(check: Checker) -> None:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(to_nf4(torch.randn(256, 64)), requires_grad=False)
            self.a = nn.Parameter(torch.randn(4, 64) / 8)
            self.b = nn.Parameter(torch.zeros(256, 4))

        def forward(self, x: Tensor) -> Tensor:
            return linear_nf4(x, self.base) + x @ self.a.T @ self.b.T

    model = Adapted()
    train(model, lambda m: check(m, truth={"base": m.base.get_original_weight()}))


@row("torchao: quantization-aware and float8 training", "torchao", "sklearn")
def torchao_training(check: Checker) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    )
    model = linears()
    quantize_(model, QATConfig(config, step="prepare"))
    train(model, check)
    quantize_(model, QATConfig(config, step="convert"))
    check(model)
    model = linears()
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
    train(model, check)


@row("torchao: training of int8 weights", "torchao", "sklearn")
def torchao_int8_training(check: Checker) -> None:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    model = linears()
    quantize_(model, int8_weight_only_quantized_training())
    train(model, check, torch.optim.SGD(model.parameters(), lr=0.1))


@row("torchao: 8-bit Adam", "torchao", "sklearn")
def torchao_adam(check: Checker) -> str:
    from torchao.optim import AdamW8bit

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = AdamW8bit(model.parameters())
    train(model, check, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    check({f"{names[id(p)]}.{key}": value for p, state in optimizer.state.items()
          for key, value in state.items() if isinstance(value, Tensor)})  # fmt: skip
    return "also the optimizer's state, with `dequantize()`"


@row("bitsandbytes: 8-bit and 4-bit linear layers", "bitsandbytes", "sklearn")
def bitsandbytes(check: Checker) -> str:
    import bitsandbytes as bnb

    layers = {
        "int8": bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        "fp4": bnb.nn.Linear4bit(64, 64, quant_type="fp4"),
        "nf4": bnb.nn.Linear4bit(64, 64, quant_type="nf4"),
    }
    for layer in layers.values():
        layer.to("cpu")
        layer(batch(0)[0])
        check(layer, truth={"weight": layer.weight.data})
    weight = layers["nf4"].weight
    check({"weight": bnb.functional.dequantize_4bit(weight.data, weight.quant_state)})
    return "the stored codes (uint8, int8) are read; for values pass `dequantize_4bit(...)`"


@row("float8 weights and gradients, all five formats", quick=True)
def float8(check: Checker) -> None:
    torch.manual_seed(0)
    for dtype in (
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ):  # fmt: skip
        values = torch.randn(300, 70)
        values = values.abs() if dtype == torch.float8_e8m0fnu else values
        weight = nn.Parameter(values.to(dtype), requires_grad=False)
        weight.grad = values.flip(0).to(dtype)
        check({"weight": weight})
        check({"bytes": torch.arange(256, dtype=torch.uint8).view(dtype)})


@row("A Fourier neural operator of neuraloperator", "neuralop")
def neural_operator(check: Checker) -> None:
    from neuralop.models import FNO

    for options in ({}, {"factorization": "tucker", "implementation": "factorized", "rank": 0.2}):
        torch.manual_seed(0)
        model = FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2,
                    **options)  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        x = torch.randn(2, 1, 16, 16)
        for _ in range(2):
            optimizer.zero_grad()
            functional.mse_loss(model(x), x.cumsum(-1)).backward()
            check(model)
            optimizer.step()


@row("Masked tensors (`torch.masked`)", quick=True)
def masked(check: Checker) -> str:
    from torch.masked import masked_tensor

    data = torch.randn(50)
    reason = "MaskedTensor has no operator"
    check({"masked": masked_tensor(data, data > 0), "data": data}, skipped={"masked": reason})
    return "masked tensors are skipped, others are read"
