"""Small random mixtures of experts from both libraries' classes, by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

# transformers' grouped matmul, the default of its classes, requires rows of 16 bytes.
TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

# Class: the class of its config, and the config's values.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("MixtralConfig", TEXT | {"num_local_experts": 4}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", TEXT | {"num_experts": 5}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        TEXT
        | MLA
        | {"num_key_value_heads": 3, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "GptOssForCausalLM": ("GptOssConfig", TEXT | {"num_local_experts": 4}),
    "OlmoeForCausalLM": ("OlmoeConfig", TEXT | {"num_experts": 4}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", TEXT | {"num_local_experts": 4}),
    "JetMoeForCausalLM": ("JetMoeConfig", TEXT | {"num_local_experts": 4, "kv_channels": 8}),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24},
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {
            "text_config": TEXT
            | {
                "num_experts": 4,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            "vision_config": VISION,
            "image_token_id": 50,
            "video_token_id": 51,
            "vision_start_token_id": 52,
            "vision_end_token_id": 53,
        },
    ),
}


class Sizes:
    """A config for any class of experts: four experts, and 16 for every size."""

    hidden_act = mlp_hidden_act = hidden_activation = "silu"
    _experts_implementation = "eager"
    moe_latent_size = None
    swiglu_limit, swiglu_alpha, rms_norm_eps = 7.0, 1.702, 1e-6

    def __getattr__(self, name: str) -> int:
        return 4 if "experts" in name else 16


def mixture(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """Return a transformers model with weights large enough for experts to matter; ``sizes`` update its config."""
    config, fields = MIXTURES[name]
    fields = fields | sizes
    torch.manual_seed(0)
    # Casting afterwards would also cast the rotary embedding's frequencies.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not isinstance(module, nn.Embedding):
                nn.init.normal_(parameter, std=0.3)
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Return random token ids, none of them special."""
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def nucleus() -> Any:
    """Return a model of the diffusers class that fuses its experts."""
    from diffusers import NucleusMoEImageTransformer2DModel

    torch.manual_seed(0)
    model = NucleusMoEImageTransformer2DModel(
        in_channels=8,
        num_layers=5,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        axes_dims_rope=(4, 4, 4),
        mlp_ratio=8.0,
        num_experts=4,
        moe_intermediate_dim=18,
        capacity_factors=2.0,
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:  # the class leaves these uninitialized
            nn.init.normal_(parameter, std=0.2)
    return model


def nucleus_inputs() -> dict[str, Any]:
    """Return sixteen patches and five tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 10, generator=generator),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.3]),
        "img_shapes": [(1, 4, 4)],
        "return_dict": False,
    }
