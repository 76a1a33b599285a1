"""Classification: loss, mixing, linear probe, measures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.tasks import Classify, ClassifyConfig
from swinscale.weights import from_pretrained, read_metadata


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 3, 32, 32), "label": torch.arange(count) % 5}


def test_loss_is_smoothed_cross_entropy():
    task = Classify(random_swin(drop_path_rate=0.0), 5, ClassifyConfig(label_smoothing=0.2))
    given = batch()
    loss, _ = task(given)
    share = F.one_hot(given["label"], 5) * 0.8 + 0.2 / 5
    expected = -(share * task.model(given["image"]).log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_makes_soft_labels_and_follows_the_seed(mixup, cutmix):
    task = Classify(random_swin(drop_path_rate=0.0), 5, ClassifyConfig(mixup=mixup, cutmix=cutmix))
    given = batch()
    torch.manual_seed(0)
    images, labels = task.mix(given["image"], given["label"])
    assert labels.shape == (6, 5)
    assert torch.allclose(labels.sum(1), torch.ones(6))
    assert not torch.equal(images, given["image"])
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task(given)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_linear_probe_changes_the_classifier_alone():
    task = Classify(random_swin(drop_path_rate=0.5), 5, ClassifyConfig(linear_probe=True)).train()
    before = {n: p.clone() for n, p in task.named_parameters()}
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(batch())[0].backward()
    optimizer.step()
    changed = {n for n, p in task.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"model.head.weight", "model.head.bias"}


def test_measures():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :7]

    task = Classify(Fixed(), 7)
    images = torch.zeros(4, 1, 1, 7)
    images[:, 0, 0] = torch.tensor([7.0, 6, 5, 4, 3, 2, 1])  # the order of the classes is 0, 1, 2, …
    metrics = task.new_metrics()
    task.update_metrics(metrics, {"image": images, "label": torch.tensor([0, 1, 4, 6])})
    assert metrics["top1"].compute().item() == 0.25
    assert metrics["top5"].compute().item() == 0.75
    assert metrics["confusion"].compute()[:, 0].tolist() == [1, 1, 0, 0, 1, 0, 1]


def test_any_module_can_be_trained_but_not_everything_applies():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5))
    task = Classify(plain, 5)
    assert task(batch())[0].isfinite()
    assert task.no_weight_decay() == set()
    with pytest.raises(UsageError, match="Sequential is neither a SwinTransformer"):
        Classify(plain, 5, ClassifyConfig(linear_probe=True))
    with pytest.raises(UsageError, match="num_classes=1"):
        Classify(plain, 1)


def test_saved_directory_says_how_to_use_it(tmp_path):
    preprocessing = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "classes": list("abcde"),
        "img_size": [32, 32],
        "crop_ratio": None,
    }
    task = Classify(random_swin(), 5, preprocessing=preprocessing)
    task.save_pretrained(tmp_path)
    assert read_metadata(tmp_path)["preprocessing"] == preprocessing
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(from_pretrained(tmp_path).eval()(x), task.model(x))
