"""Wan 2.1 and 2.2.

The lists of musubi and silveroxides, which agree; extra conditions: VACE, Animate, S2V, HuMo, Fun-Control.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import comfyui, running
from .base import CONDITION, TEXT, VECTOR, Family, signature
from .comfyui import FIRST_FRAME, VIDEO, Scene, Want, encoded, listed, measure, over, signal, takes, times, vision
from .folds import given, normed
from .rules import HALVES, rules, under

HEAD = 128
"""Channels of an attention head in all sizes (norms span all heads); narrow models may have fewer."""


def _config(shapes: running.Shapes) -> dict[str, Any]:
    def size(name: str, axis: int) -> int | None:
        return shapes[name][axis] if name in shapes else None

    embedder = "condition_embedder"
    return {
        **running.measured(shapes, head=HEAD),
        "patch_size": tuple(shapes["patch_embedding.weight"][2:]),
        "text_dim": shapes[f"{embedder}.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes[f"{embedder}.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": size(f"{embedder}.image_embedder.norm1.weight", 0),
        "added_kv_proj_dim": size("blocks.0.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": size(f"{embedder}.image_embedder.pos_embed", 1),
    }


def _vace_config(shapes: running.Shapes) -> dict[str, Any]:
    """As `_config`; hints are assumed to enter at equal intervals, which no tensor shows."""
    config, hints = _config(shapes), running.blocks(shapes, "vace_blocks.")
    every = config["num_layers"] // hints
    return {
        **config,
        "vace_layers": tuple(range(0, every * hints, every)),
        "vace_in_channels": shapes["vace_patch_embedding.weight"][1],
    }


def _image(config: running.Config, _: running.Geometry) -> running.Signal | None:
    """CLIP vision features of one image, or of the first and the last, in image-to-video models."""
    tokens = config["pos_embed_seq_len"] or comfyui.VISION_TOKENS
    return None if config["image_dim"] is None else running.Signal((tokens, config["image_dim"]))


def _control(config: running.Config, geometry: running.Geometry) -> running.Signal:
    """The control video of VACE."""
    return running.Signal((config["vace_in_channels"], *LATENTS(config, geometry)[1:]))


def _arguments(inputs: running.Inputs) -> dict[str, Any]:
    arguments = inputs.usual(1000)
    if inputs.config["pos_embed_seq_len"]:  # the class expects a sample's two images along the batch
        images = arguments["encoder_hidden_states_image"]
        arguments["encoder_hidden_states_image"] = images.unflatten(1, (2, -1)).flatten(0, 1)
    return arguments


def speech_layers(scene: Scene) -> int:
    """Layers of the speech encoder that Wan S2V mixes."""
    return int(scene.part("casual_audio_encoder.weights").shape[1])


def beside_channels(scene: Scene) -> int:
    """Input channels beyond the latents: images of 16 channels each, and often a mask of four."""
    more = measure("patch_embedding", scene) - scene.channels
    return max(more - 4 if more % scene.channels == 4 else more, 0) or scene.channels


def _channels_first(values: Any) -> Any:
    """[1, T, layers, C] as [1, layers, C, T]."""
    return values.movedim(1, -1)


LATENTS = running.video("patch_size")
ARCHITECTURE = running.Architecture(
    transformer="WanTransformer3DModel",
    config=_config,
    latents=LATENTS,
    wants={
        "encoder_hidden_states": running.text("text_dim"),
        running.CONDITION_LATENTS: running.beside(LATENTS, 0),
        "encoder_hidden_states_image": _image,
    },
    arguments=_arguments,
    # Fun's reference image, Camera's path, SCAIL's and Animate's pose and face, S2V's audio
    optional=(
        r"(?:ref_conv|control_adapter|patch_embedding_pose|pose_patch_embedding|motion_encoder|face_adapter"
        r"|face_encoder|casual_audio_encoder|audio_injector|cond_encoder|frame_packer|trainable_cond_mask)\..*"
    ),
)
_REFERENCE = encoded(FIRST_FRAME, form=listed)

FAMILY = Family(
    name="wan",
    title="Wan 2.1 and 2.2 (also VACE, Animate, S2V, SkyReels V2)",
    signatures=(
        signature("blocks.0.self_attn.q blocks.0.cross_attn.q blocks.0.ffn.0 time_projection.1 head.head"),
        signature("blocks.0.self_attn.to_q blocks.0.cross_attn.to_q time_projection.1 head.head"),  # Animate 2
        signature("blocks.0.attn1.to_q blocks.0.attn2.to_q condition_embedder.time_proj"),
    ),
    blocks=r"(?:blocks|vace_blocks)\.\d+",
    keep={
        r"condition_embedder\.text_embedder": TEXT,
        r"img_emb|condition_embedder\.image_embedder": CONDITION,
        r"condition_embedder": VECTOR,
        r"audio_\w+|casual_audio_encoder|face_\w+|motion_encoder|frame_packer|cond_encoder": CONDITION,
        r"control_adapter|trainable_cond_mask": CONDITION,
    },
    names=(
        *under("{blocks,vace_blocks}.*.")(
            ("{self,cross}_attn.{q,k,v,o}", "attn{1,2}.to_{q,k,v,out.0}"),
            ("{self,cross}_attn.norm_{q,k}", "attn{1,2}.norm_{q,k}"),
            ("cross_attn.{k,v}_img", "attn2.add_{k,v}_proj"),
            ("cross_attn.norm_k_img", "attn2.norm_added_k"),
            ("norm3", "norm2"),
            ("modulation", "scale_shift_table"),
            ("ffn.{0,2}", "ffn.net.{0.proj,2}"),
        ),
        *under("", "condition_embedder.")(
            ("{time,text}_embedding.{0,2}", "{time,text}_embedder.linear_{1,2}"),
            ("time_projection.1", "time_proj"),
            ("img_emb.proj.{0,1,3,4}", "image_embedder.{norm1,ff.net.0.proj,ff.net.2,norm2}"),
            ("img_emb.emb_pos", "image_embedder.pos_embed"),
        ),
        *rules(
            ("vace_blocks.*.{before,after}_proj", "vace_blocks.*.proj_{in,out}"),
            ("head.{head,modulation}", "{proj_out,scale_shift_table}"),
            ("face_adapter.fuser_blocks.*.linear1_q", "face_adapter.*.to_q"),
            ("face_adapter.fuser_blocks.*.linear1_kv", "face_adapter.*.to_{k,v}", HALVES),
            ("face_adapter.fuser_blocks.*.linear2", "face_adapter.*.to_out"),
            ("motion_encoder.enc.fc.*", "motion_encoder.motion_network.*"),
        ),
    ),
    architecture=ARCHITECTURE,
    architectures={
        "VACE": replace(
            ARCHITECTURE,
            transformer="WanVACETransformer3DModel",
            config=_vace_config,
            wants={**ARCHITECTURE.wants, "control_hidden_states": _control},
        )
    },
    elsewhere=("HuMo", "Dancer", "Animate 2"),
    # Each block adds its own table to the shared modulation, so only the text's norm can scale channels.
    folds=(
        normed("blocks.*.norm2", "blocks.*.attn2.to_q"),
        given("blocks.*.attn1.to_v", "blocks.*.attn1.to_out.0"),
        given("blocks.*.attn2.{to_v,add_v_proj}", "blocks.*.attn2.to_out.0"),
    ),
    comfyui={
        "WAN21": takes(
            "text_embedding.0",
            clip_vision_output=vision("img_emb.proj.1", "img_emb.proj.0"),
            concat_latent_image=encoded((beside_channels, "frames", "height", "width")),
            reference_latents=encoded(FIRST_FRAME, form=listed, only_with="ref_conv"),
        ),
        "WAN21_Vace": takes(vace_frames=encoded((32, "frames", "height", "width"), form=listed)),
        "WAN21_Camera": takes(
            camera_conditions=signal(over("control_adapter.conv", 64), "frames", times("height", 8), times("width", 8))
        ),
        "WAN21_HuMo": takes(
            audio_embed=Want(("frames", "audio_proj.seq_len", "audio_proj.blocks", "audio_proj.channels")),
            reference_latents=_REFERENCE,
        ),
        "WAN22_Animate": takes(
            face_video_pixels=signal(3, times("frames", 4, -3), 512, 512), pose_video_latent=encoded(VIDEO), frames=2
        ),
        "WAN_Animate2": takes(
            pose_video_latent=encoded(("channels", times("frames", 1, -1), "height", "width")), frames=2
        ),
        "WAN22_S2V": takes(
            audio_embed=Want(
                (times("frames", 4), speech_layers, "casual_audio_encoder.encoder.conv1_local.conv"),
                form=_channels_first,
            ),
            reference_latents=_REFERENCE,
            reference_motion=encoded(("channels", 19, "height", "width")),
            control_video=encoded(VIDEO),
        ),
        "WAN21_SCAIL": takes(
            concat_latent_image=None,
            reference_latents=_REFERENCE,
            pose_video_latent=encoded(("channels", "frames", over("height", 2), over("width", 2))),
        ),
        "WAN22_WanDancer": takes(
            audio_embed=Want((times("frames", 8), "music_projection")),
            clip_vision_output_ref=vision("img_emb_refimage.proj.1", "img_emb_refimage.proj.0"),
        ),
    },
    variants=(
        ("Animate 2", signature("blocks.0.self_attn.to_q")),
        ("VACE", signature("vace_blocks.0")),
        ("Camera", signature("control_adapter")),
        ("S2V", signature("casual_audio_encoder")),
        ("HuMo", signature("audio_proj.audio_proj_glob_1")),
        ("Animate", signature("motion_encoder")),
        ("SCAIL 2", signature("patch_embedding_mask")),
        ("SCAIL", signature("patch_embedding_pose")),
        ("Dancer", signature("patch_embedding_global")),
        ("FLF2V", signature("img_emb.emb_pos|condition_embedder.image_embedder.pos_embed")),
        ("Fun", signature("ref_conv")),
        ("I2V 2.1", signature("img_emb|condition_embedder.image_embedder")),
        ("T2V", signature(size=(r"patch_embedding\.weight", 1, (16,)))),
        ("TI2V 2.2", signature(size=(r"patch_embedding\.weight", 1, (48,)))),
        ("I2V 2.2", signature(size=(r"patch_embedding\.weight", 1, (36,)))),
    ),
)
