"""What pattern detection finds in models with published configs, built on the meta device: no weights needed.

    python -m benchmarks.patterns [MODEL ...] [--layers]

Each model runs in its own process, so that time and peak memory (above that of the imports) are its own. ``--layers``
lists every kind of layer: its name with block numbers replaced by ``*``, and what was found there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from hfquant.dataflow.trace import LinearTrace, trace
from hfquant.enums import SegPattern
from hfquant.integrations.examples import example_inputs


def flux() -> nn.Module:
    """Return FLUX.1-dev: the defaults of its class."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def sd35_medium() -> nn.Module:
    """Return Stable Diffusion 3.5 medium, with its 13 dual attention layers."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def sdxl() -> nn.Module:
    """Return the denoiser of Stable Diffusion XL."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def pixart_sigma() -> nn.Module:
    """Return PixArt-Sigma XL 2, 1024 pixels."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(caption_channels=4096, interpolation_scale=2, use_additional_conditions=False)


def sana() -> nn.Module:
    """Return Sana 1.6B: the defaults of its class."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel()


def llama() -> nn.Module:
    """Return Llama 2 7B: the defaults of its class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig())


def phi3() -> nn.Module:
    """Return Phi-3-mini: the defaults of its class. qkv is fused, and so are gate and up."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config())


def falcon() -> nn.Module:
    """Return Falcon 7B. All its linears but the head are of a subclass of nn.Linear."""
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(FalconConfig(vocab_size=65024))  # Falcon-7B


def mpt() -> nn.Module:
    """Return MPT-7B: qkv fused, concatenated."""
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432))


def neox() -> nn.Module:
    """Return GPT-NeoX 20B: qkv fused, interleaved by head."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig())


def mixtral() -> nn.Module:
    """Return Mixtral 8x7B: its experts are parameters, not linears."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig())


def vit() -> nn.Module:
    """Return ViT-base, patch 16, 1000 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "FLUX.1-dev": flux,
    "SD3.5-medium": sd35_medium,
    "SDXL UNet": sdxl,
    "PixArt-Sigma": pixart_sigma,
    "Sana 1.6B": sana,
    "Llama-2-7B": llama,
    "Phi-3-mini": phi3,
    "Falcon-7B": falcon,
    "MPT-7B": mpt,
    "GPT-NeoX-20B": neox,
    "Mixtral-8x7B": mixtral,
    "ViT-base": vit,
}


def measure(name: str) -> dict[str, Any]:
    """Build one model on the meta device, trace it, and return what was found."""
    with torch.device("meta"):
        model = MODELS[name]()
    inputs = example_inputs(model)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter(), time.process_time()
    traces = trace(model, inputs)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "linears": sum(type(m) is nn.Linear for m in model.modules()),
        "seen": len(traces),
        "patterns": {p.value: sum(p in t.patterns for t in traces.values()) for p in SegPattern},
        "layers": Counter(_kind(t) for t in traces.values()),
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "grown_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024,
    }


def _kind(found: LinearTrace) -> str:
    name = re.sub(r"\.\d+(?=\.)", ".*", found.name)
    flags = f" ({found.obstacle})" if found.obstacle else ""
    return f"{name}{flags} | {'; '.join(found.evidence) or '-'}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--layers", action="store_true", help="list every kind of layer too")
    parser.add_argument("--json", action="store_true", help="one model in this process, as JSON")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure(args.models[0])))
        return
    results = []
    for name in args.models:
        command = [sys.executable, "-m", "benchmarks.patterns", name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    columns = [p.value for p in SegPattern]
    print("| model | parameters | linears | seen | " + " | ".join(columns) + " | seconds (CPU) | peak MB (grown) |")
    print("| --- " * (len(columns) + 6) + "|")
    for r in results:
        found = " | ".join(str(r["patterns"][p]) for p in columns)
        print(
            f"| {r['model']} | {r['parameters'] / 1e9:.2f} B | {r['linears']} | {r['seen']} | {found} "
            f"| {r['seconds']:.1f} ({r['cpu_seconds']:.1f}) | {r['peak_mb']:.0f} ({r['grown_mb']:.0f}) |"
        )
    if args.layers:
        for r in results:
            print(f"\n### {r['model']}\n\n| layers | count | found |\n| --- | --- | --- |")
            for kind, count in r["layers"].items():
                layer, _, why = kind.partition(" | ")
                print(f"| `{layer}` | {count} | {why} |")


if __name__ == "__main__":
    main()
