"""Accuracy and area of a classification, compared with counting pairs."""

import numpy as np
import pytest
import torch

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import ConfigError
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.feature_tasks.classification import Classification, area_under_curve

FIELDS = {"dim": 16, "layers": 1, "heads": 2, "segment_lengths": [8], "dilation_rates": [1], "feature_dim": 4}


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40) / 5.0, rng.random(40) < 0.4  # with ties
    pairs = [(x > y) + (x == y) / 2 for x in scores[positive] for y in scores[~positive]]
    assert area_under_curve(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve(scores, np.ones(40, bool)) is None
    assert area_under_curve(scores, np.zeros(40, bool)) is None


def test_metrics_of_two_and_of_more_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 3, (30,))
    task = Classification(LongNetEncoder(EncoderConfig(**FIELDS, pool="mean")), 3, 0.0)
    found, scores = task.metrics(logits, labels.tolist()), logits.softmax(1).numpy()
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    areas = [area_under_curve(scores[:, k], (labels == k).numpy()) for k in range(3)]
    assert found["auc"] == pytest.approx(np.mean(areas))
    two = task.metrics(logits[:, :2], (labels % 2).tolist())
    assert two["auc"] == pytest.approx(
        area_under_curve((logits[:, 1] - logits[:, 0]).numpy(), (labels % 2 == 1).numpy())
    )
    assert task.metrics(logits[:2, :2], [0, 0]).keys() == {"accuracy"}


def test_an_encoder_without_a_pool_is_refused():
    with pytest.raises(ConfigError, match=r"but model\.pool=none; use model\.pool=mean"):
        Classification.check(EncoderConfig(**FIELDS))
