"""UPerNet with Vim-S on ADE20K: RoPE, residual features, lr 1e-4, weight decay 0.05, layer decay 0.95.

    scripts/dist_train_seg.sh seg/configs/upernet_vim_small_ade20k.py 4 --amp \\
        --cfg-options model.backbone.pretrained=vim_small.pth model.backbone.discretization_method=bilinear

Not trained with this code yet.
"""

_base_ = ["upernet_vim_tiny_ade20k.py"]
embed_dim = 384
model = dict(
    backbone=dict(
        embed_dim=embed_dim,
        if_rope=True,
        if_rope_residual=True,
        use_residual_as_feature=True,
        last_layer_process="add",
    ),
    decode_head=dict(in_channels=[embed_dim] * 4, channels=embed_dim),
    auxiliary_head=dict(in_channels=embed_dim),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(layer_decay_rate=0.95))
