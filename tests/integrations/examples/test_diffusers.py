"""Example inputs of every model class that diffusers exports: there are some, and the forward runs with them."""

import pytest
from diffusers.utils import is_torchvision_available
from torch import nn

from benchmarks.tiny_diffusers import build, exported
from hfquant.dataflow.trace import PatternError, trace
from hfquant.integrations.examples import example_inputs

# Classes without inputs, and why.
NONE = {
    "AnyFlowFARTransformer3DModel": "its forward without a cache needs compiled flex attention",
    "AutoencoderKLAllegro": "its forward runs with tiling alone, on whole clips",
    "ControlNetXSAdapter": "has no forward of its own",
    "Cosmos3OmniTransformer": "takes text, pictures and sound packed in one row, and where each token goes",
    "MotionAdapter": "has no forward of its own",
    "RFD4ProteinaAutoencoder": "takes a protein's residues and dozens of their features",
    "RFD4ProteinaTransformer": "takes a protein's residues and dozens of their features",
    "WanAnimate2Transformer3DModel": "runs with a cache alone, which another forward fills",
}
# Classes with inputs whose forward cannot be watched here, and why.
UNWATCHED = {
    "Kandinsky6SRTransformer3DModel": "flex attention does not run on fake tensors",
    "LTX2VideoDiffusionDecoderModel": "flex attention does not run on fake tensors",
}
if not is_torchvision_available():
    UNWATCHED |= dict.fromkeys(("CosmosControlNetModel", "CosmosTransformer3DModel"), "needs torchvision")

# Linears that a forward passes by, and why; all others must be seen.
UNSEEN = {
    "AutoencoderKLTemporalDecoder": ("decoder.mid_block.attentions",),  # its block with attention leaves it out
    "Flux3Transformer2DModel": ("image_cond",),  # for pictures beside the text
    "HiDreamImageTransformer2DModel": ("experts",),  # to which no token is routed
    "MiniMaxMusic3RVQDepthDecoder": ("audio_heads", "projection"),  # called by the pipeline
    "SanaWMLTX2RefinerTransformer3DModel": ("audio", "av_cross"),  # shares LTX-2's layers, not its sound
    "SanaWMTransformer3DModel": ("_cam", "plucker"),  # for a camera's path
}


@pytest.mark.parametrize("name", exported())
def test_every_exported_class(name):
    """On meta (with weights where values decide): the forward runs with the inputs, so its linears are seen."""
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
    assert NONE.keys() | UNWATCHED.keys() | UNSEEN.keys() <= exported().keys()
    assert not NONE.keys() & UNWATCHED.keys()
