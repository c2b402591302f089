"""Cascade Mask R-CNN with Vim-Ti on COCO, 1024² large-scale jitter, 184,375 updates of 64 images, layer decay 0.837.

    scripts/dist_train_det.sh det/configs/cascade_mask_rcnn_vim_tiny_coco.py 8 --amp \\
        --cfg-options model.backbone.pretrained=vim_tiny.pth model.backbone.discretization_method=bilinear

Not trained with this code yet.
"""

_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_lsj.py", "_base_/schedule_100ep.py", "_base_/runtime.py"]
