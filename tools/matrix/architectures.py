"""Rows about architectures: small configurations of transformers and of other libraries.

Each model is trained for two steps, on its own loss or on the mean square of its first output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tools.matrix.checker import Checker, Observe, unobserved
from tools.matrix.rows import NotRunError, row

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
LATENT = EXPERTS | {"n_routed_experts": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1,
                    "topk_group": 1}  # fmt: skip
"""Latent attention, as in DeepSeek models."""
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
IMAGE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "image_size": 32, "patch_size": 8}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "embedding_size": 16}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
           "num_heads": [2, 4], "window_size": 4}  # fmt: skip
PYRAMID = {"image_size": 32, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
           "num_attention_heads": [1, 2, 2, 2]}  # fmt: skip
AUDIO = {
    **TEXT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip

LLAMAS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo",
    "olmo2", "stablelm", "granite", "starcoder2", "cohere", "glm", "nemotron", "smollm3",
)  # fmt: skip

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": dict(TEXT, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": TEXT,
    "falcon": TEXT,
    "gptj": dict(GPT, rotary_dim=4),
    "codegen": dict(GPT, rotary_dim=4),
    "opt": dict(TEXT, ffn_dim=40, word_embed_proj_dim=32),
    "bloom": dict(TEXT, n_layer=2, n_head=4),
    "mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "xglm": {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 40},
    **dict.fromkeys(LLAMAS, GROUPED),
    **dict.fromkeys(
        ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss"],
        GROUPED | EXPERTS,
    ),
    "deepseek_v2": dict(TEXT | LATENT, n_group=1),
    "deepseek_v3": dict(TEXT | LATENT, n_group=2),
    "mamba": dict(TEXT, state_size=8),
    "mamba2": dict(TEXT, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "rwkv": dict(TEXT, attention_hidden_size=32),
    "recurrent_gemma": dict(GROUPED, num_hidden_layers=3, lru_width=32),
    "jamba": dict(
        GROUPED | EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "xlnet": {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40},
}
ENCODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "fnet", "layoutlm", "ibert"], TEXT
    ),
    "electra": dict(TEXT, embedding_size=16),
    "albert": dict(TEXT, embedding_size=16),
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    "deberta": dict(TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": dict(TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    **dict.fromkeys(["convbert", "squeezebert", "roformer"], TEXT | {"embedding_size": 32}),
    "longformer": dict(TEXT, attention_window=4),
    "big_bird": dict(TEXT, attention_type="original_full"),
    "mobilebert": dict(TEXT, intra_bottleneck_size=16, embedding_size=16, true_hidden_size=16),
    "nystromformer": dict(TEXT, num_landmarks=4, segment_means_seq_len=12),
    "esm": dict(TEXT, mask_token_id=3),
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["t5", "mt5", "umt5"], T5),
    "longt5": dict(T5, local_radius=3),
    "switch_transformers": dict(T5, num_experts=4, num_decoder_layers=2),
    **dict.fromkeys(["bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot"], SEQ2SEQ),
    "led": dict(
        SEQ2SEQ,
        max_encoder_position_embeddings=64,
        attention_window=4,
        max_decoder_position_embeddings=64,
    ),
}
IMAGE_MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["vit", "beit", "dinov2"], IMAGE),
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    **dict.fromkeys(["convnext", "convnextv2", "resnet"], STAGES),
    "regnet": dict(STAGES, groups_width=8),
    "bit": dict(STAGES, num_groups=8),
    "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25},
    "efficientnet": {
        "image_size": 32,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "hidden_dim": 320,
    },
    "poolformer": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "pvt": PYRAMID,
    "segformer": dict(PYRAMID, decoder_hidden_size=16),
}
VIDEO_MODELS: dict[str, dict[str, Any]] = {
    "timesformer": dict(IMAGE, num_frames=2),
    "videomae": dict(IMAGE, num_frames=2, tubelet_size=1),
    "vivit": dict(IMAGE, num_frames=2, tubelet_size=[2, 8, 8]),
}
AUDIO_MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["wav2vec2", "hubert", "wavlm", "unispeech", "data2vec-audio"], AUDIO),
    "sew": dict(AUDIO, squeeze_factor=2),
}


def _ids() -> Tensor:
    return torch.randint(3, 99, (2, 12))


def _text() -> dict[str, Tensor]:
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _videos() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 2, 3, 32, 32)}


def _audio() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800)}


def _first_float(values: Any) -> Tensor | None:
    """The first floating-point output that requires a gradient."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() and values.requires_grad else None
    parts = values.values() if isinstance(values, dict) else values
    found = (_first_float(v) for v in parts if isinstance(v, (Tensor, tuple, list, dict)))
    return next((tensor for tensor in found if tensor is not None), None)


def train(model: nn.Module, inputs: dict[str, Any], observe: Observe, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(**inputs)
        loss = getattr(outputs, "loss", None)
        if loss is None:
            loss = _first_float(outputs).float().square().mean()
        loss.backward()
        observe(model)
        optimizer.step()


Make = Callable[[], tuple[nn.Module, dict[str, Any]]]
"""Creates a model and its inputs."""


def check_all(check: Checker, models: Iterable[tuple[str, Make]]) -> str:
    """Checks every model; those that do not run without paramstats are listed with the reason."""
    ran, not_run = [], []
    for name, make in models:
        torch.manual_seed(0)
        try:
            model, inputs = make()
            train(model.train(), inputs, unobserved, steps=1)
        except Exception as error:  # paramstats was not called yet
            not_run.append(f"{name} ({type(error).__name__}: {str(error).splitlines()[0][:60]})")
            continue
        train(model, inputs, check, steps=2)
        check(model.state_dict())
        if check.failures:
            raise AssertionError(f"{name}: {next(iter(check.failures.values()))}")
        ran.append(name)
    if not ran:
        raise NotRunError("; ".join(not_run))
    listed = f"{len(ran)}: {', '.join(ran)}"
    return listed + (f"; not run: {'; '.join(not_run)}" if not_run else "")


def _auto_class(
    auto: str, configs: Mapping[str, dict[str, Any]], inputs: Callable[[], dict[str, Any]]
) -> Iterator[tuple[str, Make]]:
    import transformers

    for name, options in configs.items():

        def make(name: str = name, options: dict[str, Any] = options) -> tuple[nn.Module, Any]:
            config = transformers.AutoConfig.for_model(name, **options)
            return getattr(transformers, auto).from_config(config), inputs()

        yield name, make


@row("Language models of transformers", "transformers")
def language_models(check: Checker) -> str:
    return check_all(check, _auto_class("AutoModelForCausalLM", LANGUAGE_MODELS, _text))


@row("Text encoders of transformers", "transformers")
def encoders(check: Checker) -> str:
    return check_all(check, _auto_class("AutoModelForMaskedLM", ENCODERS, _text))


@row("Encoder-decoder models of transformers", "transformers")
def encoder_decoders(check: Checker) -> str:
    return check_all(check, _auto_class("AutoModelForSeq2SeqLM", ENCODER_DECODERS, _text))


@row("Image models of transformers", "transformers")
def image_models(check: Checker) -> str:
    return check_all(check, _auto_class("AutoModelForImageClassification", IMAGE_MODELS, _images))


@row("Video models of transformers", "transformers")
def video_models(check: Checker) -> str:
    return check_all(check, _auto_class("AutoModelForVideoClassification", VIDEO_MODELS, _videos))


@row("Audio models of transformers", "transformers")
def audio_models(check: Checker) -> str:
    return check_all(check, _auto_class("AutoModel", AUDIO_MODELS, _audio))


@row("Other models of transformers: multimodal, detection, time series", "transformers")
def others(check: Checker) -> str:
    import transformers as t

    pairs = {**_images(), "input_ids": _ids(), "return_loss": True}

    def two_towers(config: type, model: type, **options: int) -> Make:
        return lambda: (model(config(text_config=TEXT, vision_config=IMAGE, **options)), pairs)

    steps = torch.arange(6).repeat(2, 1)
    decisions = {
        "states": torch.randn(2, 6, 5), "actions": torch.randn(2, 6, 3), "timesteps": steps,
        "rewards": torch.randn(2, 6, 1), "returns_to_go": torch.randn(2, 6, 1),
    }  # fmt: skip
    series = {
        "past_values": torch.rand(2, 18), "past_time_features": torch.randn(2, 18, 1),
        "past_observed_mask": torch.ones(2, 18), "future_values": torch.rand(2, 4),
        "future_time_features": torch.randn(2, 4, 1),
    }  # fmt: skip
    backbone = t.ResNetConfig(**STAGES, out_features=["stage2"])
    return check_all(check, [
        ("clip", two_towers(t.CLIPConfig, t.CLIPModel, projection_dim=16)),
        ("siglip", two_towers(t.SiglipConfig, t.SiglipModel)),
        ("blip", two_towers(t.BlipConfig, t.BlipModel, projection_dim=16)),
        ("vilt", lambda: (
            t.ViltForQuestionAnswering(t.ViltConfig(**(TEXT | IMAGE), num_labels=3)),
            {**_images(), "input_ids": _ids()},
        )),
        ("deit", lambda: (t.DeiTForImageClassification(t.DeiTConfig(**IMAGE)), _images())),
        ("detr", lambda: (
            t.DetrForObjectDetection(t.DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
                decoder_ffn_dim=40, num_queries=5,
            )),
            {"pixel_values": torch.randn(1, 3, 64, 64)},
        )),
        ("whisper", lambda: (
            t.WhisperForConditionalGeneration(t.WhisperConfig(
                **SEQ2SEQ, num_mel_bins=16, max_source_positions=20, max_target_positions=64)),
            {"input_features": torch.randn(2, 16, 40), "labels": _ids()},
        )),
        ("decision_transformer", lambda: (
            t.DecisionTransformerModel(t.DecisionTransformerConfig(
                state_dim=5, act_dim=3, hidden_size=32, n_layer=1, n_head=2, max_ep_len=50)),
            decisions,
        )),
        ("time_series_transformer", lambda: (
            t.TimeSeriesTransformerForPrediction(t.TimeSeriesTransformerConfig(
                prediction_length=4, context_length=16, lags_sequence=[1, 2],
                num_time_features=1, d_model=16, encoder_layers=1, decoder_layers=1,
                encoder_ffn_dim=24, decoder_ffn_dim=24)),
            series,
        )),
    ])  # fmt: skip


@row("Graph networks of torch-geometric", "torch_geometric")
def graphs(check: Checker) -> str:
    from torch_geometric import nn as g

    edges = torch.randint(0, 30, (2, 90))
    kinds = torch.randint(0, 3, (90,))
    nodes, places = torch.randn(30, 16), torch.randn(30, 3)

    class Relational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = g.RGCNConv(16, 8, num_relations=3, num_bases=2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.convolution(x, edge_index, kinds)

    def network(make: Callable[[], nn.Module]) -> Make:
        return lambda: (make(), {"x": nodes, "edge_index": edges})

    return check_all(check, [
        ("GCN", network(lambda: g.GCN(16, 32, 2, 4))),
        ("GAT", network(lambda: g.GAT(16, 32, 2, 4, heads=4))),
        ("GIN", network(lambda: g.GIN(16, 32, 2, 4))),
        ("lazy GraphSAGE", network(lambda: g.GraphSAGE(-1, 32, 2, 4))),
        ("RGCN", network(Relational)),
        ("SchNet", lambda: (
            g.SchNet(hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=8,
                     interaction_graph=lambda pos, batch: (
                         edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1) + 0.1)),
            {"z": torch.randint(1, 9, (30,)), "pos": places},
        )),
    ])  # fmt: skip


@row("Equivariant networks of e3nn", "e3nn")
def equivariant(check: Checker) -> str:
    from e3nn import nn as en
    from e3nn import o3

    hidden = o3.Irreps("8x0e + 4x1o + 2x2e")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = o3.Linear("4x0e + 4x1o", hidden)
            self.product = o3.FullyConnectedTensorProduct(hidden, "1x0e + 1x1o", hidden)
            self.norm = en.BatchNorm(hidden)
            self.radial = en.FullyConnectedNet([4, 16, 8], torch.nn.functional.silu)
            self.head = o3.Linear(hidden, "1x0e")

        def forward(self, x: Tensor, directions: Tensor) -> Tensor:
            shells = o3.spherical_harmonics("1x0e + 1x1o", directions, normalize=True)
            hidden = self.norm(self.product(self.lift(x), shells))
            return self.head(hidden) * self.radial(x[:, :4]).sum(-1, keepdim=True)

    inputs = {"x": torch.randn(20, 16), "directions": torch.randn(20, 3)}
    return check_all(
        check, [("tensor products with BatchNorm and a radial net", lambda: (Network(), inputs))]
    )
