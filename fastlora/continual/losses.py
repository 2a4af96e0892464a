"""The supervised loss of CoDyRA (arXiv 2412.01004), as in its published code, and distillation from a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, labels: Tensor, logit_scale: Tensor, seen_classes: int = 0
) -> Tensor:
    """Image-to-text plus text-to-image cross-entropy over the classes of the current task.

    The published loss runs over (seen + current) class prompts, with the image side's seen columns set to -inf and
    0/1 targets [classes, batch] on the text side, not normalised, whose seen rows are all zero. A column of -inf is
    a column left out of the softmax, and a row of zero targets adds 0 to the sum of the text side and 1 to the rows
    it is divided by: so the embeddings of seen classes are never needed, their number alone is.

    Args:
        image_features: [B, D], unit rows.
        text_features: [C, D], unit rows, one per class of the current task.
        labels: [B], 0 to C - 1.
        logit_scale: 0-d or [1], the multiplier itself (not its logarithm).
        seen_classes: number of classes of the earlier tasks.
    Returns:
        0-d tensor.
    """
    logits = logit_scale * image_features @ text_features.t()  # [B, C]
    image_side = F.cross_entropy(logits, labels)
    classes = torch.arange(len(text_features), device=labels.device)  # one_hot would read the labels on the host
    targets = (classes[:, None] == labels).to(logits.dtype)  # [C, B]; a class twice in a batch has two 1s
    per_class = F.cross_entropy(logits.t(), targets, reduction="sum")
    return image_side + per_class / (seen_classes + len(text_features))


def distillation_loss(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 times the cross-entropy of softmax(student / T) under softmax(teacher / T), mean over the rows.

    Hinton et al. (arXiv 1503.02531); as in LwF (arXiv 1606.09282, Eq. 2 and 3, up to the factor T^2, which keeps the
    size of the gradient) and ZSCL's published code. The gradient is that of T^2 KL(teacher || student): none where the
    two agree up to a constant in each row. The value there is the teacher's entropy times T^2, not 0.

    Args:
        teacher, student: logits, [rows, choices].
    Returns:
        0-d tensor.
    """
    target = (teacher / temperature).softmax(dim=-1)
    return F.cross_entropy(student / temperature, target) * temperature**2
