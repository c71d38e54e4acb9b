import torch
from torch.nn import functional as F

from longnet_dist.model.head import LanguageModelHead


def test_head_gives_logits_or_the_loss_sum_of_the_first_rows_of_a_tied_weight():
    torch.manual_seed(0)
    head = LanguageModelHead(8, 11, chunk=4)
    head.weight = torch.nn.Parameter(torch.randn(12, 8))
    x, labels = torch.randn(2, 5, 8), torch.randint(11, (2, 5))
    logits = head(x)
    assert logits.shape == (2, 5, 11)
    torch.testing.assert_close(
        head(x, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    )
