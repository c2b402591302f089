"""UPerNet over Vim-Ti's pyramid, an auxiliary head on its third level; windows of 512×512 slide over larger images."""

embed_dim = 192
num_classes = 150
window = (512, 512)
norm_cfg = dict(type="BN", requires_grad=True)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=False)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=window,
    ),
    backbone=dict(
        type="VisionMambaSeg",
        img_size=512,
        patch_size=16,
        stride=16,
        embed_dim=embed_dim,
        depth=24,
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        residual_in_fp32=False,
        discretization_method="zoh",
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[embed_dim] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=embed_dim,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=1.0, **loss),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=embed_dim,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **loss),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=window, stride=(341, 341)),
)
