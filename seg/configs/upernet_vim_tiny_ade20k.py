"""UPerNet with Vim-Ti on ADE20K: 60,000 updates of 32 images, lr 2e-4, weight decay 0.1, layer decay 0.92.

    scripts/dist_train_seg.sh seg/configs/upernet_vim_tiny_ade20k.py 4 --amp \\
        --cfg-options model.backbone.pretrained=vim_tiny.pth model.backbone.discretization_method=bilinear

Not trained with this code yet.
"""

_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_60k.py", "_base_/runtime.py"]
