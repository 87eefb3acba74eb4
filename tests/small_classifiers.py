"""A small ViT classifier of MMPretrain, as built and as after training."""

import torch
from families import VIT, flatten, image, stir

from iconformer_mm import inject


def classifier(num_classes=10, seed=0):
    from mmpretrain.models import build_classifier

    torch.manual_seed(seed)
    return build_classifier(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch=VIT, img_size=64),
            neck=dict(type='ClsBatchNormNeck', input_features=32),
            head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=32),
        )
    )


def trained(**options):
    """A model as after training: adapters, head and the neck's statistics have moved."""
    model = classifier()
    inject(model, **options)
    stir(model)
    with torch.no_grad():
        model.head.fc.weight.add_(1)
        model.neck.bn.running_mean.add_(1)
    return model


def logits(model):
    model.eval()
    return model.head(model.extract_feat(image((64, 64)))).detach()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(flatten(first), flatten(second), strict=True))
