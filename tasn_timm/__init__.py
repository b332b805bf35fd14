"""TASN for timm: fine-grained image classifiers on any timm backbone. Importing this registers the models."""

from . import zoo
from .backbone import backbone_cfg
from .distillation import TASNLoss, soft_target_cross_entropy
from .tasn import TASN, TASNOutput

__version__ = "0.1.0"
__all__ = ["TASN", "TASNLoss", "TASNOutput", "backbone_cfg", "soft_target_cross_entropy", "zoo"]
