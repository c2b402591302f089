"""Cascade Mask R-CNN with Vim-S on COCO, 1024² large-scale jitter, 184,375 updates of 64 images, layer decay 0.837.

    scripts/dist_train_det.sh det/configs/cascade_mask_rcnn_vim_small_coco.py 8 --amp \\
        --cfg-options model.backbone.pretrained=vim_small.pth model.backbone.discretization_method=bilinear

Not trained with this code yet.
"""

_base_ = ["cascade_mask_rcnn_vim_tiny_coco.py"]
embed_dim = 384
model = dict(backbone=dict(embed_dim=embed_dim), neck=dict(in_channels=embed_dim))
