"""A plain segmenter with Vim-Ti on ADE20K: one convolution over the last block's map, without pyramid.

    scripts/dist_train_seg.sh seg/configs/plain_vim_tiny_ade20k.py 4 --amp \\
        --cfg-options model.backbone.pretrained=vim_tiny.pth

Not trained with this code yet.
"""

_base_ = ["upernet_vim_tiny_ade20k.py"]
embed_dim = 192
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(out_indices=(11, 23), if_fpn=False, use_residual_as_feature=True, last_layer_process="add & norm"),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=embed_dim,
        in_index=1,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(in_index=0),
)
