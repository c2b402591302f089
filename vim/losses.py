"""What training minimizes: classification losses of timm and torch, and distillation from a teacher."""

import argparse

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which also smooths the labels; None if both are off."""
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def create_criterion(args: argparse.Namespace, mixup: Mixup | None, teacher: nn.Module | None) -> "Criterion":
    """The loss for labels as `mixup` makes them; binary cross-entropy counts every class mixed in as present."""
    if args.bce_loss:
        base: nn.Module = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    elif mixup is not None:
        base = SoftTargetCrossEntropy()
    else:
        base = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    return Criterion(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)


class Criterion(nn.Module):
    """`base` loss; with a teacher (1 - alpha) · base + alpha · distillation (DeiT; Touvron et al., 2021).

    hard: cross-entropy with the teacher's choice. soft: KL divergence between the distributions at temperature tau,
    times tau², summed over classes and averaged over images *and classes*, as DeiT has it.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module | None, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """images (B, C, H, W) for the teacher; outputs: logits (B, classes), or also those of a distillation token.

        labels: (B,) int64 or (B, classes) probabilities. Computed in float32.
        """
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.base(logits.float(), labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images).float()
        if self.kind == "hard":
            distillation = F.cross_entropy(distilled.float(), teacher_logits.argmax(dim=1))
        else:
            log_p, log_q = (F.log_softmax(x.float() / self.tau, dim=1) for x in (distilled, teacher_logits))
            distillation = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * self.tau**2 / log_p.numel()
        return (1 - self.alpha) * loss + self.alpha * distillation
