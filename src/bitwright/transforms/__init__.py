"""Transforms of a site's input, exactly undone in its weights."""

from bitwright.transforms.hadamard import RandomHadamard as RandomHadamard
from bitwright.transforms.permutation import channel_order as channel_order
from bitwright.transforms.site import SiteHadamard as SiteHadamard
