import math

import pytest
import torch
import torch.nn.functional as F

from fastlora.continual.losses import contrastive_loss, distillation_loss


def published_loss(images, seen, current, labels, scale):
    """The published code, op for op: logits over (seen + current), seen columns -inf, 0/1 targets [classes, batch]."""
    embeddings, labels = torch.cat([seen, current]), labels + len(seen)
    logits = scale * images @ embeddings.t()
    logits[:, : len(seen)] = float("-inf")
    image_side = F.cross_entropy(logits, labels)
    mask = torch.eq(labels.view(-1, 1), torch.arange(len(embeddings)).view(1, -1)).float().t()
    return image_side + F.cross_entropy(scale * embeddings @ images.t(), mask)


@pytest.mark.parametrize("seen_classes", [0, 1, 7])
def test_equals_the_published_loss_and_its_gradients(seen_classes):
    """Seen embeddings are not needed: only their number is. Absent classes (2 of 5) and a class several times."""
    torch.manual_seed(0)
    images = F.normalize(torch.randn(9, 16, dtype=torch.float64), dim=-1).requires_grad_()
    current = F.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1).requires_grad_()
    seen = F.normalize(torch.randn(seen_classes, 16, dtype=torch.float64), dim=-1)
    labels, scale = torch.tensor([0, 0, 0, 3, 3, 4, 4, 4, 4]), torch.tensor(14.3, dtype=torch.float64)
    expected = published_loss(images, seen, current, labels, scale)
    loss = contrastive_loss(images, current, labels, scale, seen_classes)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(loss, [images, current]), torch.autograd.grad(expected, [images, current])
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """Two images of class 0, one class seen before: image side ln(1 + e^-2), text side 2 ln 2 over 3 rows."""
    images, text = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = contrastive_loss(images, text, torch.tensor([0, 0]), torch.tensor(1.0), seen_classes=1)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)) + 2 * math.log(2) / 3, rel=1e-6)


def test_logit_scale_may_have_one_element():
    images, text = torch.eye(2), torch.eye(2)
    loss = contrastive_loss(images, text, torch.tensor([0, 1]), torch.tensor([3.0]))
    assert loss.shape == ()


def test_distillation_by_hand():
    """Teacher (3/4, 1/4) and student (1/2, 1/2) at temperature 2: 4 ln 2, whatever the teacher."""
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    assert float(distillation_loss(teacher, student, 2.0)) == pytest.approx(4 * math.log(2))
    student = torch.tensor([[2 * math.log(4), 0.0]])  # (4/5, 1/5)
    expected = -4 * (0.75 * math.log(0.8) + 0.25 * math.log(0.2))
    assert float(distillation_loss(teacher, student, 2.0)) == pytest.approx(expected, rel=1e-6)


def test_distillation_gradient_is_the_difference_of_the_distributions():
    """T (softmax(student / T) - softmax(teacher / T)) / rows; none where they agree up to a constant in each row."""
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for given in (student, teacher + torch.randn(3, 1)):
        given = given.clone().requires_grad_()
        distillation_loss(teacher, given, 3.0).backward()
        expected = 3.0 * ((given.detach() / 3).softmax(1) - (teacher / 3).softmax(1)) / 3
        torch.testing.assert_close(given.grad, expected, rtol=1e-9, atol=1e-12)
    assert float(given.grad.abs().max()) < 1e-6
