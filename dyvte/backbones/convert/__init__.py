"""State dicts of original repositories to the key layout of transformers' classes, one file per source."""

from dyvte.backbones.convert.eagle import convert_eagle_x5
from dyvte.backbones.convert.features import GivenFeatures, llava_for_features
from dyvte.backbones.convert.internvl2 import convert_internvl2
from dyvte.backbones.convert.lisa import ConvertedLisa, convert_lisa
from dyvte.backbones.convert.llava15 import convert_llava15
from dyvte.backbones.convert.renaming import Converted, Rule, grow_vocabulary
from dyvte.backbones.convert.vila15 import convert_vila15

__all__ = [
    "Converted",
    "ConvertedLisa",
    "GivenFeatures",
    "Rule",
    "convert_eagle_x5",
    "convert_internvl2",
    "convert_lisa",
    "convert_llava15",
    "convert_vila15",
    "grow_vocabulary",
    "llava_for_features",
]
