"""Weight names of U-Net and text encoder in published files.

Covers the names of diffusers, of CompVis and of kohya, with the prefixes of training wrappers; keys that are
correctly left out; and the recognition of other kinds of files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..model.model import Model

PARTS = ("unet", "text_encoder")
PREFIXES = {  # prefixes of wrappers and pipelines, nested in any order -> the part that they name
    "module.": "",
    "base_model.": "",
    "model.": "",
    "net.": "",
    "network.": "",
    "diffusion_model.": "unet",
    "unet_model.": "unet",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_model.": "text_encoder",
    "cond_stage_model.transformer.": "text_encoder",
}
INNER = re.compile(  # wrappers that may occur anywhere in a name
    r"(?<![^.])(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|modules_to_save\.(?!weight|bias)\w+)\."
)
IGNORED = (  # keys that do not affect the U-Net or text encoder
    (r"(^|\.)position_ids$", "positions"),
    (r"^(first_stage_model|vae)\.", "the VAE, the base's is used"),
    (r"^(model_ema|ema|ema_model|unet_ema)\.", "a moving average beside the weights"),
    (r"(^|\.)(logvar|alphas\w*|betas|lvlb_weights|scale_factor|(sqrt|log_one|posterior)_\w+)$", "the noise schedule"),
    (r"^safety_checker\.", "the safety checker"),
    (r"(^|\.)(text_projection\.weight|logit_scale|visual_projection\.weight|vision_model\..+)$", "the rest of CLIP"),
    (r"(^|\.)original_module\.", "peft's copy of the base"),
    (r"^(epoch|step|steps|global_step|iteration|num_updates)$", "counters of the training"),
)
FOREIGN = (  # the first pattern that matches a key determines the kind of a file
    (
        r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map)$|quant_state",
        "quantised by bitsandbytes",
    ),
    (r"\.(qweight|qzeros|g_idx)$", "quantised (GPTQ or AWQ)"),
    (r"\.(scale_weight|weight_scale|input_scale|_scale|zero_point|_packed_params.*)$|^scaled_fp8$", "quantised"),
    (r"^(control_model|controlnet)|controlnet_|zero_convs|^lora_controlnet$", "a ControlNet"),
    (r"^(emb_params|string_to_param|string_to_token|clip_[gl])$|^<.*>$|^modifier_token", "an embedding of a new word"),
    (r"^param_groups$|^state\.\d|exp_avg", "the state of an optimizer"),
    (r"motion_modules", "a motion module (AnimateDiff)"),
    (r"to_[kv]_ip|^(image_proj|ip_adapter)", "an IP-Adapter"),
    (r"^(adapter\.)?body\.\d", "a T2I-Adapter"),
    (r"double_blocks|single_blocks|single_transformer_blocks|double_stream", "a Flux transformer"),
    (r"joint_blocks|^(transformer\.|model\.)?transformer_blocks\.\d", "a diffusion transformer (SD3 or its kind)"),
    (r"^conditioner\.embedders|label_emb|add_embedding|^(lora_te2_|text_encoder_2\.)", "of SDXL"),
    (r"^cond_stage_model\.model\.|^(transformer\.)?resblocks\.\d|in_proj_weight", "an OpenCLIP text encoder"),
    (r"^(vae\.)?(encoder|decoder)\.(conv_in|down|mid|up|norm_out|conv_norm_out)|quant_conv", "a VAE"),
    (r"^(visual|vision_model)\.", "a CLIP image encoder"),
)
HINTS = {
    "quantised": "dequantise it first",
    "an OpenCLIP": "its layout is not read; give the U-Net alone",
    "of SDXL": "the base is another, or its text encoders are in the file: give the U-Net alone",
}
COMPVIS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
COMPVIS_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def plain(name: str) -> str:
    """Remove text_model from a text encoder's weight name.

    Only some versions of transformers have a module of that name.
    """
    return name.replace("text_encoder.text_model.", "text_encoder.")


def compvis_modules(names: Iterable[str]) -> dict[str, str]:
    """Map diffusers' module names of a U-Net's levels to CompVis' names.

    CompVis number levels, samplers included, consecutively.
    """
    modules = {m for name in names for m in re.findall(r"^(?:down|up)_blocks\.\d+\.\w+\.\d+", name)}
    blocks = sorted({tuple(module.split(".")[:2]) for module in modules}, key=lambda b: (b[0], int(b[1])))
    places, number = dict(COMPVIS), {"down_blocks": 1, "up_blocks": 0}
    for side, level in blocks:
        block, row = f"{side}.{level}", {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[side]
        for j in range(sum(module.startswith(f"{block}.resnets.") for module in modules)):
            places[f"{block}.resnets.{j}"] = f"{row}.{number[side]}.0"
            places[f"{block}.attentions.{j}"] = f"{row}.{number[side]}.1"
            number[side] += 1
        if f"{block}.downsamplers.0" in modules:
            places[f"{block}.downsamplers.0.conv"] = f"{row}.{number[side]}.0.op"
            number[side] += 1
        if f"{block}.upsamplers.0" in modules:
            after = 2 if f"{block}.attentions.0" in modules else 1
            places[f"{block}.upsamplers.0.conv"] = f"{row}.{number[side] - 1}.{after}.conv"
    return places


def compvis(names: Collection[str]) -> dict[str, str]:
    """Map CompVis' weight names of a U-Net to diffusers' names.

    Both are without the part.
    """
    places, theirs = compvis_modules(names), {}
    for name in names:
        parts = name.split(".")
        for n in range(len(parts) - 1, 0, -1):
            module, rest = ".".join(parts[:n]), parts[n:]
            if module in places:
                if ".resnets." in module:
                    rest = [COMPVIS_RESNET.get(rest[0], rest[0]), *rest[1:]]
                theirs[".".join([places[module], *rest])] = name
                break
    return theirs


@dataclass(frozen=True)
class Names:
    """Names of a model's weights in files.

    by_part: part -> a weight's name as files have it, without prefixes -> the model's. kohya: a module's name -> its
    weight's. weights: the model's, by its names, collected once as a model has hundreds.
    """

    weights: Mapping[str, Tensor]
    by_part: Mapping[str, Mapping[str, str]]
    kohya: Mapping[str, str]

    @classmethod
    def of(cls, model: Model) -> Names:
        modules = {part: getattr(model, part) for part in PARTS}
        weights = {f"{part}.{n}": p.data for part, m in modules.items() for n, p in m.named_parameters()}
        ours = {part: {} for part in PARTS}
        for name in weights:
            part, _, rest = plain(name).partition(".")
            ours[part][rest] = name
        theirs = {rest: ours["unet"][bare] for rest, bare in compvis(ours["unet"]).items()}
        kohya = {}
        for part, starts in (("unet", ["lora_unet_"]), ("text_encoder", ["lora_te_", "lora_te1_"])):
            spelt = ours[part] | (theirs if part == "unet" else {f"text_model.{n}": w for n, w in ours[part].items()})
            for rest, name in spelt.items():
                if rest.endswith(".weight"):
                    kohya |= {start + rest.removesuffix(".weight").replace(".", "_"): name for start in starts}
        return cls(weights, {"unet": theirs | ours["unet"], "text_encoder": ours["text_encoder"]}, kohya)

    def find(self, key: str, part: str = "") -> str | None:
        """Return the model's name for a key with any prefixes.

        None if the model has no such weight.
        """
        rest = INNER.sub("", key)
        while True:
            for where in [part] if part else PARTS:
                if rest in self.by_part[where]:
                    return self.by_part[where][rest]
            prefix = next((prefix for prefix in PREFIXES if rest.startswith(prefix)), None)
            if prefix is None:
                return None
            rest, part = rest.removeprefix(prefix), PREFIXES[prefix] or part


def reason_to_ignore(key: str) -> str | None:
    """Return the reason to ignore a key, or None."""
    return next((reason for pattern, reason in IGNORED if re.search(pattern, key)), None)


def foreign_kind(keys: Iterable[str]) -> str | None:
    """Return the kind of file that has such keys, or None.

    Only known kinds other than erased models are recognised.
    """
    keys = list(keys)
    for pattern, kind in FOREIGN:
        if any(re.search(pattern, key) for key in keys):
            hint = next((hint for start, hint in HINTS.items() if kind.startswith(start)), "")
            return f"{kind}: {hint}" if hint else f"{kind}, not weights of U-Net or text encoder"
    return None
