"""The loss of the Fully-Convolutional Regression Network (FCRN), fused with its gradient."""

from pkgutil import extend_path

# In a clone, this folder shadows the installed package; look there too for compiled modules.
__path__ = extend_path(__path__, __name__)

from . import reference
from .autograd import FCRNLossFunction
from .config import show_config
from .functional import fcrn_loss, masked_mse_loss
from .module import FCRNLoss, MaskedMSELoss
from .schedule import LinearNegativeWeight, StepNegativeWeight
from .stats import FCRNLossStats
from .version import __version__

__all__ = [
    "FCRNLoss",
    "FCRNLossFunction",
    "FCRNLossStats",
    "LinearNegativeWeight",
    "MaskedMSELoss",
    "StepNegativeWeight",
    "__version__",
    "fcrn_loss",
    "masked_mse_loss",
    "reference",
    "show_config",
]
