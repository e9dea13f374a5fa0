"""Example inputs exist for every model class that diffusers exports, and the forward runs with them."""

import pytest
from diffusers.utils import is_torchvision_available
from torch import nn

from benchmarks.tiny_diffusers import build, exported
from hfquant.dataflow.trace import PatternError, trace
from hfquant.integrations.examples import example_inputs

# Classes without example inputs, and the reason.
NONE = {
    "AnyFlowFARTransformer3DModel": "its forward without a cache needs compiled flex attention",
    "AutoencoderKLAllegro": "its forward only runs with tiling, on whole clips",
    "ControlNetXSAdapter": "has no forward of its own",
    "Cosmos3OmniTransformer": "takes text, pictures and sound packed in one row, and where each token goes",
    "MotionAdapter": "has no forward of its own",
    "RFD4ProteinaAutoencoder": "takes a protein's residues and dozens of their features",
    "RFD4ProteinaTransformer": "takes a protein's residues and dozens of their features",
    "WanAnimate2Transformer3DModel": "only runs with a cache, which another forward fills",
}
# Classes with example inputs whose forward cannot be traced here, and the reason.
UNWATCHED: dict[str, str] = {}
if not is_torchvision_available():
    UNWATCHED |= dict.fromkeys(("CosmosControlNetModel", "CosmosTransformer3DModel"), "needs torchvision")

# Linears that a forward does not run, and the reason; all others must be seen.
UNSEEN = {
    "AutoencoderKLTemporalDecoder": ("decoder.mid_block.attentions",),  # its attention block is not used
    "Flux3Transformer2DModel": ("image_cond",),  # for images given along with the text
    "HiDreamImageTransformer2DModel": ("experts",),  # no token is routed to them
    "MiniMaxMusic3RVQDepthDecoder": ("audio_heads", "projection"),  # the pipeline calls them
    "SanaWMLTX2RefinerTransformer3DModel": ("audio", "av_cross"),  # shares LTX-2's layers, but not its audio
    "SanaWMTransformer3DModel": ("_cam", "plucker"),  # for camera paths
}

# Classes that take more than a second or two to build and trace, of kinds that faster ones cover too.
SLOW = {
    *("AudioLDM2UNet2DConditionModel", "AutoencoderKLLTXVideo", "AutoencoderKLMiniMaxH3Audio", "AutoencoderKLMochi"),
    *("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan", "AutoencoderSAME"),
    *("AutoencoderVidTok", "BriaFibo2Transformer2DModel", "BriaTransformer2DModel", "ConsistencyDecoderVAE"),
    *("DreamLiteUNetModel", "I2VGenXLUNet", "Kandinsky3UNet", "Kandinsky6SRVAE", "Kandinsky6Transformer3DModel"),
    *("AutoencoderKLCosmos", "AutoencoderKLKVAEVideo", "AutoencoderKLLTX2Video", "AutoencoderKLMagvit"),
    *("AutoencoderKLMiniMaxH3", "Kandinsky6SRLatentUpscalerBank", "MMAudioVocoder", "MotifVideoTransformer3DModel"),
    *("RFD4ProteinaTransformer", "UNet3DConditionModel", "UNetControlNetXSModel", "WanVACETransformer3DModel"),
    "LTX2VideoDiffusionDecoderModel",
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in exported()]
)
def test_every_exported_class(name):
    """On meta (with real weights if control flow depends on values), the forward runs, so its linears are seen."""
    model = build(name)
    example = example_inputs(model)
    if name in NONE:
        assert example is None
        return
    assert example is not None
    if name in UNWATCHED:
        with pytest.raises(PatternError):
            trace(model, example)
        return
    found = trace(model, example)
    missed = {n for n, m in model.named_modules() if type(m) is nn.Linear} - found.keys()
    assert not [n for n in missed if not any(part in n for part in UNSEEN.get(name, ()))]
    assert bool(missed) == (name in UNSEEN)


def test_lists_name_exported_classes():
    assert NONE.keys() | UNWATCHED.keys() | UNSEEN.keys() | SLOW <= exported().keys()
    assert not NONE.keys() & UNWATCHED.keys()
