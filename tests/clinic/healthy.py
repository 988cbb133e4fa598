"""The healthy trainings: (name, model, task, optimizer, steps, options), in pairs of a kind."""

from __future__ import annotations

import functools

import torch
from torch import nn

from tests.clinic import loops, special
from tests.clinic.attention import Experts, Transformer, VisionTransformer
from tests.clinic.data import classify, language, masked, reconstruct, regress
from tests.clinic.models import (
    autoencoder,
    branch,
    cnn,
    gpt2,
    group_norm,
    low_rank,
    mlp,
    nfnet,
    recurrent,
    recurrent_language,
    residual,
    resnet,
    text,
    transformers,
    unet,
    vision,
)
from tests.clinic.training import (
    Case,
    adam,
    adamw,
    halves,
    muon,
    of,
    rmsprop,
    schedule,
    sgd,
    warmup_cosine,
)

P = functools.partial
im8 = P(classify, size=8)
im32 = P(classify, size=32, channels=3, batch=16)
rgb = {"num_channels": 3, "num_labels": 10}


def lora_mlp() -> nn.Module:
    return nn.Sequential(
        low_rank(nn.Linear(64, 64)), nn.ReLU(), low_rank(nn.Linear(64, 64)), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def lora_gpt2() -> nn.Module:
    """Adapters on both layers of each block's feed-forward part; all else is frozen."""
    model = Transformer(2).requires_grad_(False)
    for block in model.blocks:
        block.feed[0], block.feed[2] = low_rank(block.feed[0]), low_rank(block.feed[2])
    return model


def frozen_cnn() -> nn.Module:
    model = cnn()
    model[1].requires_grad_(False)
    return model


def thaw(model: nn.Module, step: int) -> None:
    """Train the head alone for 30 steps, then all."""
    for name, p in model.named_parameters():
        p.requires_grad_(step >= 30 or name.startswith("4."))
        if step < 30 and not name.startswith("4."):
            p.grad = None


def freeze_late(model: nn.Module, step: int) -> None:
    """Freeze the embedding and the first block after 30 steps."""
    if step == 30:
        for module in (model.embed, model.blocks[0]):
            module.requires_grad_(False)
            module.zero_grad()


def prune(model: nn.Module) -> None:
    from torch.nn.utils import prune as library

    for i in (0, 2):
        library.l1_unstructured(model[i], "weight", 0.7)


def keep_mask(model: nn.Module, step: int) -> None:
    """Set the smallest half of the middle weight to zero, after each step, from step 20 on."""
    with torch.no_grad():
        if step == 20:
            w = model[3].weight
            model.mask = w.abs() > w.abs().median()
        if step >= 20:
            model[3].weight *= model.mask


def resized() -> nn.Module:
    """A language model whose vocabulary has grown from 32 to 48 tokens that do not occur yet."""
    model = gpt2()
    model.resize_token_embeddings(48, mean_resizing=False)
    return model


def weight_norm(model: nn.Module) -> None:
    for i in (0, 2):
        nn.utils.parametrizations.weight_norm(model[i])


def spectral_norm(model: nn.Module) -> None:
    for i in (1, 4):
        nn.utils.parametrizations.spectral_norm(model[i])


def moe() -> nn.Module:
    return Transformer(2, feed=Experts)


_rows = [
    # perceptrons
    ("mlp adamw", mlp, classify, adamw(1e-3), 80, {}),
    ("mlp sgd momentum", mlp, classify, sgd(0.1), 80, {}),
    ("mlp tanh adam", P(mlp, act=nn.Tanh), classify, adam(3e-3), 60, {}),
    ("mlp sigmoid shallow", P(mlp, 2, act=nn.Sigmoid), classify, adam(1e-2), 60, {}),
    ("mlp he init depth 8", P(mlp, 8, gain=1.0), classify, adamw(1e-3), 60, {}),
    ("mlp he init depth 8 gelu", P(mlp, 8, gain=1.2, act=nn.GELU), classify, sgd(0.02), 60, {}),
    ("mlp batch norm depth 12", P(mlp, 12, norm=nn.BatchNorm1d), classify, adamw(3e-3), 60, {}),
    ("mlp layer norm depth 12", P(mlp, 12, norm=nn.LayerNorm), classify, adamw(1e-3), 60, {}),
    ("mlp sgd 0.5", mlp, classify, sgd(0.5, 0), 100, {}),
    ("cnn sgd 0.5", cnn, classify, sgd(0.5, 0), 60, {}),
    ("mlp full batch", mlp, P(classify, batch=0), adamw(3e-3), 60, {}),
    ("cnn full batch sgd", P(cnn, 2, 8), P(classify, batch=0), sgd(0.1), 40, {}),
    ("mlp batch 1", mlp, P(classify, batch=1), sgd(0.01), 150, {}),
    ("transformer batch 4", Transformer, P(language, batch=4), adamw(3e-3), 100, {}),
    ("mlp sum loss", mlp, P(classify, reduction="sum"), sgd(5e-4), 80, {}),
    ("transformer sum loss", Transformer, P(language, reduction="sum"), adamw(3e-3), 60,
     {"clip": 1.0}),
    ("mlp weight decay 0.1", mlp, classify, adamw(1e-3, weight_decay=0.1), 80, {}),
    ("transformer weight decay 0.1", Transformer, language, adamw(3e-3, weight_decay=0.1), 60, {}),
    # residual networks and gates
    ("residual mlp layer scale 1e-6", P(residual, branch, 6, gate=1e-6), classify, adamw(3e-3),
     80, {}),
    ("residual mlp rezero", P(residual, branch, 12, gate=0), classify, adamw(3e-3), 80, {}),
    ("resnet zero init", P(resnet, zero=True), classify, sgd(0.05), 60, {}),
    ("resnet group norm batch 4", P(resnet, norm=group_norm), P(classify, batch=4), adamw(1e-3),
     120, {}),
    ("resnet stochastic depth", P(resnet, drop=0.4), classify, adamw(3e-3), 60, {}),
    ("transformer stochastic depth", P(Transformer, 4, drop=0.3), language, adamw(3e-3), 80, {}),
    ("nfnet adamw", nfnet, classify, adamw(3e-3), 60, {}),
    ("nfnet sgd clipped", nfnet, classify, sgd(0.1), 80, {"clip": 0.5}),
    ("cait layer scale 1e-5", P(VisionTransformer, kind="cait", scale=1e-5), classify,
     adamw(3e-3), 80, {}),
    ("deit 3 layer scale 1e-6", P(VisionTransformer, 6, scale=1e-6), classify, adamw(3e-3), 80,
     {"schedule": warmup_cosine(80)}),
    ("vit mean", P(VisionTransformer, kind="mean"), classify, adamw(3e-3), 100, {}),
    ("vit cls warm-up clip", VisionTransformer, classify, adamw(5e-3), 100,
     {"schedule": warmup_cosine(100), "clip": 1.0}),
    # vision models of transformers
    ("convnext", P(transformers, "ConvNext", "ConvNextForImageClassification",
                   hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 3, 1], **rgb), im32, adamw(3e-3),
     60, {}),
    ("convnext v2", P(transformers, "ConvNextV2", "ConvNextV2ForImageClassification",
                      hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], **rgb), im32,
     adamw(3e-3), 60, {"schedule": warmup_cosine()}),
    ("regnet", P(transformers, "RegNet", "RegNetForImageClassification", embedding_size=16,
                 hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], groups_width=8, **rgb), im32,
     sgd(0.05), 60, {}),
    ("resnet of transformers", P(transformers, "ResNet", "ResNetForImageClassification",
                                 embedding_size=16, hidden_sizes=[32, 64, 64, 64],
                                 depths=[1, 2, 2, 1], **rgb), im32, adamw(1e-3), 60, {}),
    ("mobilenet v2", P(transformers, "MobileNetV2", "MobileNetV2ForImageClassification",
                       depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.1, **rgb),
     im32, rmsprop(1e-3), 60, {}),
    ("mobilenet v1", P(transformers, "MobileNetV1", "MobileNetV1ForImageClassification",
                       depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.1, **rgb),
     im32, adamw(3e-3), 50, {}),
    ("swin", P(vision, "Swin", embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2,
               patch_size=1), im8, adamw(3e-3), 60, {}),
    ("swin v2", P(vision, "Swinv2", embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2,
                  patch_size=1), im8, adamw(3e-3), 60, {"clip": 5.0}),
    ("dinov2", P(vision, "Dinov2", layerscale_value=1.0), im8, adamw(1e-3), 60, {}),
    ("beit", P(vision, "Beit", use_mask_token=True, use_absolute_position_embeddings=True,
               layer_scale_init_value=0.1), im8, adamw(1e-3), 60, {}),
    ("dinov2 layer scale 1e-5", P(vision, "Dinov2", layerscale_value=1e-5), im8, adamw(3e-3), 60,
     {}),
    ("beit layer scale 1e-6", P(vision, "Beit", use_mask_token=True, drop_path_rate=0.2,
                                use_relative_position_bias=True, layer_scale_init_value=1e-6),
     im8, adamw(3e-3), 60, {}),
    ("vit of transformers", P(vision, "ViT"), im8, adamw(1e-3), 60, {}),
    ("deit of transformers", P(vision, "DeiT"), im8, adamw(3e-3), 60,
     {"schedule": warmup_cosine()}),
    ("poolformer", P(transformers, "PoolFormer", "PoolFormerForImageClassification",
                     hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 2, 1],
                     layer_scale_init_value=1e-5, **rgb), im32, adamw(3e-3), 60, {}),
    ("segformer", P(transformers, "Segformer", "SegformerForImageClassification",
                    hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
                    num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=32, **rgb), im32,
     adamw(3e-3), 60, {}),
    # language models
    ("gpt2 warm-up cosine clip", gpt2, language, adamw(3e-3), 80,
     {"schedule": warmup_cosine(80), "clip": 1.0}),
    ("gpt2 muon", P(Transformer, 3), language, muon(), 60, {}),
    ("llama accumulation", P(text, "Llama"), P(language, batch=8), adamw(3e-3), 50,
     {"accumulate": 4}),
    ("mistral muon", P(text, "Mistral", num_key_value_heads=1), language, muon(), 60, {}),
    ("qwen2 bfloat16", lambda: text("Qwen2", num_key_value_heads=1).bfloat16(), language,
     adamw(3e-3), 60, {}),
    ("opt float32", P(text, "OPT", ffn_dim=64, word_embed_proj_dim=32), language, adamw(3e-3), 60,
     {}),
    ("mixtral", P(text, "Mixtral", num_local_experts=4, num_key_value_heads=1), language,
     adamw(3e-3), 60, {}),
    ("stacked experts", moe, language, adamw(3e-3), 60, {}),
    ("bert masked", P(text, "Bert", "ForMaskedLM"), masked, adamw(5e-3), 150, {}),
    ("albert masked", P(text, "Albert", "ForMaskedLM", embedding_size=16), P(masked, vocab=16),
     adamw(5e-3), 150, {"clip": 1.0}),
    ("roberta with unused pooler", P(text, "Roberta", "Model", hidden_size=32), special.pooled,
     adamw(1e-3), 60, {}),
    ("bert with unused pooler", P(text, "Bert", "Model", hidden_size=32), special.pooled,
     adamw(1e-3), 60, {}),
    ("t5", special.t5, special.copy_task, adamw(1e-2), 80, {}),
    ("encoder and decoder of torch", special.encoder_decoder, special.copy_task, adamw(3e-3), 80,
     {}),
    ("post-LN", P(Transformer, 4, post=True), language, adamw(1e-3), 80,
     {"schedule": warmup_cosine(80)}),
    ("pre-LN depth 10", P(Transformer, 10), language, adamw(1e-3), 60, {}),
    ("tied embeddings", P(Transformer, tied=True), language, adamw(3e-3), 80, {}),
    ("gpt2 zero positions", P(Transformer, positions="zero"), language, sgd(0.1), 80,
     {"clip": 1.0}),
    ("gpt neox", P(text, "GPTNeoX"), language, adamw(3e-3), 60, {}),
    ("gemma", P(text, "Gemma", num_key_value_heads=1, head_dim=16), language, adamw(3e-3), 60, {}),
    ("phi", P(text, "Phi"), language, adam(3e-3), 60, {}),
    ("mamba", P(transformers, "Mamba", "MambaForCausalLM", vocab_size=32, hidden_size=32,
                num_hidden_layers=2, state_size=8), P(language, length=8, batch=8),
     adamw(3e-3), 40, {}),
    ("lstm", recurrent, classify, adamw(3e-3), 80, {}),
    ("gru", P(recurrent, "GRU"), classify, sgd(0.1), 80, {"clip": 1.0}),
    ("lstm language", recurrent_language, P(language, batch=8), adam(1e-2), 80, {"clip": 0.5}),
    ("gru language", P(recurrent_language, "GRU"), P(language, batch=8), rmsprop(3e-3), 80, {}),
    ("embedding with rare tokens", P(Transformer, 2, vocab=256), special.rare, adamw(3e-3), 80, {}),
    ("embedding with padding_idx", P(Transformer, 2, padding_idx=0), masked, adamw(3e-3), 60, {}),
    ("resized vocabulary", resized, language, adamw(3e-3), 60, {}),
    ("word2vec", special.word2vec, special.pairs, adam(1e-2), 80, {}),
    # mixed precision
    ("amp float16 searches its scale", mlp, classify, adamw(3e-3), 80,
     {"autocast": torch.float16, "scale": 2.0**40}),
    ("amp float16 transformer", Transformer, language, adamw(3e-3), 80,
     {"autocast": torch.float16, "scale": 2.0**36, "clip": 1.0}),
    ("amp bfloat16 cnn", cnn, classify, sgd(0.05), 60, {"autocast": torch.bfloat16}),
    ("amp bfloat16 transformer", P(Transformer, 2), language, adamw(3e-3), 40,
     {"autocast": torch.bfloat16}),
    ("bfloat16 weights", lambda: mlp().bfloat16(), P(classify, dtype=torch.bfloat16), adamw(1e-2),
     60, {}),
    ("bfloat16 llama", lambda: text("Llama").bfloat16(), language, adamw(1e-2), 60, {}),
    # parts that do not learn
    ("lora mlp", lora_mlp, classify, adamw(1e-2), 80, {}),
    ("lora transformer", lora_gpt2, language, adamw(1e-2), 80, {}),
    ("frozen first layer", frozen_cnn, classify, adamw(3e-3), 60, {}),
    ("frozen embedding", special.frozen_embedding, language, adamw(3e-3), 60, {}),
    ("head first, then all", mlp, classify, adamw(3e-3), 80, {"before": thaw}),
    ("frozen late", Transformer, language, adamw(3e-3), 80, {"before": freeze_late}),
    ("pruned with masks", mlp, classify, adamw(3e-3), 60, {"change": prune}),
    ("pruned after each step", P(mlp, norm=nn.BatchNorm1d), classify, sgd(0.05), 80,
     {"after": keep_mask}),
    ("weight norm", mlp, classify, adamw(3e-3), 60, {"change": weight_norm}),
    ("spectral norm", cnn, classify, adamw(3e-3), 60, {"change": spectral_norm}),
    # tasks
    ("autoencoder", autoencoder, reconstruct, adamw(3e-3), 100, {}),
    ("denoising u-net", unet, P(reconstruct, noise=0.5), adamw(3e-3), 60, {}),
    ("regression with large targets", P(mlp, outputs=1), P(regress, scale=50.0, shift=100.0),
     adamw(1e-2), 150, {}),
    ("regression sgd", P(mlp, outputs=1), regress, sgd(0.05), 80, {}),
    ("cosine restarts", mlp, classify, adamw(1e-2), 90,
     {"schedule": schedule("CosineAnnealingWarmRestarts", T_0=30)}),
    ("cyclic learning rate", cnn, classify, sgd(0.01), 80,
     {"schedule": schedule("CyclicLR", base_lr=1e-3, max_lr=0.1, step_size_up=20)}),
    ("one cycle", resnet, classify, sgd(0.1), 60,
     {"schedule": schedule("OneCycleLR", max_lr=0.2, total_steps=60)}),
    ("decay to zero", Transformer, language, adamw(1e-2), 80,
     {"schedule": schedule("LinearLR", start_factor=1.0, end_factor=0.0, total_iters=80)}),
    ("gradient checkpointing", P(Transformer, checkpoint=True), language, adamw(3e-3), 50, {}),
    ("gradient checkpointing of transformers", special.checkpointed, language, adamw(3e-3), 50,
     {}),
    ("nadam dropout", special.dropout, classify, special.nadam, 80, {}),
    ("adagrad siren", special.siren, regress, special.adagrad, 80, {}),
]  # fmt: skip

_training = [
    ("vae", special.vae),
    ("diffusion", special.diffusion),
    ("siamese contrastive", special.siamese),
    ("simclr", special.simclr),
    ("graph network", special.graph),
    ("graph attention", P(special.graph, attention=True)),
    ("byol target network", loops.byol),
    ("dqn target network", loops.dqn),
    ("actor-critic", loops.actor_critic),
    ("reinforce", P(loops.actor_critic, critic=False)),
    ("gan", loops.gan),
    ("wasserstein gan with penalty", P(loops.gan, wasserstein=True)),
    ("multi-task", special.multi_task),
    ("distillation", special.distillation),
    ("stochastic weight averaging", loops.averaged),
    ("moving average of weights", P(loops.averaged, decay=0.95)),
    ("lightning", loops.lightning),
    ("maml-like second order", special.second_order),
    ("sharpness-aware", loops.sam),
    ("normalizing flow", special.flow),
]

HEALTHY = halves(
    [Case(row[0], of(*row[1:5], **row[5])) for row in _rows]
    + [Case(name, make) for name, make in _training]
)
