"""UPerNet with Vim-B on ADE20K: as Vim-S, 768 channels wide.

    scripts/dist_train_seg.sh seg/configs/upernet_vim_base_ade20k.py 4 --amp \\
        --cfg-options model.backbone.pretrained=vim_base.pth model.backbone.with_cp=True

Nothing is published for this size; not trained with this code yet.
"""

_base_ = ["upernet_vim_small_ade20k.py"]
embed_dim = 768
model = dict(
    backbone=dict(embed_dim=embed_dim),
    decode_head=dict(in_channels=[embed_dim] * 4, channels=embed_dim),
    auxiliary_head=dict(in_channels=embed_dim),
)
