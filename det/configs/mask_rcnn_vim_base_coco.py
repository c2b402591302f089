"""Mask R-CNN with Vim-B on COCO, 1024² large-scale jitter, 184,375 updates of 64 images, layer decay 0.7.

    scripts/dist_train_det.sh det/configs/mask_rcnn_vim_base_coco.py 8 --amp \\
        --cfg-options model.backbone.pretrained=vim_base.pth model.backbone.with_cp=True

Not trained with this code yet.
"""

_base_ = ["mask_rcnn_vim_tiny_coco.py"]
embed_dim = 768
model = dict(backbone=dict(embed_dim=embed_dim), neck=dict(in_channels=embed_dim))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
