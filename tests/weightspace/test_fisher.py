"""Exact per-sample Fisher of unmodified open_clip models against a loop over single samples."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from ftfast.errors import CheckpointError, ConfigError, ModelError
from ftfast.weightspace.fisher import FisherEstimate, FisherOptions, estimate_fisher
from ftfast.weightspace.objectives import ClassificationObjective, ContrastiveObjective

TEXT = {"context_length": 16, "vocab_size": 100, "width": 48, "heads": 4, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
TOWERS = {
    "vit": VIT,
    "vit-layer-scale": {**VIT, "ls_init_value": 0.1, "attentional_pool": True, "attn_pooler_heads": 4},
    "modified-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm-resnet": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
    "timm-vit": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
}


def make_clip(tower: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(embed_dim=32, vision_cfg=TOWERS[tower], text_cfg=TEXT)
    with torch.no_grad():
        for parameter in model.parameters():  # no zero bias or unit scale should hide a missing factor
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def make_pairs(n: int, size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator)
    tokens = torch.randint(1, 100, (n, 16), generator=generator)
    tokens[:, 3] = tokens[:, 5]  # a token twice in one text: its rows add up before squaring
    return images, tokens


def worst(ours: dict, truth: dict) -> tuple[float, str]:
    assert ours.keys() == truth.keys()
    # A key bias has no gradient at all (softmax ignores it); what remains there is rounding of rounding.
    floor = 1e-9 * max(value.norm().item() for value in truth.values())
    return max(((ours[n] - truth[n]).norm().item() / max(truth[n].norm().item(), floor), n) for n in truth)


@pytest.mark.parametrize("tower", list(TOWERS))
@pytest.mark.parametrize("definition", ["rows", "contribution"])
def test_every_parameter_equals_the_loop_over_samples(tower, definition):
    # An untrained ResNet gives nearly equal features for all images; what is left of the text gradients after that
    # cancellation carries 3e-4 of float32 rounding in any implementation, so this tower runs in double precision.
    dtype = torch.float64 if tower == "modified-resnet" else torch.float32
    model = make_clip(tower).train().to(dtype)
    size = TOWERS[tower]["image_size"]
    batches = [(images.to(dtype), tokens) for images, tokens in (make_pairs(5, size), make_pairs(3, size, seed=2))]
    loss = ContrastiveObjective(definition)
    ours = estimate_fisher(model, batches, loss=loss)
    assert model.training, "the model's mode is restored"
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ours.values.keys() == names
    assert ours.uncovered == ()
    assert ours.samples == 8
    truth = estimate_fisher(model, batches, loss=loss, options=FisherOptions(method="loop"))
    error, name = worst(ours.values, truth.values)
    assert error < 1e-5, (name, error)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch_first", [True, False])
def test_batches_of_one_through_plain_autograd_with_as_many_samples_as_tokens(batch_first):
    """The oracle here shares nothing with the estimator: batch size 1, ``.backward()``, ``.grad``."""
    model = make_clip().eval()
    if not batch_first:
        for module in model.modules():
            if isinstance(module, open_clip.transformer.Transformer):
                module.batch_first = False
            if isinstance(module, nn.MultiheadAttention):
                module.batch_first = False
    model.lock_text_tower()
    n = 17  # 16 patches and the class token: sample and sequence axes have one length
    images, _ = make_pairs(n, 32)
    labels = torch.arange(n) % 7
    classes = torch.nn.functional.normalize(torch.randn(7, 32), dim=-1)
    loss = ClassificationObjective(classes)
    ours = estimate_fisher(model, [(images, labels)], loss=loss)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    truth = {name: torch.zeros_like(p) for name, p in trainable.items()}
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        feature = model.encode_image(image[None], normalize=True)
        logits = model.logit_scale.exp() * feature @ classes.t()
        torch.nn.functional.cross_entropy(logits, label[None]).backward()
        for name, p in trainable.items():
            truth[name] += p.grad.square() / n
    error, name = worst(ours.values, truth)
    assert error < 1e-5, (name, error)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in ours.values


class Odd(nn.Module):
    """Tied weights, grouped convolution, group norm, a weight used twice and once through another operation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding="same", groups=2)
        self.norm = nn.GroupNorm(3, 6)
        self.linear = nn.Linear(6, 6)
        self.cross = nn.MultiheadAttention(6, 2, kdim=6, vdim=6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.linear(torch.relu(self.linear(x)))
        x = torch.cat([self.token.repeat(len(x), 1, 1), x], 1).transpose(0, 1)
        x = x + self.cross(x[:1], x[1:], x[1:], need_weights=False)[0]
        return (x.mean((0, 2)) * self.scale.exp() + self.scale).tanh()


def test_tied_weights_grouped_convolution_and_cross_attention():
    torch.manual_seed(0)
    model = Odd()
    batches = [(torch.randn(5, 4, 3, 5),)]

    def loss(model, batch, generator):
        return model(batch[0]).square()

    ours = estimate_fisher(model, batches, loss=loss)
    truth = estimate_fisher(model, batches, loss=loss, options=FisherOptions(method="loop"))
    error, name = worst(ours.values, truth.values)
    assert error < 1e-5, (name, error)


def test_sampled_labels_repeat_by_seed_and_approach_the_expectation():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(1, 4)
    model.encode_image = lambda images, normalize: model(images)
    loss = ClassificationObjective(torch.eye(3), logit_scale=1.0)
    batches = [(x.expand(500, 4), torch.zeros(500, dtype=torch.long))] * 8
    first, again, other = (
        estimate_fisher(model, batches, kind="sampled", loss=loss, options=FisherOptions(seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.values["weight"], again.values["weight"])
    assert not torch.equal(first.values["weight"], other.values["weight"])
    p = model(x).softmax(-1)[0].detach()
    expected = torch.outer(p * (1 - p), x[0].square())  # E_y (p_c - 1[y = c])^2 = p_c (1 - p_c)
    torch.testing.assert_close(first.values["weight"], expected, rtol=0.15, atol=0)
    true_labels = estimate_fisher(model, batches, loss=loss)
    assert not torch.allclose(true_labels.values["weight"], expected, rtol=0.15)


def test_squared_batch_gradient_is_the_square_of_the_mean():
    model, batches = make_clip(), [make_pairs(4, 32), make_pairs(4, 32, seed=2)]
    loss = ContrastiveObjective()
    ours = estimate_fisher(model, batches, kind="squared_batch_gradient", loss=loss)
    truth = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for batch in batches:
        model.zero_grad()
        loss(model, batch, None).mean().backward()
        for name, p in model.named_parameters():
            truth[name] += p.grad.square() / 2
    error, _ = worst(ours.values, truth)
    assert error < 1e-5
    exact = estimate_fisher(model, batches, loss=loss)
    ratio = sum(v.sum() for v in ours.values.values()) / sum(v.sum() for v in exact.values.values())
    assert ratio < 0.8, "a batch gradient's square is smaller than the mean square of its samples"


def test_a_stopped_estimate_resumes_exactly(tmp_path):
    model, loss = make_clip(), ContrastiveObjective()
    batches = [make_pairs(3, 32, seed=s) for s in range(4)]
    whole = estimate_fisher(model, batches, kind="sampled", loss=loss)
    options = FisherOptions(save_path=str(tmp_path / "fisher.safetensors"), save_every=1)

    def broken():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, broken(), kind="sampled", loss=loss, options=options)
    with pytest.raises(CheckpointError, match="unfinished"):
        FisherEstimate.load(options.save_path)
    with pytest.raises(CheckpointError, match="another"):
        estimate_fisher(model, batches, kind="empirical", loss=loss, options=options)
    resumed = estimate_fisher(model, batches, kind="sampled", loss=loss, options=options)
    assert all(torch.equal(resumed.values[name], value) for name, value in whole.values.items())
    loaded = FisherEstimate.load(options.save_path)
    assert loaded.samples == 12
    assert loaded.kind == "sampled"
    assert all(torch.equal(loaded.values[name], value) for name, value in whole.values.items())
    assert "62 of 62 parameters" in loaded.coverage()
    histogram = loaded.histogram()
    assert sum(histogram.values()) == sum(v.numel() for v in loaded.values.values())
    assert histogram["0"] >= 20 * 48, "tokens that never occur have no Fisher"


def test_limits_and_honest_refusals(tmp_path):
    model, loss = make_clip(), ContrastiveObjective()
    batches = [make_pairs(4, 32), make_pairs(4, 32)]
    assert estimate_fisher(model, batches, loss=loss, options=FisherOptions(max_samples=6)).samples == 6
    with pytest.raises(ConfigError, match="no samples"):
        estimate_fisher(model, [], loss=loss)
    with pytest.raises(ConfigError, match="use one of"):
        estimate_fisher(model, batches, kind="exactish", loss=loss)

    partitioned = make_clip()
    weight = partitioned.visual.conv1.weight  # as ZeRO stage 3 leaves it: no elements here, the full size noted
    weight.ds_numel, weight.data = weight.numel(), torch.empty(0)
    with pytest.raises(ModelError, match=r"'visual\.conv1\.weight'.*before deepspeed\.initialize"):
        estimate_fisher(partitioned, batches, loss=loss)

    def image_only(model, batch, generator):
        return model.encode_image(batch[0]).square().sum(-1)

    with pytest.raises(ModelError, match="got no gradient"):
        estimate_fisher(model, batches, loss=image_only)
    partial = estimate_fisher(model, batches, loss=image_only, options=FisherOptions(require_full_coverage=False))
    assert "text_projection" in partial.uncovered
    assert "none for" in partial.coverage()

    def mixing(model, batch, generator):
        return torch.einsum("nd,de->n", batch[0].flatten(1)[:, :32], model.text_projection[:32])

    with pytest.raises(ModelError, match="method='loop'"):
        estimate_fisher(model, batches, loss=mixing)
    damaged = tmp_path / "bad.safetensors"
    damaged.write_bytes(b"\x08\0\0\0\0\0\0\0{}      junk")
    with pytest.raises(CheckpointError, match="not a Fisher file"):
        FisherEstimate.load(damaged)
