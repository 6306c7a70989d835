"""Tiny, randomly initialised models of real architectures: one `Row` each. Nothing is downloaded.

A row says how to make a model, how to make inputs of n examples (a dict of keyword arguments, examples on axis 0), and
which tensor ``[n, ...]`` of its output the loss is a function of (or the scalar mean loss that the model computes
itself). Models are deterministic: dropout, layer drop, random masks and random hashes are off or part of the inputs.
Those that are per-example are so by the test of the reference, which is made without the library; those that are not
must be refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import elsewhere
import pytest
import reference
import torch
from torch import Tensor, nn

from perexample import PerExampleError, UnsupportedModuleError, extend, perex
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

DEVICE = elsewhere.device()
V = 19  # size of the vocabularies
Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A model, its inputs, and what is expected.

    Attributes:
        n: Number of examples.
        grad: Whether ``p.grad`` is asked for too.
        train: Training mode, or evaluation mode.
        noise: What is added to each parameter, so that none is at a special value such as 0 or 1.
        copies: How often the reference puts an example into its batch. Two, where that of one meets a bug of torch:
            the backward of `batch_norm` (2.13, CPU) is wrong for one example whose gradient, but not input, has strides
            ``(C, 1, W * C, C)``, or the other way around.
        slow: Only in full runs.
        refused: The error that must come, and what its message must match.
        either: Exact, or a `PerExampleError`.
    """

    id: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    output: Callable[[Any], Tensor]
    n: int = 3
    grad: bool = False
    train: bool = True
    noise: float = 0.2
    copies: int = 1
    slow: bool = False
    refused: tuple[type[PerExampleError], str] | None = None
    either: bool = False

    def model(self) -> nn.Module:
        """The same one in each call, float64."""
        torch.manual_seed(0)
        model = self.make().double().train(self.train)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=self.noise)
        return model

    def loss(self, output: Any) -> Tensor:
        """A mean over examples of a curved function of each one's output."""
        out = self.output(output)
        return (out.sin() + 0.1 * out.square()).flatten(1).mean(1).mean() if out.dim() else out


# ----------------------------------------------------------------------------------------------------------- harness


def parameters(rows: list[Row]) -> list[Any]:
    """What `pytest.mark.parametrize` takes."""
    return [pytest.param(row, id=row.id, marks=[pytest.mark.slow] if row.slow else []) for row in rows]


def repeated(inputs: dict[str, Any], copies: int) -> dict[str, Any]:
    """Each example several times."""
    return {key: torch.cat([t] * copies) if isinstance(t, Tensor) else t for key, t in inputs.items()}


def alone(row: Row, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradient of each example's loss when it is alone."""
    return reference.grad_batch(
        model,
        lambda out, _: row.loss(out),
        (inputs,),
        row.n,
        forward=lambda model, one: model(**repeated(one, row.copies)),
    )


def _floor(wanted: dict[str, Tensor], part: float) -> float:
    """Gradients that are zero up to rounding, as those of the bias of attention's keys, cannot agree relatively."""
    return part * max(w.abs().max().item() for w in wanted.values() if w.numel())


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor], floor: float) -> tuple[float, str]:
    """Largest relative error, and the parameter that has it."""
    errors = []
    for name, w in wanted.items():
        assert found[name].shape == w.shape, f"{name}: {list(found[name].shape)} instead of {list(w.shape)}"
        error = ((found[name] - w).abs().max() / w.abs().max().clamp_min(floor)).item() if w.numel() else 0.0
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def mixing(row: Row) -> tuple[float, str]:
    """How far the batch's gradient is from the mean of the examples': 0 if the model is per-example. No library."""
    model, inputs = row.model(), row.inputs(row.n)
    rows = alone(row, model, inputs)
    loss = row.loss(model(**inputs))
    assert loss.isfinite()
    loss.backward()
    batch = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    means = {name: r.mean(0) for name, r in rows.items()}
    return worst({name: batch[name] for name in means}, means, _floor(means, 1e-5))


def measure(row: Row) -> tuple[nn.Module, ClippedGrad, dict[str, Tensor]]:
    """One backward in the library's context; the reference is made before, on the same model."""
    model, inputs = row.model(), row.inputs(row.n)
    if DEVICE != "cpu":
        model = elsewhere.moved(model) if DEVICE == elsewhere.NAME else model.to(DEVICE)
        inputs = reference.rebuilt(inputs, [t.to(DEVICE) for t in reference.tensors(inputs)])
    wanted = {} if row.refused else alone(row, model, inputs)
    clipping = ClippedGrad(reference.bound_near_median(wanted, row.n))
    extend(model)
    with perex(BatchGrad(), BatchL2Grad(), clipping, grad=row.grad):
        row.loss(model(**inputs)).backward()
    return model, clipping, wanted


def assert_exact(row: Row, tolerance: float = 1e-9) -> None:
    """All fields of all parameters agree with the reference."""
    model, clipping, wanted = measure(row)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == wanted.keys()
    sums = reference.clipped_sum(wanted, row.n, clipping.max_norm)
    squares = {name: reference.batch_l2(rows) for name, rows in wanted.items()}
    fields = {
        "grad_batch": (wanted, _floor(wanted, 1e-5)),
        "batch_l2": (squares, _floor(squares, 1e-5)),
        "clipped_sum": (sums, _floor(sums, 1e-5)),
    }
    if row.grad:
        means = {name: rows.mean(0) for name, rows in wanted.items()}
        fields["grad"] = (means, _floor(means, 1e-5))
        for p in named.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    else:
        assert all(p.grad is None for p in named.values())
    for field, (values, floor) in fields.items():
        error, name = worst({name: getattr(p, field) for name, p in named.items()}, values, floor)
        assert error <= tolerance, f"{row.id}: {field} of {name} has a relative error of {error:.1e}"
    norms = reference.joint_norms(wanted, row.n)
    error, _ = worst({"norms": clipping.norms.cpu()}, {"norms": norms}, 0.0)
    assert error <= tolerance, f"{row.id}: norms have a relative error of {error:.1e}"


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Parts of a model that are computed in float32 whatever its dtype (softmax, norms, routers) are so in float64.

    Without this no two ways of computing a gradient agree to more than seven digits.
    """
    kept = torch.float32, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        del torch.Tensor.float
        torch.float32 = torch.float = kept[0]
        torch.set_default_dtype(torch.float32)
        assert torch.Tensor.float is kept[1]


def build(name: str, *, attention: str = "eager", part: str = "", **settings: Any) -> Callable[[], nn.Module]:
    """A model class of transformers by name, with a configuration of these settings; ``part`` names a submodule."""

    def make() -> nn.Module:
        cls = getattr(importlib.import_module("transformers"), name)
        config = cls.config_class(**settings)
        config._attn_implementation = attention
        config._experts_implementation = "eager"
        model = cls(config)
        return model.get_submodule(part) if part else model

    return make


# ------------------------------------------------------------------------------------------------------------ inputs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(n: int, *shape: int, low: int = 4, high: int = V, seed: int = 2) -> Tensor:
    """Token numbers; the first few are left to padding and other special tokens."""
    return torch.randint(low, high, (n, *shape), generator=_generator(seed))


def normal(n: int, *shape: int, seed: int = 3) -> Tensor:
    """Normal numbers."""
    return torch.randn(n, *shape, generator=_generator(seed), dtype=torch.float64)


def lengths(n: int, t: int, left: bool = False) -> Tensor:
    """A mask of examples with t, t - 1, ... but at least two valid tokens."""
    valid = torch.arange(t) < torch.tensor([max(2, t - i % t) for i in range(n)]).unsqueeze(1)
    return (valid.flip(1) if left else valid).long()


def text(
    t: int = 6, *, mask: bool = False, left: bool = False, types: int = 0, decoder: int = 0, **more: Any
) -> Inputs:
    """``input_ids [n, t]``, and what else is asked for; ``more`` holds functions of n."""

    def inputs(n: int) -> dict[str, Any]:
        found: dict[str, Any] = {"input_ids": ids(n, t)}
        if mask:
            found["attention_mask"] = lengths(n, t, left)
        if types:
            found["token_type_ids"] = ids(n, t, low=0, high=types, seed=4)
        if decoder:
            found["decoder_input_ids"] = ids(n, decoder, seed=5)
        return found | {key: value(n) for key, value in more.items()}

    return inputs


def images(size: int = 8, channels: int = 3, **more: Any) -> Inputs:
    """``pixel_values [n, channels, size, size]``."""
    return lambda n: {"pixel_values": normal(n, channels, size, size)} | {k: value(n) for k, value in more.items()}


def given(**values: Callable[[int], Any]) -> Inputs:
    """Any inputs, each a function of n."""
    return lambda n: {key: value(n) for key, value in values.items()}


# ----------------------------------------------------------------------------------------------------------- outputs


def joined(*names: str) -> Callable[[Any], Tensor]:
    """Several tensors ``[n, ...]`` of the output, flattened side by side."""
    return lambda out: torch.cat([getattr(out, name).flatten(1) for name in names], 1)


hidden = joined("last_hidden_state")
pooled = joined("last_hidden_state", "pooler_output")
logits = joined("logits")


def whole(out: Tensor) -> Tensor:
    """An output that is a tensor."""
    return out


def own(out: Any) -> Tensor:
    """The loss that the model computes itself, a mean over examples of as many terms each."""
    return out.loss


# ----------------------------------------------------------------------------------------------------- configurations

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
_BERT = _SIZES | _NO_DROPOUT | {"vocab_size": V, "max_position_embeddings": 16, "pad_token_id": 0}
_TOKENS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _SIZES | _TOKENS | {"max_position_embeddings": 32}
_GQA = _LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2}
_HEADS4 = {"num_attention_heads": 4}
_GPT2 = _TOKENS | {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0
}  # fmt: skip
_BART = _TOKENS | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 16,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8,
}  # fmt: skip
_VIT = _SIZES | _NO_DROPOUT | {"image_size": 8, "patch_size": 4, "num_channels": 3}
_SWIN = _NO_DROPOUT | {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
_CONVNEXT = {"num_channels": 3, "patch_size": 2, "hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}
_AUDIO = _SIZES | {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "layerdrop": 0.0, "final_dropout": 0.0, "feat_extract_dropout": 0.0, "apply_spec_augment": False,
    "conv_dim": [8, 8], "conv_kernel": [4, 3], "conv_stride": [3, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": V,
}  # fmt: skip
_MAMBA = _TOKENS | {
    "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "conv_kernel": 3, "time_step_rank": 3
}  # fmt: skip
_CLIP_TEXT = _TOKENS | _SIZES | {"max_position_embeddings": 16, "attention_dropout": 0.0, "projection_dim": 12}
_CLIP_VISION = _SIZES | {"image_size": 8, "patch_size": 4, "attention_dropout": 0.0, "projection_dim": 12}


_BACKBONE = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
        "layer_type": "basic", "out_features": ["stage4"],
    },
}  # fmt: skip
_SERIES = {
    "prediction_length": 4, "context_length": 7, "lags_sequence": [1, 2, 3], "num_time_features": 2,
    "num_static_categorical_features": 1, "cardinality": [5], "embedding_dimension": [3], "d_model": 16,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "scaling": "std",
}  # fmt: skip


def _mae_inputs(n: int) -> dict[str, Tensor]:
    """Images, and the random numbers that choose each one's mask."""
    return {"pixel_values": normal(n, 3, 8, 8), "noise": torch.rand(n, 16, generator=_generator(6)).double()}


def _xlnet_inputs(n: int) -> dict[str, Tensor]:
    """Permutation language modelling: an own order, and own targets, for each example."""
    t = 6
    orders = torch.stack([torch.randperm(t, generator=_generator(i)) for i in range(n)])
    perm = (orders.unsqueeze(2) <= orders.unsqueeze(1)).double()
    return {
        "input_ids": ids(n, t), "perm_mask": perm,
        "target_mapping": nn.functional.one_hot(orders[:, :2], t).double(),
        "token_type_ids": ids(n, t, low=0, high=2, seed=4),
    }  # fmt: skip


def _series(n: int) -> dict[str, Tensor]:
    past, future = 10, 4
    return {
        "past_values": normal(n, past), "past_time_features": normal(n, past, 2, seed=5),
        "past_observed_mask": torch.ones(n, past).double(), "future_values": normal(n, future, seed=6),
        "future_time_features": normal(n, future, 2, seed=7),
        "static_categorical_features": ids(n, 1, low=0, high=5, seed=8),
    }  # fmt: skip


_TEXT = [
    Row("bert", build("BertModel", **_BERT), text(6, mask=True, types=2), pooled, grad=True),
    Row("bert-sdpa", build("BertModel", attention="sdpa", **_BERT), text(6, mask=True, types=2), pooled),
    Row("bert-square", build("BertModel", **_BERT | _HEADS4), text(4, mask=True, types=2), pooled, n=4),
    Row("bert-single", build("BertModel", **_BERT), text(6, mask=True, types=2), pooled, n=1),
    Row("bert-mlm-tied", build("BertForMaskedLM", **_BERT), text(5), logits),
    Row(
        "bert-own-loss",
        build("BertForSequenceClassification", **_BERT, num_labels=3),
        text(6, mask=True, labels=lambda n: ids(n, low=0, high=3)),
        own,
        grad=True,
    ),
    Row("distilbert", build(
        "DistilBertModel", **_TOKENS, dim=16, n_layers=2, n_heads=2, hidden_dim=20, max_position_embeddings=16,
        dropout=0.0, attention_dropout=0.0,
    ), text(6, mask=True), hidden),
    Row("roberta", build("RobertaModel", **_BERT), text(6, mask=True), pooled),
    Row("albert-shared-layers", build("AlbertModel", **_BERT, embedding_size=8), text(6, mask=True, types=2), pooled),
    Row("albert-shared-square", build("AlbertModel", **_BERT | _HEADS4, embedding_size=8), text(4), pooled, n=4),
    Row("electra", build("ElectraModel", **_BERT, embedding_size=8), text(6, mask=True), hidden),
    Row("deberta", build(
        "DebertaModel", **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8,
    ), text(6, mask=True), hidden),
    Row("deberta-v2", build(
        "DebertaV2Model", **_BERT, relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3, conv_act="gelu",
        max_relative_positions=8,
    ), text(6, mask=True), hidden),
    Row("deberta-v2-square", build(
        "DebertaV2Model", **_BERT | _HEADS4, relative_attention=True, position_buckets=4,
        pos_att_type=["p2c", "c2p"], max_relative_positions=8,
    ), text(4), hidden, n=4),
    Row("mpnet", build("MPNetModel", **_BERT, relative_attention_num_buckets=32), text(6, mask=True), pooled),
    Row("convbert", build(
        "ConvBertModel", **_BERT | _HEADS4, embedding_size=8, head_ratio=2, conv_kernel_size=3, num_groups=1,
    ), text(6, mask=True), hidden),
    Row("squeezebert", build(
        "SqueezeBertModel", **_BERT, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1,
        intermediate_groups=2, output_groups=2, embedding_size=16,
    ), text(6, mask=True), pooled),
    Row("mobilebert", build(
        "MobileBertModel", **_BERT | {"intermediate_size": 16}, embedding_size=8, true_hidden_size=8,
        intra_bottleneck_size=8,
    ), text(6, mask=True), pooled),
    Row("megatron-bert", build("MegatronBertModel", **_BERT), text(6, mask=True), pooled),
    Row("rembert", build("RemBertModel", **_BERT, input_embedding_size=8), text(6, mask=True), pooled),
    Row("roformer", build("RoFormerModel", **_BERT, rotary_value=True), text(6, mask=True), hidden),
    Row("esm", build(
        "EsmModel", **_BERT | {"pad_token_id": 1}, mask_token_id=3, position_embedding_type="rotary",
        token_dropout=False, emb_layer_norm_before=True,
    ), text(6, mask=True), hidden),
    Row("ibert", build("IBertModel", **_BERT | {"pad_token_id": 1}), text(6, mask=True), pooled),
    Row("layoutlm", build("LayoutLMModel", **_BERT, max_2d_position_embeddings=12), text(
        6, mask=True, bbox=lambda n: ids(n, 6, 2, low=0, high=6).repeat(1, 1, 2) + torch.tensor([0, 0, 2, 3])
    ), pooled),
    Row("data2vec-text", build("Data2VecTextModel", **_BERT), text(6, mask=True), pooled),
    Row("nystromformer-all-landmarks", build(
        "NystromformerModel", **_BERT, segment_means_seq_len=6, num_landmarks=6, conv_kernel_size=3,
    ), text(6), hidden),
    Row("nystromformer-mixes", build(  # the first guess of its inverse is scaled by a maximum over the batch
        "NystromformerModel", **_BERT, segment_means_seq_len=6, num_landmarks=3, conv_kernel_size=3,
    ), text(6), hidden, refused=(PerExampleError, r"\S")),
    Row("fnet", build(
        "FNetModel", **_SIZES, vocab_size=V, max_position_embeddings=16, hidden_dropout_prob=0.0, pad_token_id=0,
        type_vocab_size=2, use_tpu_fourier_optimizations=False,
    ), text(6, types=2), pooled),
    Row("yoso-expectation", build("YosoModel", **_BERT, use_expectation=True, conv_window=3), text(6), hidden),
    Row("longformer", build("LongformerModel", **_BERT, attention_window=4), text(
        8, global_attention_mask=lambda n: torch.tensor([[1] + [0] * 7] * n),
    ), pooled),
    Row("big-bird-full", build("BigBirdModel", **_BERT, attention_type="original_full"), text(6, mask=True), pooled),
    Row("big-bird-sparse", build(
        "BigBirdModel", **_BERT | {"max_position_embeddings": 64}, attention_type="block_sparse", block_size=2,
        num_random_blocks=1,
    ), text(24), pooled),
    Row("funnel", build(
        "FunnelModel", vocab_size=V, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8,
        d_inner=20, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    ), text(7, mask=True, types=2), hidden),
    Row("canine", build(
        "CanineModel", **_SIZES | _NO_DROPOUT, max_position_embeddings=32, downsampling_rate=4, num_hash_functions=2,
        num_hash_buckets=16, local_transformer_stride=4, upsampling_kernel_size=2, pad_token_id=0,
    ), text(12), pooled),
    Row("xlm", build(
        "XLMModel", emb_dim=16, n_layers=2, n_heads=2, n_words=V, max_position_embeddings=16, dropout=0.0,
        attention_dropout=0.0, pad_index=0, n_langs=2,
    ), text(6, mask=True), hidden),
    Row("xlnet", build(
        "XLNetModel", vocab_size=V, d_model=16, n_layer=2, n_head=2, d_inner=20, dropout=0.0,
    ), text(6, mask=True, types=2), hidden),
    Row("xlnet-permutations", build(
        "XLNetModel", vocab_size=V, d_model=16, n_layer=2, n_head=2, d_inner=20, dropout=0.0,
    ), _xlnet_inputs, hidden),
    Row("xlnet-square", build(
        "XLNetModel", vocab_size=V, d_model=16, n_layer=2, n_head=4, d_inner=20, dropout=0.0,
    ), text(4, types=2), hidden, n=4),
    Row("reformer-local", build(
        "ReformerModel", vocab_size=V, hidden_size=16, num_attention_heads=2, attention_head_size=8,
        feed_forward_size=20, attn_layers=["local", "local"], local_attn_chunk_length=4, axial_pos_embds=True,
        axial_pos_shape=(2, 4), axial_pos_embds_dim=(6, 10), hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0, max_position_embeddings=8, is_decoder=False,
    ), text(8), hidden, refused=(PerExampleError, r"\S")),  # reversible layers: a backward inside of the backward
    Row("modernbert", build(
        "ModernBertModel", **_LLAMA, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
    ), text(6, mask=True), hidden),
    Row("ernie", build("ErnieModel", **_BERT, task_type_vocab_size=3, use_task_id=True), text(6, mask=True), pooled),
]  # fmt: skip

_CAUSAL = [
    Row("gpt2-tied", build("GPT2LMHeadModel", **_GPT2), text(6, mask=True, left=True), logits, grad=True),
    Row("gpt2-sdpa", build("GPT2LMHeadModel", attention="sdpa", **_GPT2), text(6), logits),
    Row("gpt2-square", build("GPT2LMHeadModel", **_GPT2 | {"n_head": 4}), text(4), logits, n=4),
    Row("gpt2-single", build("GPT2LMHeadModel", **_GPT2), text(6), logits, n=1),
    Row("gpt2-own-loss", build("GPT2LMHeadModel", **_GPT2), text(6, labels=lambda n: ids(n, 6, seed=7)), own),
    Row("openai-gpt", build(
        "OpenAIGPTModel", vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    ), text(6), hidden),
    Row("gpt-neo", build(
        "GPTNeoForCausalLM", **_TOKENS, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=20,
        attention_types=[[["global", "local"], 1]], window_size=3, max_position_embeddings=16,
    ), text(6, mask=True), logits),
    Row("gpt-neox", build("GPTNeoXForCausalLM", **_LLAMA), text(6), logits),
    Row("gpt-j", build("GPTJForCausalLM", **_GPT2, rotary_dim=4), text(6), logits),
    Row("codegen", build("CodeGenForCausalLM", **_GPT2 | {"n_head": 4}, rotary_dim=4), text(6), logits),
    Row("ctrl", build(
        "CTRLModel", vocab_size=V, n_positions=16, n_embd=16, dff=20, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0,
    ), text(6), hidden),
    Row("llama", build("LlamaForCausalLM", **_GQA), text(6, mask=True), logits, grad=True),
    Row("llama-sdpa", build("LlamaForCausalLM", attention="sdpa", **_GQA), text(6), logits),
    Row("llama-square", build("LlamaForCausalLM", **_GQA), text(4), logits, n=4),
    Row("llama-tied-biased", build(
        "LlamaForCausalLM", **_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
    ), text(6), logits),
    Row("mistral", build("MistralForCausalLM", **_GQA, sliding_window=3), text(6), logits),
    Row("qwen2", build("Qwen2ForCausalLM", **_GQA), text(6, mask=True), logits),
    Row("qwen3", build("Qwen3ForCausalLM", **_GQA, head_dim=8), text(6), logits),
    Row("gemma2", build("Gemma2ForCausalLM", **_GQA, head_dim=8, sliding_window=3), text(6), logits),
    Row("gemma3", build("Gemma3ForCausalLM", **_GQA, head_dim=8, sliding_window=3), text(6), logits),
    Row("phi", build("PhiForCausalLM", **_LLAMA, qk_layernorm=True), text(6), logits),
    Row("phi3", build("Phi3ForCausalLM", **_GQA), text(6), logits),
    Row("falcon", build("FalconForCausalLM", **_LLAMA, multi_query=True), text(6), logits),
    Row("falcon-alibi", build(
        "FalconForCausalLM", **_LLAMA, alibi=True, parallel_attn=False, bias=True,
    ), text(6, mask=True), logits),
    Row("bloom", build(
        "BloomForCausalLM", **_TOKENS, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0,
    ), text(6, mask=True), logits),
    Row("mpt", build(
        "MptForCausalLM", vocab_size=V, d_model=16, n_layers=2, n_heads=2, max_seq_len=16, expansion_ratio=2,
    ), text(6), logits),
    Row("opt", build(
        "OPTForCausalLM", **_TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=20,
        max_position_embeddings=16, word_embed_proj_dim=8, dropout=0.0, attention_dropout=0.0,
    ), text(6, mask=True), logits),
    Row("olmo2", build("Olmo2ForCausalLM", **_GQA), text(6), logits),
    Row("cohere", build("CohereForCausalLM", **_GQA, use_qk_norm=True), text(6), logits),
    Row("stablelm", build("StableLmForCausalLM", **_GQA, qk_layernorm=True, use_qkv_bias=True), text(6), logits),
    Row("granite", build("GraniteForCausalLM", **_GQA), text(6), logits),
    Row("glm", build("GlmForCausalLM", **_GQA, head_dim=8), text(6), logits),
    Row("diffllama", build("DiffLlamaForCausalLM", **_GQA), text(6), logits),
    Row("biogpt", build(
        "BioGptForCausalLM", **_LLAMA, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ), text(6), logits),
    Row("xglm", build(
        "XGLMForCausalLM", **_TOKENS, d_model=16, num_layers=2, attention_heads=2, ffn_dim=20, dropout=0.0,
        attention_dropout=0.0, max_position_embeddings=16,
    ), text(6), logits),
    Row("mamba", build("MambaForCausalLM", **_MAMBA), text(6), logits, grad=True),
    Row("mamba-square", build("MambaForCausalLM", **_MAMBA), text(4), logits, n=4),
    Row("falcon-mamba", build("FalconMambaForCausalLM", **_MAMBA), text(6), logits),
    Row("mamba2", build(
        "Mamba2ForCausalLM", **_TOKENS, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2, conv_kernel=3,
        num_heads=4, head_dim=8, n_groups=2, chunk_size=4,
    ), text(6), logits, noise=0.4),
    Row("rwkv", build(
        "RwkvForCausalLM", **_TOKENS, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2,
        intermediate_size=20, context_length=16,
    ), text(6), logits),
    Row("recurrent-gemma", build(
        "RecurrentGemmaForCausalLM", **_GQA | {"num_hidden_layers": 3}, head_dim=4, lru_width=16, conv1d_width=3,
        attention_window_size=8, attention_dropout=0.0,
    ), text(6), logits),
    Row("jamba", build(
        "JambaForCausalLM", **_GQA, num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_d_conv=3, mamba_expand=2,
        mamba_dt_rank=3, use_mamba_kernels=False,
    ), text(6), logits, either=True),
    Row("xlstm", build(
        "xLSTMForCausalLM", **_TOKENS, hidden_size=16, num_hidden_layers=2, num_heads=2, chunk_size=4,
        mode="train",
    ), text(8, use_cache=lambda n: False), logits),
    Row("lfm2", build("Lfm2ForCausalLM", **_GQA, layer_types=["conv", "full_attention"]), text(6), logits),
    Row("imagegpt", build(
        "ImageGPTModel", vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    ), text(6), hidden),
    Row("decision-transformer", build(
        "DecisionTransformerModel", state_dim=3, act_dim=2, hidden_size=16, max_ep_len=8, n_layer=2, n_head=2,
        n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ), given(
        states=lambda n: normal(n, 4, 3), actions=lambda n: normal(n, 4, 2, seed=5),
        returns_to_go=lambda n: normal(n, 4, 1, seed=6), timesteps=lambda n: ids(n, 4, low=0, high=8),
        attention_mask=lambda n: lengths(n, 4),
    ), joined("state_preds", "action_preds", "return_preds")),
]  # fmt: skip

_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
_EXPERTS = [
    Row("mixtral", build("MixtralForCausalLM", **_GQA, **_MOE, num_local_experts=3), text(6), logits, either=True),
    Row("qwen2-moe", build(
        "Qwen2MoeForCausalLM", **_GQA, **_MOE, num_experts=3, moe_intermediate_size=12,
        shared_expert_intermediate_size=12, decoder_sparse_step=1,
    ), text(6), logits, either=True),
    Row("qwen3-moe", build(
        "Qwen3MoeForCausalLM", **_GQA, **_MOE, num_experts=3, moe_intermediate_size=12, head_dim=8,
        decoder_sparse_step=1,
    ), text(6), logits, either=True),
    Row("olmoe", build("OlmoeForCausalLM", **_GQA, **_MOE, num_experts=3), text(6), logits, either=True),
    Row("gpt-oss", build(
        "GptOssForCausalLM", **_GQA, **_MOE, num_local_experts=3, head_dim=8, sliding_window=3,
    ), text(6), logits, either=True),
    Row("granite-moe", build("GraniteMoeForCausalLM", **_GQA, **_MOE, num_local_experts=3), text(
        6
    ), logits, either=True),
    Row("deepseek-v3", build(
        "DeepseekV3ForCausalLM", **_LLAMA, num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=12, first_k_dense_replace=1, kv_lora_rank=6,
        q_lora_rank=5, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    ), text(6), logits, either=True),
    Row("switch-transformers", build(
        "SwitchTransformersModel", **_T5, num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        expert_capacity=64, router_jitter_noise=0.0, add_router_probs=False,
    ), text(6, decoder=5), hidden, either=True),
]  # fmt: skip

_SEQ2SEQ = [
    Row("t5", build("T5Model", **_T5), text(6, mask=True, decoder=5), joined(
        "last_hidden_state", "encoder_last_hidden_state"
    ), grad=True),
    Row("t5-single", build("T5Model", **_T5), text(6, decoder=5), hidden, n=1),
    Row("t5-lm-tied", build("T5ForConditionalGeneration", **_T5), text(6, decoder=5), logits),
    Row("t5-gated-gelu", build(
        "T5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ), text(6, decoder=5), logits),
    Row("t5-square", build("T5Model", **_T5 | {"num_heads": 4}), text(4, decoder=4), hidden, n=4),
    Row("umt5", build("UMT5Model", **_T5), text(6, decoder=5), hidden),
    Row("longt5", build("LongT5Model", **_T5, local_radius=2, encoder_attention_type="local"), text(
        8, decoder=5
    ), hidden),
    Row("longt5-global", build(
        "LongT5Model", **_T5, local_radius=2, global_block_size=2, encoder_attention_type="transient-global",
    ), text(8, decoder=5), hidden),
    Row("bart", build("BartModel", **_BART), text(6, mask=True, decoder=5), joined(
        "last_hidden_state", "encoder_last_hidden_state"
    )),
    Row("bart-square", build(
        "BartModel", **_BART | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ), text(4, decoder=4), hidden, n=4),
    Row("bart-lm-tied", build("BartForConditionalGeneration", **_BART), text(6, decoder=5), logits),
    Row("pegasus", build("PegasusModel", **_BART), text(6, decoder=5), hidden),
    Row("mbart", build("MBartModel", **_BART), text(6, mask=True, decoder=5), hidden),
    Row("blenderbot", build("BlenderbotModel", **_BART), text(6, decoder=5), hidden),
    Row("marian", build("MarianModel", **_BART), text(6, decoder=5), hidden),
    Row("m2m-100", build("M2M100Model", **_BART), text(6, decoder=5), hidden),
    Row("led", build(
        "LEDModel", **_BART, attention_window=4, max_encoder_position_embeddings=16, max_decoder_position_embeddings=16,
    ), text(8, decoder=5), hidden),
    Row("prophetnet", build(
        "ProphetNetModel", **_TOKENS, hidden_size=16, encoder_ffn_dim=20, num_encoder_layers=2,
        num_encoder_attention_heads=2, decoder_ffn_dim=20, num_decoder_layers=2, num_decoder_attention_heads=2,
        attention_dropout=0.0, dropout=0.0, activation_dropout=0.0, max_position_embeddings=16, ngram=2,
        num_buckets=8, relative_max_distance=16, disable_ngram_loss=True,
    ), text(6, decoder=5), hidden),
    Row("whisper", build(
        "WhisperModel", **_BART, num_mel_bins=5, max_source_positions=8, max_target_positions=12,
        apply_spec_augment=False,
    ), given(input_features=lambda n: normal(n, 5, 16), decoder_input_ids=lambda n: ids(n, 5)), hidden),
    Row("speech-to-text", build(
        "Speech2TextModel", **_BART | {"max_position_embeddings": 16}, num_conv_layers=2, conv_kernel_sizes=[3, 3],
        conv_channels=8, input_feat_per_channel=5, input_channels=1, max_source_positions=32, max_target_positions=12,
    ), given(input_features=lambda n: normal(n, 16, 5), decoder_input_ids=lambda n: ids(n, 5)), hidden),
    Row("time-series-transformer", build("TimeSeriesTransformerModel", **_SERIES), _series, joined(
        "last_hidden_state", "encoder_last_hidden_state"
    )),
    Row("time-series-mean-scaler", build(  # looks at the batch's mean too, for series in which nothing is observed
        "TimeSeriesTransformerModel", **_SERIES | {"scaling": "mean"},
    ), _series, hidden, either=True),
    Row("informer", build("InformerModel", **_SERIES, distil=False, attention_type="full"), _series, hidden),
    Row("autoformer-mixes", build(  # in training, the delays are those that are best on average over the batch
        "AutoformerModel", **_SERIES, label_length=2, moving_average=3,
    ), _series, hidden, refused=(PerExampleError, r"\S")),
    Row("autoformer-eval-mixes", build(  # each head, not each example, takes the next example's delays
        "AutoformerModel", **_SERIES, label_length=2, moving_average=3,
    ), _series, hidden, train=False, refused=(PerExampleError, r"\S")),
    Row("autoformer-eval-one-head", build(
        "AutoformerModel", **_SERIES | {"encoder_attention_heads": 1, "decoder_attention_heads": 1}, label_length=2,
        moving_average=3,
    ), _series, hidden, train=False),
]  # fmt: skip

_VISION = [
    Row("vit", build("ViTModel", **_VIT), images(), pooled, grad=True),
    Row("vit-sdpa", build("ViTModel", attention="sdpa", **_VIT), images(), pooled),
    Row("vit-square", build("ViTModel", **_VIT | {"num_attention_heads": 5, "hidden_size": 20}), images(), pooled, n=5),
    Row("vit-single", build("ViTModel", **_VIT), images(), pooled, n=1),
    Row("vit-own-loss", build("ViTForImageClassification", **_VIT, num_labels=3), images(
        labels=lambda n: ids(n, low=0, high=3)
    ), own),
    Row("vit-resized-positions", build("ViTModel", **_VIT), images(
        12, interpolate_pos_encoding=lambda n: True
    ), pooled),
    Row("deit", build("DeiTModel", **_VIT), images(), pooled),
    Row("dinov2", build("Dinov2Model", **_VIT, drop_path_rate=0.0, layerscale_value=0.7), images(), pooled),
    Row("dinov2-swiglu-resized", build(
        "Dinov2Model", **_VIT, drop_path_rate=0.0, use_swiglu_ffn=True,
    ), images(12), pooled),
    Row("dinov2-registers", build("Dinov2WithRegistersModel", **_VIT, num_register_tokens=2), images(), pooled),
    Row("vit-msn", build("ViTMSNModel", **_VIT), images(), hidden),
    Row("ijepa", build("IJepaModel", **_VIT), images(), hidden),
    Row("vit-mae", build(
        "ViTMAEForPreTraining", **_VIT | {"patch_size": 2}, decoder_hidden_size=12, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=16, mask_ratio=0.5,
    ), _mae_inputs, logits),
    Row("beit", build(
        "BeitModel", **_VIT, vocab_size=V, use_relative_position_bias=True, use_mask_token=True, drop_path_rate=0.0,
        layer_scale_init_value=0.5, use_mean_pooling=True, out_indices=[1],
    ), images(8, bool_masked_pos=lambda n: ids(n, 4, low=0, high=2).bool()), pooled, grad=True),
    Row("beit-shared-bias-square", build(
        "BeitModel", **_VIT | {"num_attention_heads": 5, "hidden_size": 20}, vocab_size=V,
        use_shared_relative_position_bias=True, use_absolute_position_embeddings=True, drop_path_rate=0.0,
        use_mean_pooling=False, out_indices=[1],
    ), images(), pooled, n=5),
    Row("data2vec-vision", build(
        "Data2VecVisionModel", **_VIT, use_relative_position_bias=True, drop_path_rate=0.0, out_indices=[1],
    ), images(), hidden),
    Row("yolos", build(
        "YolosForObjectDetection", **_VIT | {"image_size": [8, 8]}, num_detection_tokens=2,
        use_mid_position_embeddings=False,
    ), images(), joined("logits", "pred_boxes")),
    Row("swin-shifted", build("SwinModel", **_SWIN, use_absolute_embeddings=True), images(16), pooled, grad=True),
    Row("swin-windows-square", build("SwinModel", **_SWIN | {"num_heads": [4, 4]}), images(16), pooled, n=4),
    Row("swin-padded", build("SwinModel", **_SWIN | {"window_size": 3}), images(16), pooled),
    Row("swinv2-shifted", build("Swinv2Model", **_SWIN), images(16), pooled),
    Row("donut-swin", build("DonutSwinModel", **_SWIN), images(16), pooled),
    Row("swin2sr", build(
        "Swin2SRModel", **_NO_DROPOUT, image_size=8, patch_size=1, embed_dim=8, depths=[2], num_heads=[2],
        window_size=4, drop_path_rate=0.0, upscale=2,
    ), images(8), hidden),
    Row("convnext", build("ConvNextModel", **_CONVNEXT, layer_scale_init_value=0.5), images(16), pooled, grad=True),
    Row("convnextv2", build("ConvNextV2Model", **_CONVNEXT), images(16), pooled),
    Row("focalnet", build(
        "FocalNetModel", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], hidden_sizes=[8, 16],
        focal_levels=[2, 2], focal_windows=[3, 3], hidden_dropout_prob=0.0, drop_path_rate=0.0,
    ), images(16), pooled),
    Row("poolformer", build(
        "PoolFormerModel", hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, patch_sizes=[3, 3],
        strides=[2, 2], padding=[1, 1], drop_path_rate=0.0, layer_scale_init_value=0.5,
    ), images(16), hidden),
    Row("segformer", build(
        "SegformerModel", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ), images(16), hidden),
    Row("pvt", build(
        "PvtModel", image_size=16, num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1],
        hidden_sizes=[8, 16], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    ), images(16), hidden),
    Row("pvt-v2", build(
        "PvtV2Model", image_size=16, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    ), images(16), hidden),
    Row("hiera", build(
        "HieraModel", image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=8,
        depths=[1, 1], num_heads=[1, 2], embed_dim_multiplier=2.0, query_stride=[2, 2], masked_unit_size=[4, 4],
        num_query_pool=1, masked_unit_attention=[True, False], drop_path_rate=0.0,
    ), images(16), pooled),
    Row("vitdet", build(
        "VitDetModel", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, dropout_prob=0.0,
        image_size=16, pretrain_image_size=16, patch_size=4, drop_path_rate=0.0, window_block_indices=[0],
        window_size=2, residual_block_indices=[1], use_relative_position_embeddings=True,
    ), images(16), hidden),
    Row("dpt", build(
        "DPTModel", **_VIT, is_hybrid=False, backbone_out_indices=[0, 1], neck_hidden_sizes=[8, 8],
        reassemble_factors=[1, 1],
    ), images(), hidden),
    Row("glpn", build(
        "GLPNModel", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], drop_path_rate=0.0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ), images(16), hidden),
    Row("perceiver", build(
        "PerceiverModel", num_latents=4, d_latents=16, d_model=12, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=8, v_channels=16,
        attention_probs_dropout_prob=0.0,
    ), given(inputs=lambda n: normal(n, 7, 12)), hidden),
    Row("perceiver-square", build(
        "PerceiverModel", num_latents=4, d_latents=16, d_model=12, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=8, v_channels=16,
        attention_probs_dropout_prob=0.0,
    ), given(inputs=lambda n: normal(n, 4, 12)), hidden, n=4),
    Row("vivit", build(
        "VivitModel", **_VIT, num_frames=4, tubelet_size=[2, 4, 4],
    ), given(pixel_values=lambda n: normal(n, 4, 3, 8, 8)), pooled),
    Row("videomae", build(
        "VideoMAEModel", **_VIT, num_frames=4, tubelet_size=2, use_mean_pooling=False,
    ), given(pixel_values=lambda n: normal(n, 4, 3, 8, 8)), hidden),
    # Its embeddings take the class tokens of all N examples from the first N rows of [N * frames], which are those of
    # the first examples' frames: rows of example 0 serve other examples. Only the values are the same.
    Row("timesformer", build(
        "TimesformerModel", **_VIT, num_frames=2, attention_type="divided_space_time", drop_path_rate=0,
    ), given(pixel_values=lambda n: normal(n, 2, 3, 8, 8)), hidden, either=True),
    Row("bit-group-norm", build(
        "BitModel", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2, drop_path_rate=0.0,
        layer_type="preactivation",
    ), images(16), pooled),
]  # fmt: skip

_SPEECH = [
    Row("wav2vec2", build("Wav2Vec2Model", **_AUDIO, feat_extract_norm="group"), given(
        input_values=lambda n: normal(n, 60), attention_mask=lambda n: lengths(n, 60)
    ), hidden, grad=True),
    Row("wav2vec2-layer-norm", build(
        "Wav2Vec2Model", **_AUDIO, feat_extract_norm="layer", do_stable_layer_norm=True,
    ), given(input_values=lambda n: normal(n, 60)), hidden),
    Row("hubert", build("HubertModel", **_AUDIO, feat_extract_norm="group"), given(
        input_values=lambda n: normal(n, 60)
    ), hidden),
    Row("wavlm", build("WavLMModel", **_AUDIO, num_buckets=8, max_bucket_distance=10), given(
        input_values=lambda n: normal(n, 60)
    ), hidden),
    Row("data2vec-audio", build(
        "Data2VecAudioModel", **_AUDIO | {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}
    ), given(input_values=lambda n: normal(n, 60)), hidden),
    Row("unispeech", build("UniSpeechModel", **_AUDIO), given(input_values=lambda n: normal(n, 60)), hidden),
    Row("sew", build("SEWModel", **_AUDIO, squeeze_factor=2), given(input_values=lambda n: normal(n, 60)), hidden),
    Row("ast", build(
        "ASTModel", **_SIZES | _NO_DROPOUT, patch_size=4, frequency_stride=2, time_stride=2, max_length=12,
        num_mel_bins=6,
    ), given(input_values=lambda n: normal(n, 12, 6)), pooled),
]  # fmt: skip

_JOINT = [
    Row("clip", build("CLIPModel", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=12), lambda n: (
        text(6, mask=True)(n) | images()(n)
    ), joined("image_embeds", "text_embeds"), grad=True),
    Row("clip-square", build(
        "CLIPModel", text_config=_CLIP_TEXT | _HEADS4, vision_config=_CLIP_VISION | _HEADS4, projection_dim=12
    ), lambda n: text(4)(n) | images()(n), joined("image_embeds", "text_embeds"), n=4),
    Row("siglip", build("SiglipModel", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION), lambda n: (
        text(6)(n) | images()(n)
    ), joined("image_embeds", "text_embeds")),
    Row("blip", build(
        "BlipModel", text_config=_CLIP_TEXT | _NO_DROPOUT, vision_config=_CLIP_VISION, projection_dim=12
    ), lambda n: (
        text(6)(n) | images()(n)
    ), joined("image_embeds", "text_embeds")),
    Row("vilt", build("ViltModel", **_BERT, image_size=8, patch_size=4, max_image_length=-1), text(
        6, mask=True, types=2, pixel_values=lambda n: normal(n, 3, 8, 8)
    ), pooled),
    Row("patchtst", build(
        "PatchTSTModel", num_input_channels=2, context_length=12, patch_length=4, patch_stride=4, num_hidden_layers=2,
        d_model=16, num_attention_heads=2, ffn_dim=20, norm_type="layernorm", attention_dropout=0.0,
        positional_dropout=0.0, path_dropout=0.0, ff_dropout=0.0, do_mask_input=False,
    ), given(past_values=lambda n: normal(n, 12, 2)), hidden),
    Row("patchtsmixer", build(
        "PatchTSMixerModel", num_input_channels=2, context_length=12, patch_length=4, patch_stride=4, num_layers=2,
        d_model=16, dropout=0.0, norm_mlp="LayerNorm", gated_attn=True, mode="mix_channel",
    ), given(past_values=lambda n: normal(n, 12, 2)), hidden),
    Row("detr", build(
        "DetrModel", d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, num_queries=3, dropout=0.0,
        **_BACKBONE,
    ), images(64), hidden),
]  # fmt: skip

_BN = {"train": False, "noise": 0.3}  # BatchNorm with running statistics, which a new model has at 0 and 1
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
_MOBILEVIT = _NO_DROPOUT | {
    "image_size": 32, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2
}  # fmt: skip
_SEGFORMER = _NO_DROPOUT | {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "drop_path_rate": 0.0,
    "decoder_hidden_size": 8, "classifier_dropout_prob": 0.0,
}  # fmt: skip
_CONFORMER = _AUDIO | {"position_embeddings_type": "relative"}
_CVT = {
    "patch_sizes": [3, 3, 3], "patch_stride": [2, 2, 2], "patch_padding": [1, 1, 1], "embed_dim": [8, 8, 16],
    "num_heads": [1, 1, 2], "depth": [1, 2, 3], "mlp_ratio": [2.0] * 3, "attention_drop_rate": [0.0] * 3,
    "drop_rate": [0.0] * 3, "drop_path_rate": [0.0] * 3, "kernel_qkv": [3] * 3, "padding_kv": [1] * 3,
    "stride_kv": [2] * 3, "padding_q": [1] * 3, "stride_q": [1] * 3, "qkv_bias": [True] * 3,
    "cls_token": [False, False, True], "qkv_projection_method": ["dw_bn"] * 3,
}  # fmt: skip
_WAVE = given(input_values=lambda n: normal(n, 60))
_BATCH_NORM = [
    Row("resnet-train", build("ResNetModel", **_RESNET), images(16), pooled, refused=(
        UnsupportedModuleError, r"embedder\.embedder\.normalization"
    )),
    Row("resnet-eval", build("ResNetModel", **_RESNET), images(16), pooled, **_BN),
    Row("regnet-train", build("RegNetModel", **_RESNET, groups_width=4), images(16), pooled, refused=(
        UnsupportedModuleError, r"embedder\.embedder\.normalization"
    )),
    Row("regnet-eval", build("RegNetModel", **_RESNET, groups_width=4), images(16), pooled, **_BN),
    Row("mobilevit-train", build("MobileViTModel", **_MOBILEVIT), images(64), hidden, refused=(
        UnsupportedModuleError, r"conv_stem\.normalization"
    )),
    Row("mobilevit-eval", build("MobileViTModel", **_MOBILEVIT), images(32), hidden, slow=True, train=False, noise=0.6),
    Row("segformer-head-train", build("SegformerForSemanticSegmentation", **_SEGFORMER), images(16), logits, refused=(
        UnsupportedModuleError, r"decode_head\.batch_norm"
    )),
    Row("segformer-head-eval", build("SegformerForSemanticSegmentation", **_SEGFORMER), images(16), logits, **_BN),
    Row("conformer-train", build("Wav2Vec2ConformerModel", **_CONFORMER), _WAVE, hidden, refused=(
        UnsupportedModuleError, r"encoder\.layers\.0\.conv_module\.batch_norm"
    )),
    Row("conformer-eval", build("Wav2Vec2ConformerModel", **_CONFORMER), _WAVE, hidden, **_BN),
    Row("cvt-train", build("CvtModel", **_CVT), images(32), hidden, refused=(UnsupportedModuleError, "normalization")),
    Row("cvt-eval", build("CvtModel", **_CVT), images(32), hidden, copies=2, train=False),
    Row("swiftformer-eval", build(
        "SwiftFormerModel", image_size=32, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratio=2,
        drop_path_rate=0.0, drop_mlp_rate=0.0,
    ), images(32), hidden, slow=True, train=False),
    Row("efficientnet-eval", build(
        "EfficientNetModel", image_size=16, width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=4,
        kernel_sizes=[3, 3], in_channels=[32, 8], out_channels=[8, 12], depthwise_padding=[], strides=[1, 2],
        num_block_repeats=[1, 1], expand_ratios=[1, 2], squeeze_expansion_ratio=0.25, hidden_dim=1280, dropout_rate=0.0,
        drop_connect_rate=0.0,
    ), images(16), pooled, slow=True, train=False, noise=0.5),
]  # fmt: skip

_MIXING = [
    Row("mixtral-balance-loss", build(
        "MixtralForCausalLM", **_GQA | _MOE | {"output_router_logits": True}, num_local_experts=3,
        router_aux_loss_coef=0.5,
    ), text(6, labels=lambda n: ids(n, 6, seed=7)), own, refused=(PerExampleError, r"\S")),
    Row("clip-contrastive-loss", build(
        "CLIPModel", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=12
    ), lambda n: text(6)(n) | images(return_loss=lambda n: True)(n), own, refused=(PerExampleError, r"\S")),
    Row("clip-all-pairs", build(
        "CLIPModel", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=12
    ), lambda n: text(6)(n) | images()(n), joined("logits_per_image"), refused=(PerExampleError, r"\S")),
]  # fmt: skip

_BOXES = {"bbox": lambda n: ids(n, 6, 2, low=0, high=6).repeat(1, 1, 2) + torch.tensor([0, 0, 2, 3])}
_MAMBA2 = {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2}
_MORE = [
    Row("starcoder2", build("Starcoder2ForCausalLM", **_GQA, residual_dropout=0.0, embedding_dropout=0.0), text(
        6
    ), logits),
    Row("gpt-bigcode", build("GPTBigCodeForCausalLM", **_GPT2, multi_query=True), text(6), logits),
    Row("gpt2-cross-attention", build("GPT2LMHeadModel", **_GPT2, add_cross_attention=True), text(
        6, encoder_hidden_states=lambda n: normal(n, 5, 16)
    ), logits),
    Row("persimmon", build("PersimmonForCausalLM", **_LLAMA, qk_layernorm=True), text(6), logits),
    Row("nemotron", build("NemotronForCausalLM", **_GQA), text(6), logits),
    Row("smollm3", build("SmolLM3ForCausalLM", **_GQA), text(6), logits),
    Row("glm4", build("Glm4ForCausalLM", **_GQA, head_dim=8), text(6), logits),
    Row("gemma3n", build(
        "Gemma3nForCausalLM", **_GQA, head_dim=8, num_kv_shared_layers=0, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=V, laurel_rank=4, layer_types=["sliding_attention", "full_attention"],
        sliding_window=3, activation_sparsity_pattern=None,
    ), text(6), logits),
    Row("qwen3-next", build(
        "Qwen3NextForCausalLM", **_GQA, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=4, linear_value_head_dim=4, linear_conv_kernel_dim=3, num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=12, shared_expert_intermediate_size=12, decoder_sparse_step=1,
        layer_types=["linear_attention", "full_attention"],
    ), text(6), logits, either=True),
    Row("bamba", build(
        "BambaForCausalLM", **_GQA, **_MAMBA2, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=2, mamba_chunk_size=4,
        attn_layer_indices=[1],
    ), text(6), logits),
    Row("falcon-h1", build(
        "FalconH1ForCausalLM", **_GQA, **_MAMBA2, head_dim=4, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32,
        mamba_n_groups=2, mamba_chunk_size=4,
    ), text(6), logits),
    Row("zamba2", build(
        "Zamba2ForCausalLM", **_LLAMA | {"num_hidden_layers": 3}, **_MAMBA2, num_key_value_heads=2, n_mamba_heads=4,
        mamba_ngroups=2, chunk_size=4, layers_block_type=["mamba", "hybrid", "hybrid"], hybrid_layer_ids=[1, 2],
        num_mem_blocks=1, use_mem_rope=False, use_shared_attention_adapter=True, adapter_rank=4, attention_dropout=0.0,
    ), text(6), logits),
    Row("nemotron-h", build(
        "NemotronHForCausalLM", **_GQA, head_dim=4, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=4,
        conv_kernel=3, chunk_size=4, hybrid_override_pattern="M*",
    ), text(6), logits, either=True),
    Row("minimax", build(
        "MiniMaxForCausalLM", **_GQA, **_MOE, num_local_experts=3, block_size=4, head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ), text(6), logits, either=True),
    Row("dbrx", build(
        "DbrxForCausalLM", vocab_size=V, d_model=16, n_heads=4, n_layers=2, max_seq_len=16, resid_pdrop=0.0,
        emb_pdrop=0.0, pad_token_id=0,
        attn_config={"attn_pdrop": 0.0, "kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 20, "moe_num_experts": 3, "moe_top_k": 2},
    ), text(6), logits, either=True),
    Row("llama4", build(
        "Llama4ForCausalLM", **_GQA, head_dim=8, intermediate_size_mlp=20, num_local_experts=3, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=4,
    ), text(6), logits, either=True),
    Row("jetmoe", build(
        "JetMoeForCausalLM", **_TOKENS, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4,
        intermediate_size=20, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=16,
    ), text(6), logits, either=True),
    Row("phimoe", build(
        "PhimoeForCausalLM", **_GQA, **_MOE, num_local_experts=3, router_jitter_noise=0.0, input_jitter_noise=0.0,
    ), text(6), logits, either=True),
    Row("deepseek-v2", build(
        "DeepseekV2ForCausalLM", **_LLAMA, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=12, first_k_dense_replace=1, kv_lora_rank=6,
        q_lora_rank=5, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    ), text(6), logits, either=True),
    Row("nllb-moe", build(
        "NllbMoeModel", **_BART, num_experts=4, expert_capacity=64, encoder_sparse_step=2, decoder_sparse_step=2,
        router_jitter_noise=0.0, moe_token_dropout=0.0,
    ), text(6, decoder=5), hidden, either=True),
    Row("t5gemma", build("T5GemmaModel", encoder=_GQA | {"head_dim": 8}, decoder=_GQA | {"head_dim": 8}), text(
        6, decoder=5
    ), hidden),
    Row("trocr-decoder", build(
        "TrOCRForCausalLM", **_TOKENS, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=20,
        max_position_embeddings=16, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        cross_attention_hidden_size=12,
    ), text(6, encoder_hidden_states=lambda n: normal(n, 5, 12)), logits),
    Row("moonshine", build(
        "MoonshineModel", **_TOKENS, hidden_size=16, intermediate_size=20, encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
        max_position_embeddings=32, attention_dropout=0.0,
    ), given(input_values=lambda n: normal(n, 2400), decoder_input_ids=lambda n: ids(n, 5)), hidden),
    Row("speecht5", build(
        "SpeechT5Model", hidden_size=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=20,
        decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=20, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, positional_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        encoder_max_relative_position=5, apply_spec_augment=False, vocab_size=V,
    ), given(input_values=lambda n: normal(n, 7, 16), decoder_input_values=lambda n: normal(n, 5, 16)), hidden),
    Row("sew-d", build(
        "SEWDModel", **_AUDIO, squeeze_factor=2, position_buckets=8, max_position_embeddings=16,
    ), _WAVE, hidden),
    Row("encodec-encoder", build(
        "EncodecModel", part="encoder", sampling_rate=100, num_filters=4, hidden_size=8, num_residual_layers=1,
        upsampling_ratios=[2, 2], codebook_size=8, codebook_dim=8, num_lstm_layers=1, target_bandwidths=[1.5],
    ), given(hidden_states=lambda n: normal(n, 1, 32)), whole),
    Row("dac-encoder", build(
        "DacModel", part="encoder", encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_hidden_size=16,
        upsampling_ratios=[2, 2], n_codebooks=2, codebook_size=8, codebook_dim=4, hidden_size=16,
    ), given(hidden_state=lambda n: normal(n, 1, 32)), whole),
    Row("timesfm", build(
        "TimesFmModel", patch_length=4, context_length=16, horizon_length=4, hidden_size=16, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=2, head_dim=8, attention_dropout=0.0,
    ), given(
        past_values=lambda n: normal(n, 16), past_values_padding=lambda n: torch.zeros(n, 16).long(),
        freq=lambda n: ids(n, 1, low=0, high=3),
    ), hidden),
    Row("dinov3", build(
        "DINOv3ViTModel", **_SIZES, image_size=8, patch_size=4, num_register_tokens=2, pos_embed_rescale=None,
        pos_embed_shift=None, pos_embed_jitter=None, drop_path_rate=0.0, attention_dropout=0.0,
    ), images(), pooled),
    Row("dinov3-convnext", build(
        "DINOv3ConvNextModel", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.0,
    ), images(32), pooled),
    Row("aimv2", build("Aimv2VisionModel", **_SIZES, image_size=8, patch_size=4), images(), pooled),
    Row("siglip2-vision", build("Siglip2VisionModel", **_SIZES, num_patches=4, patch_size=4), given(
        pixel_values=lambda n: normal(n, 4, 48), pixel_attention_mask=lambda n: torch.ones(n, 4).long(),
        spatial_shapes=lambda n: torch.tensor([[2, 2]] * n),
    ), pooled),
    Row("vitpose", build(
        "VitPoseBackbone", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=[32, 32],
        patch_size=[16, 16], num_experts=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ), images(32), lambda out: out.feature_maps[0]),
    Row("dpt-depth", build(
        "DPTForDepthEstimation", **_VIT | {"num_hidden_layers": 4}, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=8,
    ), images(8), joined("predicted_depth"), noise=0.3),
    Row("conditional-detr", build(
        "ConditionalDetrModel", d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, num_queries=3, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, **_BACKBONE,
    ), images(64), hidden),
    Row("layoutlmv3", build(
        "LayoutLMv3Model", **_BERT | {"pad_token_id": 1}, max_2d_position_embeddings=12, coordinate_size=3,
        shape_size=2, input_size=8, patch_size=4, visual_embed=True, has_relative_attention_bias=True,
        has_spatial_attention_bias=True, rel_pos_bins=8, rel_2d_pos_bins=8, max_rel_pos=16, max_rel_2d_pos=16,
    ), text(6, mask=True, pixel_values=lambda n: normal(n, 3, 8, 8), **_BOXES), hidden),
    Row("lilt", build(
        "LiltModel", **_BERT | {"hidden_size": 24}, max_2d_position_embeddings=12, channel_shrink_ratio=2,
    ), text(6, mask=True, **_BOXES), pooled),
    Row("bros", build("BrosModel", **_BERT | {"hidden_size": 32}, dim_bbox=4), text(
        6, bbox=lambda n: normal(n, 6, 8).sigmoid()
    ), pooled),
    Row("splinter", build("SplinterModel", **_BERT), text(6, mask=True), hidden),
    Row("luke", build("LukeModel", **_BERT | {"pad_token_id": 1}, entity_vocab_size=7, entity_emb_size=8), text(
        6, mask=True, entity_ids=lambda n: ids(n, 2, low=1, high=7),
        entity_position_ids=lambda n: ids(n, 2, 3, low=0, high=6),
        entity_attention_mask=lambda n: torch.ones(n, 2).long(),
    ), joined("last_hidden_state", "entity_last_hidden_state", "pooler_output")),
    Row("tapas", build(
        "TapasModel", **_BERT, type_vocab_sizes=[3, 4, 4, 2, 4, 4, 4], max_num_rows=4, max_num_columns=4,
    ), text(6, mask=True, token_type_ids=lambda n: ids(n, 6, 7, low=0, high=2)), pooled, either=True),
    Row("visual-bert", build("VisualBertModel", **_BERT, visual_embedding_dim=10), text(
        6, mask=True, visual_embeds=lambda n: normal(n, 4, 10)
    ), pooled),
    Row("lxmert", build(
        "LxmertModel", **_TOKENS, **_NO_DROPOUT, hidden_size=16, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=10, visual_pos_dim=4,
    ), text(6, visual_feats=lambda n: normal(n, 4, 10), visual_pos=lambda n: normal(n, 4, 4, seed=6)), joined(
        "language_output", "vision_output", "pooled_output"
    )),
    Row("markuplm", build(
        "MarkupLMModel", **_BERT | {"pad_token_id": 1}, max_depth=3, xpath_unit_hidden_size=4,
        max_xpath_tag_unit_embeddings=8, max_xpath_subs_unit_embeddings=8, tag_pad_id=7, subs_pad_id=7,
    ), text(
        6, xpath_tags_seq=lambda n: ids(n, 6, 3, low=0, high=8),
        xpath_subs_seq=lambda n: ids(n, 6, 3, low=0, high=8, seed=9),
    ), pooled),
    Row("esm-token-dropout", build(
        "EsmModel", **_BERT | {"pad_token_id": 1}, mask_token_id=3, position_embedding_type="absolute",
        token_dropout=True,
    ), lambda n: {"input_ids": ids(n, 6, low=2, high=7), "attention_mask": lengths(n, 6)}, hidden),
    Row("chinese-clip", build(
        "ChineseCLIPModel", text_config=_CLIP_TEXT | _NO_DROPOUT, vision_config=_CLIP_VISION, projection_dim=12,
    ), lambda n: text(6)(n) | images()(n), joined("image_embeds", "text_embeds")),
    Row("clipseg", build(
        "CLIPSegForImageSegmentation", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION | {"num_hidden_layers": 3},
        projection_dim=12, extract_layers=[0, 1], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, conditional_layer=0,
    ), lambda n: text(6)(n) | images()(n), logits),
    Row("owlvit", build(
        "OwlViTModel", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=12
    ), lambda n: (
        text(6)(n) | images()(n)
    ), joined("image_embeds", "text_embeds")),
    Row("git", build("GitModel", **_BERT, vision_config=_CLIP_VISION), text(
        6, pixel_values=lambda n: normal(n, 3, 8, 8)
    ), hidden),
    Row("llava", build(
        "LlavaForConditionalGeneration", text_config={"model_type": "llama"} | _GQA,
        vision_config={"model_type": "clip_vision_model"} | _CLIP_VISION, image_token_id=3, vision_feature_layer=-1,
    ), lambda n: {
        "input_ids": torch.cat([torch.full((n, 4), 3), ids(n, 4)], 1), "pixel_values": normal(n, 3, 8, 8),
    }, logits, either=True),
    Row("paligemma", build(
        "PaliGemmaForConditionalGeneration", text_config={"model_type": "gemma"} | _GQA | {"head_dim": 8},
        vision_config={"model_type": "siglip_vision_model"} | _CLIP_VISION, image_token_id=3, projection_dim=16,
    ), lambda n: {
        "input_ids": torch.cat([torch.full((n, 4), 3), ids(n, 4)], 1), "pixel_values": normal(n, 3, 8, 8),
        "token_type_ids": torch.zeros(n, 8).long(),
    }, logits, either=True),
    Row("qwen2-vl", build(
        "Qwen2VLForConditionalGeneration", image_token_id=3, vision_start_token_id=17, vision_end_token_id=18,
        text_config=_GQA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 1, "temporal_patch_size": 1,
        },
    ), lambda n: {  # all patches of all images come as one sequence
        "input_ids": torch.cat([torch.full((n, 1), 17), torch.full((n, 4), 3), ids(n, 4, high=15)], 1),
        "pixel_values": normal(n, 4, 48), "image_grid_thw": torch.tensor([[1, 2, 2]] * n),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]] * n),
    }, logits, either=True),
    Row("wav2vec2-masked", build(
        "Wav2Vec2Model", **_AUDIO | {"apply_spec_augment": True, "mask_feature_prob": 0.0}
    ), given(
        input_values=lambda n: normal(n, 60), mask_time_indices=lambda n: lengths(n, 9) == 0
    ), hidden),
    Row("wav2vec2-ctc", build("Wav2Vec2ForCTC", **_AUDIO, ctc_loss_reduction="mean", pad_token_id=0), given(
        input_values=lambda n: normal(n, 60), labels=lambda n: ids(n, 3)
    ), own),
]  # fmt: skip

ROWS = [
    *_TEXT, *_CAUSAL, *_EXPERTS, *_SEQ2SEQ, *_VISION, *_SPEECH, *_JOINT, *_BATCH_NORM, *_MIXING,
    *(replace(row, slow=True) for row in _MORE),
]  # fmt: skip
