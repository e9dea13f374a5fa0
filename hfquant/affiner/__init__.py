"""The affiner: per-timestep affine maps that align a quantized denoiser with the real one.

:func:`load_affiner` trains or loads an affiner, `affiner.attach(pipe)` enables it, `affiner.detach()` removes it.
"""

from hfquant.affiner.affiner import BlockwiseAffiner, load_pipeline
from hfquant.affiner.config import AffinerConfig
from hfquant.affiner.fit import load_affiner
from hfquant.affiner.hooks import Affiner, Attachment, attach

__all__ = ["Affiner", "AffinerConfig", "Attachment", "BlockwiseAffiner", "attach", "load_affiner", "load_pipeline"]
