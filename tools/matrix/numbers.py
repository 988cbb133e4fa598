"""Kinds of numbers: quantised, float8, complex, sparse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import paramstats
from tools.matrix.looking import Look, Observe, same_training
from tools.matrix.rows import NotRunError, row
from tools.matrix.training import batch, classifier, train


def linears(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Trained on digits, of sizes that every kind of quantisation takes."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    return train(model).to(dtype)


@row("Dynamic int8 (`quantize_dynamic`)", "sklearn", quick=True)
def dynamic_int8(look: Look) -> str:
    torch.backends.quantized.backend = "fbgemm"
    model = torch.ao.quantization.quantize_dynamic(linears(), {nn.Linear}, dtype=torch.qint8)
    model(batch(0)[0])
    assert len(look(model)) == 0
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
    look({f"{name}.weight": layer.weight() for name, layer in layers.items()})
    look({f"{name}.bias": layer.bias() for name, layer in layers.items()})
    look.refused(
        lambda: paramstats.summarize(model.state_dict()),
        TypeError, "expected a torch.Tensor", "got torch.dtype", "leave it out with exclude",
        what="`q.state_dict()`",
    )  # fmt: skip
    look.each(lambda: len(paramstats.summarize(model.state_dict(), exclude=r"_packed_params")) - 4)
    return (
        "torch lists no parameters of such a model `q`; pass `{name: layer.weight()}`, read as "
        'dequantised; refused: `q.state_dict()`, unless with `exclude="_packed_params"`'
    )


@row("Static quantisation: observers, fake quantisation, qint8 per channel", "sklearn", quick=True)
def static_int8(look: Look) -> None:
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
        look(model)
    made = torch.ao.quantization.convert(model.eval())
    made(images)
    weights = {n: m.weight() for n, m in made.named_modules() if callable(getattr(m, "weight", 0))}
    assert all(w.qscheme() == torch.per_channel_affine for w in weights.values())
    look(weights)


def _torchao(look: Look, config: object) -> None:
    from torchao.quantization import quantize_

    model = linears(torch.bfloat16)
    quantize_(model, config)
    model(batch(0)[0].to(torch.bfloat16))
    look(model)
    look(model.state_dict())


@row("torchao: int8, weights alone and with dynamic activations", "torchao", "sklearn")
def torchao_int8(look: Look) -> str:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    _torchao(look, Int8WeightOnlyConfig())
    _torchao(look, Int8DynamicActivationInt8WeightConfig())
    return "through `dequantize()`; shape and dtype as the subclass says"


@row("torchao: int4 and other intx, unpacked", "torchao", "sklearn")
def torchao_intx(look: Look) -> None:
    from torchao.quantization import IntxWeightOnlyConfig

    _torchao(look, IntxWeightOnlyConfig(weight_dtype=torch.int4))
    _torchao(look, IntxWeightOnlyConfig(weight_dtype=torch.int2))


@row("torchao: int4, packed (`Int4WeightOnlyConfig`)", "torchao", "sklearn")
def torchao_int4(look: Look) -> None:
    from torchao.quantization import Int4WeightOnlyConfig

    try:
        _torchao(look, Int4WeightOnlyConfig(group_size=32))
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise NotRunError(f"torchao has no kernels for it here ({error})") from error


@row("torchao: float8 weights", "torchao", "sklearn")
def torchao_float8(look: Look) -> None:
    from torchao.quantization import Float8WeightOnlyConfig

    _torchao(look, Float8WeightOnlyConfig())


@row("torchao: NF4 base weights under LoRA", "torchao", "sklearn")
def torchao_nf4(look: Look) -> None:
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
    train(model, lambda m: look(m, truth={"base": m.base.get_original_weight()}))


@row("torchao: quantisation-aware and float8 training", "torchao", "sklearn")
def torchao_training(look: Look) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    aware = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    )
    model = linears()
    quantize_(model, QATConfig(aware, step="prepare"))
    train(model, look)
    quantize_(model, QATConfig(aware, step="convert"))
    look(model)
    model = linears()
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
    train(model, look)


@row("torchao: int8 weights that are trained as they are", "torchao", "sklearn")
def torchao_int8_training(look: Look) -> None:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    model = linears()
    quantize_(model, int8_weight_only_quantized_training())
    train(model, look, torch.optim.SGD(model.parameters(), lr=0.1))


@row("torchao: 8-bit Adam", "torchao", "sklearn")
def torchao_adam(look: Look) -> str:
    from torchao.optim import AdamW8bit

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = AdamW8bit(model.parameters())
    train(model, look, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    look({f"{names[id(p)]}.{key}": value for p, state in optimizer.state.items()
          for key, value in state.items() if isinstance(value, Tensor)})  # fmt: skip
    return "its state, too, through `dequantize()`"


@row("bitsandbytes: 8-bit and 4-bit linear layers", "bitsandbytes", "sklearn")
def bitsandbytes(look: Look) -> str:
    import bitsandbytes as bnb

    layers = {
        "int8": bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        "fp4": bnb.nn.Linear4bit(64, 64, quant_type="fp4"),
        "nf4": bnb.nn.Linear4bit(64, 64, quant_type="nf4"),
    }
    for layer in layers.values():
        layer.to("cpu")
        layer(batch(0)[0])
        look(layer, truth={"weight": layer.weight.data})
    weight = layers["nf4"].weight
    look({"weight": bnb.functional.dequantize_4bit(weight.data, weight.quant_state)})
    return "the codes as stored (uint8, int8), in `total`, too; as numbers: `dequantize_4bit`"


@row("float8 weights and gradients, all five formats", quick=True)
def float8(look: Look) -> None:
    torch.manual_seed(0)
    for dtype in (
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ):  # fmt: skip
        values = torch.randn(300, 70)
        values = values.abs() if dtype == torch.float8_e8m0fnu else values
        weight = nn.Parameter(values.to(dtype), requires_grad=False)
        weight.grad = values.flip(0).to(dtype)
        look({"weight": weight})
        look({"bytes": torch.arange(256, dtype=torch.uint8).view(dtype)})


@row("float8 training: master weights cast to float8 each step", "sklearn", quick=True)
def float8_training(look: Look) -> None:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.scale = self.weight.detach().abs().amax() / 448
            self.cast = (self.weight.detach() / self.scale).to(torch.float8_e4m3fn)
            straight = self.cast.float() * self.scale + self.weight - self.weight.detach()
            return functional.linear(x, straight, self.bias)

    def run(observe: Observe) -> nn.Module:
        model = nn.Sequential(Cast(64, 32), nn.ReLU(), Cast(32, 10))

        def both(model: nn.Module) -> None:
            observe(model)
            observe({"0": model[0].cast, "2": model[2].cast})

        return train(model, both)

    same_training(look, run)


@row("Packed and narrow types: float4, int4, uint4, bits8", quick=True)
def packed(look: Look) -> str:
    for dtype in (torch.float4_e2m1fn_x2, torch.int4, torch.uint4, torch.bits8):
        codes = torch.randint(0, 255, (64,), dtype=torch.uint8)
        look(
            {"packed": codes.view(dtype), "codes": codes},
            skipped={"packed": f"torch has no conversion .*{dtype}"},
        )
    return "the packed are skipped, the rest read; their bytes are read, too: `.view(torch.uint8)`"


@row("Spectral convolution with complex weights (an FNO of our own)", quick=True)
def spectral_convolution(look: Look) -> str:
    class Spectral(nn.Module):
        def __init__(self, width: int, modes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)
            self.local = nn.Conv1d(width, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            waves = torch.fft.rfft(x)
            modes = self.weight.shape[-1]
            kept = torch.einsum("bim,iom->bom", waves[..., :modes], self.weight)
            return functional.gelu(torch.fft.irfft(kept, n=x.shape[-1]) + self.local(x))

    def run(observe: Observe) -> nn.Module:
        model = nn.Sequential(
            nn.Conv1d(1, 8, 1), Spectral(8, 12), Spectral(8, 12), nn.Conv1d(8, 1, 1)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        grid = torch.linspace(0, 2 * math.pi, 64)
        for step in range(3):
            wave = torch.sin(grid * (step + 1))[None, None]
            optimizer.zero_grad()
            functional.mse_loss(model(wave), wave.cumsum(-1) / 64).backward()
            observe(model)
            optimizer.step()
        return model

    model = same_training(look, run)
    assert look(model.to(torch.complex128))["1.weight"].dtype == torch.complex128
    look({"conj": model[1].weight.conj(), "imag": model[1].weight.imag})
    return "`mean` is the modulus of the mean, `min` and `max` are of moduli"


@row("A Fourier neural operator of neuraloperator", "neuralop")
def neural_operator(look: Look) -> None:
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
            look(model)
            optimizer.step()


@row("Sparse embeddings: SparseAdam, EmbeddingBag, padding", quick=True)
def sparse_embedding(look: Look) -> str:
    def run(observe: Observe) -> nn.Module:
        model = nn.ModuleDict({
            "words": nn.Embedding(3000, 16, sparse=True, padding_idx=0),
            "bags": nn.EmbeddingBag(500, 16, sparse=True, mode="sum"),
        })  # fmt: skip
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
        for _ in range(3):
            ids = torch.randint(0, 500, (8, 20))
            optimizer.zero_grad()
            (model["words"](ids).mean(1) - model["bags"](ids)).square().sum().backward()
            observe(model)
            optimizer.step()
        assert model["words"].weight.grad.is_sparse
        return model

    model = same_training(look, run)
    assert look(model, grad_scale=512.0)["words.weight"].grad.zero_count > 2000 * 16
    return "the statistics of the dense gradient, which is never made"


@row("Sparse parameters: COO, CSR, BSR weights", quick=True)
def sparse_weights(look: Look) -> None:
    dense = torch.randn(64, 96) * (torch.rand(64, 96) > 0.9)
    look({
        "coo": dense.to_sparse_coo(),
        "uncoalesced": torch.sparse_coo_tensor([[1, 1, 2]], [1.0, 2.0, -3.0], (5,)),
        "csr": dense.to_sparse_csr(),
        "bsr": dense.to_sparse_bsr((8, 8)),
    })  # fmt: skip
    weight = nn.Parameter(dense.to_sparse_coo().coalesce())
    torch.sparse.mm(weight, torch.randn(96, 4)).sum().backward()
    look({"weight": weight})


@row("Nested (ragged) tensors", quick=True)
def nested(look: Look) -> str:
    parts = [torch.ones(2, 3), torch.ones(3, 3)]
    ragged = torch.nested.nested_tensor(parts, layout=torch.jagged)

    def compare() -> int:
        summary = paramstats.summarize({"ragged": ragged, "plain": torch.ones(4)})
        assert math.isnan(summary["ragged"].mean) and summary["plain"].norm == 2
        read = paramstats.summarize({str(i): part for i, part in enumerate(ragged.unbind())})
        assert [stats.count for stats in read.values()] == [6, 9] and not read.skipped
        look.messages[f"skipped: {summary.skipped['ragged']}"] = None
        return 1

    look.each(compare)
    return "the nested one is skipped, the rest read; its parts are read, too: `.unbind()`"


@row("Masked tensors (`torch.masked`)", quick=True)
def masked(look: Look) -> str:
    from torch.masked import masked_tensor

    data = torch.randn(50)
    reason = "MaskedTensor has no operator that gives its elements"
    look({"masked": masked_tensor(data, data > 0), "data": data}, skipped={"masked": reason})
    return "the masked one is skipped, the rest read"


@row("bfloat16, float16 and float64 weights", "sklearn", quick=True)
def precisions(look: Look) -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        model = classifier().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            images, labels = batch(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(images.to(dtype)), labels).backward()
            look(model)
            optimizer.step()


@row("Lazy layers before their first batch", quick=True)
def lazy(look: Look) -> str:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 2))

    def compare() -> int:
        summary = paramstats.summarize(model, buffers=True)
        assert summary["0.weight"].shape is None and math.isnan(summary["0.weight"].norm)
        assert summary.total.count == 18 and "lazy" in str(summary)
        return 1

    look.each(compare)
    model(torch.randn(4, 5)).sum().backward()
    look(model)
    return "listed without a shape, statistics NaN"
