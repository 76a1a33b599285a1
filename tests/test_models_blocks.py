"""Blocks whose parts are chosen one by one: the four places of a norm, either similarity, and how they start."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tests.random_models import random_swin

import swinscale
from swinscale import cli
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.windows import stage_layouts

PLACEMENTS, SIMILARITIES = ("pre", "post", "sandwich", "res-post"), ("dot", "cosine")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("version", [1, 2])
def test_each_placement_is_its_formula(placement: str, version: int):
    """Pre-norm: arXiv 2002.04745; sandwich: CogView, arXiv 2105.13290; post: the original Transformer; res-post: Swin V2."""
    model = random_swin(version, norm_placement=placement, pad="legacy", img_size=28, window_size=3)
    block = model.layers[0].blocks[1]
    layout = stage_layouts(model.config, 0, (7, 7), torch.device("cpu"))[1]
    x = torch.randn(2, len(layout.source) // 9, 9, 24, generator=torch.Generator().manual_seed(1))

    def attention(y: torch.Tensor) -> torch.Tensor:
        assert layout.zero is not None
        return block.attn(y.masked_fill(layout.zero, 0), layout)

    y = x
    for branch, norm, last in (
        (attention, block.norm1, getattr(block, "branch_norm1", None)),
        (block.mlp, block.norm2, getattr(block, "branch_norm2", None)),
    ):
        y = {
            "pre": lambda y, f=branch, n=norm: y + f(n(y)),
            "post": lambda y, f=branch, n=norm: n(y + f(y)),
            "res-post": lambda y, f=branch, n=norm: y + n(f(y)),
            "sandwich": lambda y, f=branch, n=norm, e=last: y + e(f(n(y))),
        }[placement](y)
    assert torch.allclose(block(x, layout), y, atol=1e-6)


@pytest.mark.parametrize(("placement", "similarity"), list(product(PLACEMENTS, SIMILARITIES)))
def test_every_combination_trains_and_is_saved(placement: str, similarity: str, tmp_path):
    model = random_swin(2, norm_placement=placement, similarity=similarity)
    x = torch.randn(2, 3, 30, 41, generator=torch.Generator().manual_seed(0))
    out = model.train()(x)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    swinscale.save_pretrained(model.eval(), tmp_path)
    again = swinscale.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def test_defaults_are_the_published_blocks():
    assert all(SwinConfig(version=v).published_block for v in (1, 2))
    assert not SwinConfig(version=2, norm_placement="pre").published_block
    assert SwinConfig(version=1, norm_placement="res-post", similarity="cosine").initially_zero
    assert SwinConfig(version=1).initially_zero == ()


def test_identity_start():
    """With it each block is the identity at first; it can be had with sandwich norms too, and be left out."""
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for placement in ("res-post", "sandwich"):
        for start in (True, False):
            fields = {"img_size": 32, "embed_dim": 24, "depths": (2,), "num_heads": (2,), "num_classes": 0}
            model = SwinTransformer(SwinConfig(**fields, norm_placement=placement, identity_start=start)).eval()
            tokens = model.embed(x)
            assert torch.equal(model.layers[0](tokens), tokens) == start
    with pytest.raises(UsageError, match="no norm ends a branch"):
        SwinConfig(norm_placement="pre", identity_start=True)
    with pytest.raises(UsageError, match="norm_placement='middle' is not allowed"):
        SwinConfig(norm_placement="middle")  # type: ignore[arg-type]


def test_other_projects_cannot_hold_them(tmp_path, capsys):
    swinscale.save_pretrained(random_swin(2, similarity="dot"), tmp_path / "model")
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "timm"]) == 2
    assert "only --to swinscale holds this model" in capsys.readouterr().err
